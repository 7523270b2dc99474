// minLSTM: a = f, b = i * g(v), divided by f + i where it is normalised; the values are the
// preactivations of f and i, and v.

#pragma once

#include "../candidate.h"

namespace {

template <bool NORMALIZE>
struct MinLSTM {
  static constexpr int TENSORS = 1, PARTS = 3;
  static constexpr int DECAY_READS = 2, BACKWARD_READS = 3;

  // Only f - i matters once both gates are all but closed: keep them within exp_minus's range.
  template <class V>
  static INLINE void lift(V* f, V* i) {
    if constexpr (!NORMALIZE) return;
    const auto floor = V{} - (sizeof((*f)[0]) == 4 ? 20 : 100);
    V larger = *f > *i ? *f : *i;
    V by = larger < floor ? floor - larger : V{};
    *f += by;
    *i += by;
  }
  template <class V>
  static INLINE V decay(const Values<V>& x) {
    V f = x[0], i = x[1];
    lift(&f, &i);
    V ef = exp_minus(f);
    if constexpr (!NORMALIZE) return 1 / (1 + ef);
    V ei = exp_minus(i);
    return (1 + ei) / (2 + ei + ef);
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    V f = x[0], i = x[1], v = x[2];
    lift(&f, &i);
    V ef = exp_minus(f), ei = exp_minus(i), ev = exp_minus(v);
    if constexpr (!NORMALIZE) return {1 / (1 + ef), candidate(v, 1 / (1 + ev)) / (1 + ei)};
    V r = 1 / ((2 + ei + ef) * (1 + ev));
    V total = (1 + ev) * r;
    return {(1 + ei) * total, (1 + ef) * total * candidate(v, (2 + ei + ef) * r)};
  }
  template <class V>
  static INLINE V backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    V f = x[0], i = x[1], v = x[2];
    lift(&f, &i);
    V ef = exp_minus(f), ei = exp_minus(i), ev = exp_minus(v);
    V r = 1 / ((1 + ef) * (1 + ei));
    V keep_f = (1 + ei) * r, keep_i = (1 + ef) * r;
    V a, w, s, g;
    if constexpr (NORMALIZE) {
      V total = 1 / ((2 + ei + ef) * (1 + ev));
      s = (2 + ei + ef) * total;
      total *= 1 + ev;
      a = (1 + ei) * total;
      w = (1 + ef) * total;
      g = candidate(v, s);
      V difference = q * (previous - g) * a * w;
      (*d)[0] = difference * ef * keep_f;
      (*d)[1] = -difference * ei * keep_i;
    } else {
      a = keep_f;
      w = keep_i;
      s = 1 / (1 + ev);
      g = candidate(v, s);
      (*d)[0] = q * previous * a * ef * keep_f;
      (*d)[1] = q * g * w * ei * keep_i;
    }
    (*d)[2] = q * w * slope(v, s);
    return a;
  }
};

}  // namespace
