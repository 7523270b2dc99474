// The scan on a CPU, at the speed of memory: time is the outer loop, a block of channels the inner
// one, their states stay in L1, and gates are computed on the way. Every input is read once and
// every output written once. Plain C++ behind a C interface (native.py loads it), so that it builds
// in seconds without torch's headers.
//
// A recurrence turns `PARTS` preactivations per channel into a, b of h = a * h + b and, given the
// gradient q of h and the previous state, into the gradients of its preactivations. Everything else
// is the same for all of them. SCAN: README.md beside this file has the mathematics.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 512;  // channels at a time: the states of a block fit L1 many times

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bf16 x) {
  uint32_t wide = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}
inline void store(float* p, float x) { *p = x; }
inline void store(double* p, double x) { *p = x; }
inline void store(bf16* p, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t wide;
  std::memcpy(&wide, &x, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  p->bits = uint16_t(x != x ? (wide >> 16) | 0x40 : rounded);
}

// exp(-x) for x in [-80, 80], clamped outside: two units in the last place, no branch, no table, so
// that it vectorises. 2^n * exp(r), |r| <= ln 2 / 2, with the Taylor polynomial of degree 6.
inline float exp_minus(float x) {
  x = x < -80.0f ? -80.0f : (x > 80.0f ? 80.0f : x);
  float shifted = -x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  float n = shifted - 12582912.0f;
  float r = (-x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t scale_bits = int32_t(uint32_t(bits) << 23) + (127 << 23);
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  return p * scale;
}
inline double exp_minus(double x) {  // clamped so that no sum or product of two overflows
  return std::exp(-(x < -300.0 ? -300.0 : (x > 300.0 ? 300.0 : x)));
}

template <class S>
struct Gates {  // of one channel at one step
  S a, b;       // h = a * h + b
};

// g(v) = v + 0.5 above zero, sigmoid(v) below, and its derivative.
template <class S>
inline S candidate(S v) {
  S s = S(1) / (S(1) + exp_minus(v));
  return v >= S(0) ? v + S(0.5) : s;
}
template <class S>
inline S slope(S v, S g) {
  return v >= S(0) ? S(1) : g * (S(1) - g);
}

struct Linear {
  static constexpr int PARTS = 1;
};

struct MinGRU {
  static constexpr int PARTS = 2;
  template <class S>
  static inline S decay(S k, S, S) {
    S e = exp_minus(k);
    return e / (S(1) + e);
  }
  template <class S>
  static inline Gates<S> gates(S k, S v, S) {
    S e = exp_minus(k);
    S z = S(1) / (S(1) + e);
    return {e * z, z * candidate(v)};
  }
  // q: gradient of h. previous: the state before the step, 0 after a reset. Returns a.
  template <class S>
  static inline S backward(S q, S previous, S k, S v, S, S* dk, S* dv, S*) {
    S e = exp_minus(k);
    S z = S(1) / (S(1) + e);
    S a = e * z, g = candidate(v);
    *dk = q * z * a * (g - previous);
    *dv = q * z * slope(v, g);
    return a;
  }
};

template <bool NORMALIZE>
struct MinLSTM {
  static constexpr int PARTS = 3;
  template <class S>
  static inline S decay(S f, S i, S) {
    S ef = exp_minus(f);
    if (!NORMALIZE) return S(1) / (S(1) + ef);
    S ei = exp_minus(i);
    return (S(1) + ei) / (S(2) + ei + ef);
  }
  template <class S>
  static inline Gates<S> gates(S f, S i, S v) {
    S ef = exp_minus(f), ei = exp_minus(i);
    if (!NORMALIZE) return {S(1) / (S(1) + ef), candidate(v) / (S(1) + ei)};
    S total = S(1) / (S(2) + ei + ef);
    return {(S(1) + ei) * total, (S(1) + ef) * total * candidate(v)};
  }
  template <class S>
  static inline S backward(S q, S previous, S f, S i, S v, S* df, S* di, S* dv) {
    S ef = exp_minus(f), ei = exp_minus(i), g = candidate(v);
    S keep_f = S(1) / (S(1) + ef), keep_i = S(1) / (S(1) + ei);
    S a, w;
    if (NORMALIZE) {
      S total = S(1) / (S(2) + ei + ef);
      a = (S(1) + ei) * total;
      w = (S(1) + ef) * total;
      S difference = q * (previous - g) * a * w;
      *df = difference * ef * keep_f;
      *di = -difference * ei * keep_i;
    } else {
      a = keep_f;
      w = keep_i;
      *df = q * previous * a * ef * keep_f;
      *di = q * g * w * ei * keep_i;
    }
    *dv = q * w * slope(v, g);
    return a;
  }
};

// What every kernel gets. x holds the preactivations [B, T, PARTS * H]; for Linear, x is a and y is
// b, [B, T, H] each. Pointers that a kernel does not use are null.
struct Arguments {
  int64_t batch, steps, width;
  const void *x, *y;
  const uint8_t* reset;  // [B, T]
  const void* h;         // [B, T, H], the forward's output
  const void* grad_h;    // [B, T, H]
  const void* state_in;  // [B, H]: h_in, or the gradient of h_last
  const void* h_in;      // [B, H]
  void *out, *out_y;     // h; or the gradients of x and y
  void *decay, *state;   // [B, H]: the span, or h_last, or the gradient of h_in
  int32_t threads;
};

// Run body(row of the batch, first channel, one past the last) over all channels of all rows.
template <class Body>
void for_blocks(const Arguments& p, Body body) {
  int64_t per_row = (p.width + BLOCK - 1) / BLOCK;
  while (p.batch * per_row < p.threads && p.width / (per_row + 1) >= 16) ++per_row;
  int64_t block = ((p.width + per_row - 1) / per_row + 15) / 16 * 16;
  per_row = (p.width + block - 1) / block;
  int64_t tasks = p.batch * per_row;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.threads > 1 && tasks > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    int64_t first = task % per_row * block;
    body(task / per_row, first, first + block < p.width ? first + block : p.width);
  }
}

template <class R, class T, class S, bool WRITE>
void run_forward(const Arguments& p) {
  const int64_t H = p.width, P = R::PARTS;
  for_blocks(p, [&](int64_t row, int64_t first, int64_t last) {
    const int64_t n = last - first;
    const T* x = static_cast<const T*>(p.x) + row * p.steps * P * H + first;
    const T* y = P == 1 ? static_cast<const T*>(p.y) + row * p.steps * H + first : nullptr;
    T* out = WRITE ? static_cast<T*>(p.out) + row * p.steps * H + first : nullptr;
    const uint8_t* reset = p.reset ? p.reset + row * p.steps : nullptr;
    S h[BLOCK], A[BLOCK];
    for (int64_t c = 0; c < n; ++c) {
      h[c] = WRITE ? static_cast<const S*>(p.state_in)[row * H + first + c] : S(0);
      A[c] = S(1);
    }
    for (int64_t t = 0; t < p.steps; ++t, x += P * H) {
      if (reset && reset[t])
        for (int64_t c = 0; c < n; ++c) h[c] = A[c] = S(0);
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        S a, b;
        if constexpr (P == 1) {
          a = load(x[c]);
          b = load(y[c]);
        } else {
          auto g = R::gates(S(load(x[c])), S(load(x[H + c])), S(load(x[(P - 1) * H + c])));
          a = g.a;
          b = g.b;
        }
        h[c] = a * h[c] + b;
        if (WRITE)
          store(out + c, h[c]);
        else
          A[c] *= a;
      }
      if (P == 1) y += H;
      if (WRITE) out += H;
    }
    for (int64_t c = 0; c < n; ++c) {
      static_cast<S*>(p.state)[row * H + first + c] = h[c];
      if (!WRITE) static_cast<S*>(p.decay)[row * H + first + c] = A[c];
    }
  });
}

