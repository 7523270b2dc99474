// The candidate of minGRU and minLSTM, and its derivative, from s = sigmoid(v).

#pragma once

namespace {

template <class V>
INLINE V sigmoid(V v) {
  return reciprocal(1 + exp_minus(v));
}

// sigmoid(v) where v is below zero: nothing of it is taken above.
template <class V>
INLINE V sigmoid_below(V v) {
  return reciprocal(1 + exp_minus<false>(v));
}
// g(v) = v + 0.5 above zero, s below.
template <class V>
INLINE V candidate(V v, V s) {
  return v >= 0 ? v + (V{} + 1) / 2 : s;
}
template <class V>
INLINE V slope(V v, V s) {
  return v >= 0 ? V{} + 1 : s * (1 - s);
}

}  // namespace
