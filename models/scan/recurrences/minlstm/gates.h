// minLSTM: a = f, b = i * g(v), divided by f + i where it is normalised; the values are the
// preactivations of f and i, and v.

#pragma once

#include "../candidate.h"

namespace {

template <bool NORMALIZE>
struct MinLSTM {
  static constexpr int TENSORS = 1, PARTS = 3;
  static constexpr int DECAY_READS = NORMALIZE ? 2 : 1, BACKWARD_READS = 3;
  static constexpr bool FORGETS = true;

  // exp(-f) and exp(-i). Only f - i matters once both gates are all but closed: they are kept where
  // exp_minus has room below them.
  template <class V>
  static INLINE void exps(V f, V i, V* ef, V* ei) {
    if constexpr (NORMALIZE) {
      const auto floor = V{} - (sizeof(f[0]) == 4 ? 20 : 40);
      const V larger = f > i ? f : i;
      const V by = larger < floor ? floor - larger : V{};
      f += by;
      i += by;
    }
    *ef = exp_minus(f);
    *ei = exp_minus(i);
  }
  // f / (f + i) and i / (f + i), from the exponentials.
  template <class V>
  static INLINE Decay<V> shares(V ef, V ei) {
    const V r = reciprocal(2 + ei + ef);
    return {(1 + ei) * r, (1 + ef) * r};
  }
  template <class V>
  static INLINE Decay<V> decay(const Values<V>& x) {
    if constexpr (NORMALIZE) {
      V ef, ei;
      exps(x[0], x[1], &ef, &ei);
      return shares(ef, ei);
    }
    const V ef = exp_minus(x[0]), f = reciprocal(1 + ef);
    return {f, ef * f};
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    const Decay<V> d = decay(x);
    const V i = NORMALIZE ? d.c : sigmoid(x[1]);
    return {d.a, d.c, i * candidate(x[2], sigmoid_below(x[2]))};
  }
  template <class V>
  static INLINE Decay<V> backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    V ef, ei;
    exps(x[0], x[1], &ef, &ei);
    const V f = reciprocal(1 + ef), i = reciprocal(1 + ei), s = sigmoid_below(x[2]);
    const V g = candidate(x[2], s);
    if constexpr (NORMALIZE) {
      const Decay<V> share = shares(ef, ei);
      const V difference = q * (previous - g) * share.a * share.c;
      (*d)[0] = difference * ef * f;
      (*d)[1] = -difference * ei * i;
      (*d)[2] = q * share.c * slope(x[2], s);
      return share;
    }
    (*d)[0] = q * previous * f * ef * f;
    (*d)[1] = q * g * i * ei * i;
    (*d)[2] = q * i * slope(x[2], s);
    return {f, ef * f};
  }
};

}  // namespace