template <class R, class T, class S>
void run_summarize_backward(const Arguments& p) {
  const int64_t H = p.width, P = R::PARTS;
  for_blocks(p, [&](int64_t row, int64_t first, int64_t last) {
    const int64_t n = last - first;
    const T* x = static_cast<const T*>(p.x) + (row + 1) * p.steps * P * H + first;
    const T* o = static_cast<const T*>(p.grad_h) + (row + 1) * p.steps * H + first;
    const uint8_t* reset = p.reset ? p.reset + row * p.steps : nullptr;
    S G[BLOCK], A[BLOCK];
    for (int64_t c = 0; c < n; ++c) {
      G[c] = S(0);
      A[c] = S(1);
    }
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      x -= P * H;
      o -= H;
      if (reset && reset[t]) {
        for (int64_t c = 0; c < n; ++c) G[c] = A[c] = S(0);
        continue;
      }
#pragma GCC ivdep
      for (int64_t c = 0; c < n; ++c) {
        S a;
        if constexpr (P == 1)
          a = load(x[c]);
        else
          a = R::decay(S(load(x[c])), S(load(x[H + c])), S(0));
        G[c] = a * (S(load(o[c])) + G[c]);
        A[c] *= a;
      }
    }
    for (int64_t c = 0; c < n; ++c) {
      static_cast<S*>(p.state)[row * H + first + c] = G[c];
      static_cast<S*>(p.decay)[row * H + first + c] = A[c];
    }
  });
}

