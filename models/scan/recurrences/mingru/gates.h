// minGRU: a = 1 - z, b = z * g(v), z = sigmoid(k); the values are k and v.

#pragma once

#include "../candidate.h"

namespace {

struct MinGRU {
  static constexpr int TENSORS = 1, PARTS = 2;
  static constexpr int DECAY_READS = 1, BACKWARD_READS = 2;

  template <class V>
  static INLINE V decay(const Values<V>& x) {
    V ek = exp_minus(x[0]);
    return ek / (1 + ek);
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    V ek = exp_minus(x[0]), ev = exp_minus(x[1]);
    V r = 1 / ((1 + ek) * (1 + ev));
    V z = (1 + ev) * r;
    return {ek * z, z * candidate(x[1], (1 + ek) * r)};
  }
  template <class V>
  static INLINE V backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    V ek = exp_minus(x[0]), ev = exp_minus(x[1]);
    V r = 1 / ((1 + ek) * (1 + ev));
    V z = (1 + ev) * r, s = (1 + ek) * r;
    V a = ek * z, qz = q * z;
    (*d)[0] = qz * a * (candidate(x[1], s) - previous);
    (*d)[1] = qz * slope(x[1], s);
    return a;
  }
};

}  // namespace
