// minGRU: a = 1 - z, b = z * g(v), z = sigmoid(k); the values are k and v.

#pragma once

#include "../candidate.h"

namespace {

struct MinGRU {
  static constexpr int TENSORS = 1, PARTS = 2;
  static constexpr int DECAY_READS = 1, BACKWARD_READS = 2;
  static constexpr bool FORGETS = true;

  template <class V>
  static INLINE Decay<V> decay(const Values<V>& x) {
    const V ek = exp_minus(x[0]), z = reciprocal(1 + ek);
    return {ek * z, z};
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    const Decay<V> d = decay(x);
    return {d.a, d.c, d.c * candidate(x[1], sigmoid_below(x[1]))};
  }
  template <class V>
  static INLINE Decay<V> backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    const Decay<V> z = decay(x);
    const V s = sigmoid_below(x[1]), qz = q * z.c;
    (*d)[0] = qz * z.a * (candidate(x[1], s) - previous);
    (*d)[1] = qz * slope(x[1], s);
    return z;
  }
};

}  // namespace
