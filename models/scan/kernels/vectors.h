// Vectors of channels, their loads and stores, and the exponential that gates are made of.
//
// Vectors are GCC's vector types of 64 bytes, whatever the processor has: a compiler that does not
// know a new processor would choose narrower ones.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// What a loop calls for every vector of channels: left to its own measure, the compiler makes calls
// of the larger gates, whose values then pass through memory (2.5 times slower for minLSTM in bf16).
#define INLINE inline __attribute__((always_inline))

namespace {

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(64)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(64)));
};
template <class S>
using Vec = typename VectorOf<S>::type;
template <class S>
constexpr int64_t LANES = 64 / sizeof(S);

struct bf16 {
  uint16_t bits;
};
typedef uint16_t Half __attribute__((vector_size(32)));
typedef uint32_t Word __attribute__((vector_size(64)));

INLINE Vec<float> load(const float* p) {
  Vec<float> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE Vec<float> load(const bf16* p) {
  Half narrow;
  std::memcpy(&narrow, p, sizeof narrow);
#ifdef __AVX512F__
  const Word wide = (Word)_mm512_cvtepu16_epi32((__m256i)narrow);
#else
  const Word wide = __builtin_convertvector(narrow, Word);
#endif
  return (Vec<float>)(wide << 16);
}
template <class S>
INLINE void store(S* p, Vec<S> x) {
  std::memcpy(p, &x, sizeof x);
}
INLINE void store(bf16* p, Vec<float> x) {  // to nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
  const __m256bh narrow = _mm512_cvtneps_pbh(x);
#else
  Word wide = (Word)x;
  Word rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const Half narrow = __builtin_convertvector(x == x ? rounded : (wide >> 16) | 0x40, Half);
#endif
  std::memcpy(p, &narrow, sizeof narrow);
}

// The same for `count` channels, fewer than the lanes at the end of a width they do not divide.
template <class T>
INLINE auto load(const T* p, int64_t count) {
  constexpr int64_t lanes = LANES<std::conditional_t<sizeof(T) == 8, double, float>>;
  if (count == lanes) return load(p);
  T padded[lanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <class T, class V>
INLINE void store(T* p, V x, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(x[0]);
  if (count == lanes) return store(p, x);
  T padded[lanes];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

INLINE Vec<float> clamp(Vec<float> x, float bound) {  // NaN stays NaN
#ifdef __AVX512F__  // one instruction each, where GCC 12 makes two of a choice
  return _mm512_min_ps(_mm512_set1_ps(bound), _mm512_max_ps(_mm512_set1_ps(-bound), x));
#else
  x = x < -bound ? Vec<float>{} - bound : x;
  return x > bound ? Vec<float>{} + bound : x;
#endif
}

// exp(-x), x clamped to [-40, 40]: a sigmoid is then 4e-18 where it should be less, far below the
// rounding of what it is added to, and a product of two such values stays finite, so that two gates
// share a division. 2^n * exp(r), |r| <= ln 2 / 2, with the
// Taylor polynomial of degree 6: two units in the last place.
INLINE Vec<float> exp_minus(Vec<float> x) {
  x = clamp(x, 40.0f);
  Vec<float> shifted = x * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = n * 0.693359375f + x;  // minus r
  r = r - n * 2.12194440e-4f;
  Vec<float> p = r * (1.0f / 720.0f) - 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r - 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r - 1.0f;
  p = p * r + 1.0f;
  Vec<float> e = (Vec<float>)((Word)p + ((Word)shifted << 23));  // adds n to the exponent
  return x == x ? e : x;  // of a NaN, what is added may have made a number
}
INLINE Vec<double> exp_minus(Vec<double> x) {  // clamped so that no sum or product of two overflows
  for (int i = 0; i < LANES<double>; ++i)
    x[i] = std::exp(-(x[i] < -300.0 ? -300.0 : (x[i] > 300.0 ? 300.0 : x[i])));
  return x;
}

// The values of a channel that a recurrence makes its gates of, or their gradients.
template <class V>
struct Values {
  V at[4];
  INLINE V& operator[](int i) { return at[i]; }
  INLINE const V& operator[](int i) const { return at[i]; }
};

template <class V>
struct Step {
  V a, b;  // h = a * h + b
};

}  // namespace