template <class R, class T, class S>
void run_backward(const Arguments& p) {
  const int64_t H = p.width, P = R::PARTS;
  for_blocks(p, [&](int64_t row, int64_t first, int64_t last) {
    const int64_t n = last - first;
    const int64_t end = (row + 1) * p.steps;
    const T* x = static_cast<const T*>(p.x) + end * P * H + first;
    const T* o = static_cast<const T*>(p.grad_h) + end * H + first;
    const T* h = static_cast<const T*>(p.h) + end * H + first;
    T* dx = static_cast<T*>(p.out) + end * P * H + first;
    T* dy = P == 1 ? static_cast<T*>(p.out_y) + end * H + first : nullptr;
    const uint8_t* reset = p.reset ? p.reset + row * p.steps : nullptr;
    const S* h_in = static_cast<const S*>(p.h_in) + row * H + first;
    S G[BLOCK], previous[BLOCK];
    for (int64_t c = 0; c < n; ++c) G[c] = static_cast<const S*>(p.state_in)[row * H + first + c];
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      x -= P * H;
      o -= H;
      h -= H;
      dx -= P * H;
      const bool cleared = reset && reset[t];
      if (cleared)
        for (int64_t c = 0; c < n; ++c) previous[c] = S(0);
      else if (t == 0)
        for (int64_t c = 0; c < n; ++c) previous[c] = h_in[c];
      else
        for (int64_t c = 0; c < n; ++c) previous[c] = load(h[c - H]);
      if constexpr (P == 1) {
        dy -= H;
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          S q = S(load(o[c])) + G[c];
          store(dx + c, q * previous[c]);
          store(dy + c, q);
          G[c] = S(load(x[c])) * q;
        }
      } else {
#pragma GCC ivdep
        for (int64_t c = 0; c < n; ++c) {
          S q = S(load(o[c])) + G[c], d0, d1, d2 = S(0);
          S a = R::backward(q, previous[c], S(load(x[c])), S(load(x[H + c])),
                            S(load(x[(P - 1) * H + c])), &d0, &d1, &d2);
          store(dx + c, d0);
          store(dx + H + c, d1);
          if (P == 3) store(dx + 2 * H + c, d2);
          G[c] = a * q;
        }
      }
      if (cleared)
        for (int64_t c = 0; c < n; ++c) G[c] = S(0);
    }
    for (int64_t c = 0; c < n; ++c) static_cast<S*>(p.state)[row * H + first + c] = G[c];
  });
}

enum Kernel { FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD };

template <class R, class T, class S>
void run(int kernel, const Arguments& p) {
  switch (kernel) {
    case FORWARD: return run_forward<R, T, S, true>(p);
    case SUMMARIZE: return run_forward<R, T, S, false>(p);
    case BACKWARD: return run_backward<R, T, S>(p);
    case SUMMARIZE_BACKWARD: return run_summarize_backward<R, T, S>(p);
  }
}

template <class R>
void run_dtype(int kernel, int dtype, const Arguments& p) {
  switch (dtype) {
    case 0: return run<R, float, float>(kernel, p);
    case 1: return run<R, bf16, float>(kernel, p);
    case 2: return run<R, double, double>(kernel, p);
  }
}

}  // namespace

// kernel: enum Kernel. recurrence: 0 linear, 1 minGRU, 2 minLSTM normalised, 3 minLSTM.
// dtype: 0 fp32, 1 bf16, 2 fp64.
extern "C" void longhaul_scan(int kernel, int recurrence, int dtype, const Arguments* arguments) {
  switch (recurrence) {
    case 0: return run_dtype<Linear>(kernel, dtype, *arguments);
    case 1: return run_dtype<MinGRU>(kernel, dtype, *arguments);
    case 2: return run_dtype<MinLSTM<true>>(kernel, dtype, *arguments);
    case 3: return run_dtype<MinLSTM<false>>(kernel, dtype, *arguments);
  }
}
