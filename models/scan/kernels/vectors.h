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

INLINE Vec<float> clamp(Vec<float> x, float least, float most) {  // NaN stays NaN
#ifdef __AVX512F__  // one instruction each, where GCC 12 makes two of a choice
  return _mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), x));
#else
  x = x < least ? Vec<float>{} + least : x;
  return x > most ? Vec<float>{} + most : x;
#endif
}

// exp(-x), x clamped to [-83, 87]: the result is a normal number, and a gate made of it at least
// 2e-36. 2^n * exp(-r), |r| <= ln 2 / 2, with a polynomial fitted to 1e-7; 2e-7 with all roundings
// for x from -20 to 20, 4e-7 at the ends.
//
// Not CLOSED above, +inf gives NaN: for whoever takes another value there.
template <bool CLOSED = true>
INLINE Vec<float> exp_minus(Vec<float> x) {
#ifdef __AVX512F__
  x = CLOSED ? clamp(x, -83.0f, 87.0f) : (Vec<float>)_mm512_max_ps(_mm512_set1_ps(-83.0f), x);
#else
  x = clamp(x, -83.0f, 87.0f);
#endif
#ifdef __AVX512F__
  const Vec<float> n = _mm512_roundscale_ps(x * -1.44269504f, 0);
#else
  const Vec<float> shifted = x * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Vec<float> n = shifted - 12582912.0f;
#endif
  const Vec<float> r = n * 0.693147182f + x;  // minus what is left; one rounding where there is FMA
  Vec<float> p = r * -8.31250101e-3f + 4.18903306e-2f;
  p = p * r - 0.166671157f;
  p = p * r + 0.499992311f;
  p = p * r - 1.0f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return _mm512_scalef_ps(p, n);
#else
  const Vec<float> e = (Vec<float>)((Word)p + ((Word)shifted << 23));  // adds n to the exponent
  return x == x ? e : x;  // of a NaN, what is added may have made a number
#endif
}
template <bool CLOSED = true>
INLINE Vec<double> exp_minus(Vec<double> x) {  // clamped so that no sum of two overflows
  for (int i = 0; i < LANES<double>; ++i)
    x[i] = std::exp(-(x[i] < -700.0 ? -700.0 : (x[i] > 700.0 ? 700.0 : x[i])));
  return x;
}

// 1 / x of an x from 1 to 2^125, to a unit in the last place. NaN stays NaN.
INLINE Vec<float> reciprocal(Vec<float> x) {
#ifdef __AVX512F__  // a third of what a division takes
  const Vec<float> r = _mm512_rcp14_ps(x);
  return r + r * (1 - x * r);
#else
  return 1 / x;
#endif
}
INLINE Vec<double> reciprocal(Vec<double> x) { return 1 / x; }

// The values of a channel that a recurrence makes its gates of, or their gradients.
template <class V>
struct Values {
  V at[4];
  INLINE V& operator[](int i) { return at[i]; }
  INLINE const V& operator[](int i) const { return at[i]; }
};

// A step's decay a, and its complement c = 1 - a. Each is made of the gates and not of the other one,
// where it is small: a channel that remembers a million steps has a c of which 1 - a keeps one bit.
template <class V>
struct Decay {
  V a, c;
};
template <class V>
struct Step {
  V a, c, b;  // h -> a h + b = h + (b - c h)
};

// A sum that goes on for millions of steps: its value, and what rounding has left of it.
template <class V>
struct Sum {
  V value, rest;
};

// x, computed here: where it is used twice, the compiler would fold its product into both uses.
template <class V>
INLINE V made(V x) {
#ifdef __AVX512F__
  asm("" : "+v"(x));
#endif
  return x;
}

// The sum where the decay is near one, and else what was computed from a.
template <class V>
INLINE Sum<V> chosen(Decay<V> d, V value, V rest, V far) {
#ifdef __AVX512F__  // one comparison, where GCC 12 makes one for each choice
  if constexpr (sizeof(value[0]) == 4) {
    const __mmask16 near = _mm512_cmp_ps_mask(d.a, _mm512_set1_ps(0.5f), _CMP_GE_OQ);
    return {_mm512_mask_mov_ps(far, near, value), _mm512_maskz_mov_ps(near, rest)};
  }
#endif
  const auto near = d.a >= 0.5f;
  return {near ? value : far, near ? rest : V{}};
}

// a sum + b. Where the decay is near one the small change b - c sum is made, and added with its
// rounding kept (Kahan's sum): `a h + b` would round the same way at every step, and drift. In fp64
// that drift is below anything here.
template <class V>
INLINE Sum<V> decayed(Sum<V> sum, Decay<V> d, V b) {
  if constexpr (sizeof(sum.value[0]) == 8) return {d.a * sum.value + b, V{}};
  b = made(b);
  const V change = (b - d.c * sum.value) + sum.rest;
  const V value = sum.value + change;
  return chosen(d, value, change - (value - sum.value), V(d.a * sum.value + b));
}

// The flow of a gradient through a step, which q, flow and what is `given` from outside, reaches:
// a q, as above. One product fewer than `decayed`.
template <class V>
INLINE Sum<V> flowed(Sum<V> flow, Decay<V> d, V q, V given) {
  if constexpr (sizeof(q[0]) == 8) return {d.a * q, V{}};
  const V change = (given - d.c * q) + flow.rest;
  const V value = flow.value + change;
  return chosen(d, value, change - (value - flow.value), V(d.a * q));
}

}  // namespace
