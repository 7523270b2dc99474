// h = a * h + b with a and b given; or b and the complement c of a = 1 - c.

#pragma once

namespace {

struct Linear {
  static constexpr int TENSORS = 2, PARTS = 1;  // a; b
  static constexpr int DECAY_READS = 1, BACKWARD_READS = 1;
  static constexpr bool FORGETS = false;

  template <class V>
  static INLINE Decay<V> decay(const Values<V>& x) {
    return {x[0], 1 - x[0]};  // exact where it counts, between a half and two
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    return {x[0], 1 - x[0], x[1]};
  }
  template <class V>
  static INLINE Decay<V> backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    (*d)[0] = q * previous;
    (*d)[1] = q;
    return decay(x);
  }
};

struct Complement {
  static constexpr int TENSORS = 2, PARTS = 1;  // c; b
  static constexpr int DECAY_READS = 1, BACKWARD_READS = 1;
  static constexpr bool FORGETS = false;

  template <class V>
  static INLINE Decay<V> decay(const Values<V>& x) {
    return {1 - x[0], x[0]};
  }
  template <class V>
  static INLINE Step<V> gates(const Values<V>& x) {
    return {1 - x[0], x[0], x[1]};
  }
  template <class V>
  static INLINE Decay<V> backward(V q, V previous, const Values<V>& x, Values<V>* d) {
    (*d)[0] = -(q * previous);
    (*d)[1] = q;
    return decay(x);
  }
};

}  // namespace
