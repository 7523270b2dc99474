// h = a * h + b with a and b given.

#pragma once

namespace {

struct Linear {
  static constexpr int TENSORS = 2, PARTS = 1;  // a; b
  static constexpr int DECAY_READS = 1, BACKWARD_READS = 1;

  template <class V>
  static INLINE V decay(const Values<V>& x) {
    return x[0];
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    return {x[0], x[1]};
  }
  template <class V>
  static INLINE V backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    (*d)[0] = q * previous;
    (*d)[1] = q;
    return x[0];
  }
};

}  // namespace
