// S4D on a CPU: h = a h + x, y = 2 Re sum_n w h, a = exp(rate); inputs x, rate, w.
//
// States are complex and in fp64, whatever the inputs: a step has no function to compute but products,
// and over long memories nothing is lost.

#include <complex>

#include "../../kernels/states.h"

namespace {

using V = Vec<double>;
constexpr int64_t L = LANES<double>;

struct Complex {
  V re, im;
};
INLINE Complex times(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
INLINE Complex times_conjugate(Complex a, Complex b) {  // a conj(b)
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}

template <class T>
struct S4D {
  using Kept = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Arguments& p;
  const Task& task;
  const int64_t N, H, vectors;
  Buffer<Complex> a, w, state;  // [vectors][N]

  S4D(const Arguments& p, const Task& task)
      : p(p), task(task), N(p.states), H(p.width), vectors((task.width + L - 1) / L),
        a(vectors * N), w(vectors * N), state(vectors * N) {
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      const auto decay = std::exp(given(p.x[1], at % (H * N)));
      const auto weight = given(p.x[2], at % (H * N));
      set(a[v * N + n], i, decay);
      set(w[v * N + n], i, weight);
      if (p.state_in) set(state[v * N + n], i, given(p.state_in, at));
    });
  }

  static std::complex<double> given(const void* pointer, int64_t at) {
    const double* numbers = static_cast<const double*>(pointer) + 2 * at;
    return {numbers[0], numbers[1]};
  }
  static void put(double* numbers, int64_t at, std::complex<double> x) {
    numbers[2 * at] = x.real();
    numbers[2 * at + 1] = x.imag();
  }
  static void set(Complex& to, int64_t lane, std::complex<double> x) {
    to.re[lane] = x.real();
    to.im[lane] = x.imag();
  }
  static std::complex<double> lane(const Complex& x, int64_t i) { return {x.re[i], x.im[i]}; }

  // body(place in [B, D, N], vector, n, lane) for all numbers of a state
  template <class Body>
  void each(Body body) const {
    for (int64_t c = 0; c < task.width; ++c)
      for (int64_t n = 0; n < N; ++n)
        body(((task.row * H + task.first + c) * N) + n, c / L, n, c % L);
  }

  int64_t count(int64_t v) const { return task.width - v * L < L ? task.width - v * L : L; }
  bool reset(int64_t t) const { return p.reset && p.reset[task.row * p.steps + t]; }
  int64_t place(int64_t t, int64_t v) const {
    return (task.row * p.steps + t) * H + task.first + v * L;
  }
  // of the states entering a tile: [B, tiles, D, N] complex
  Kept* kept(int64_t tile, int64_t v) const {
    const int64_t tiles = (p.steps + TILE - 1) / TILE;
    return static_cast<Kept*>(p.kept) +
           2 * ((task.row * tiles + tile) * H + task.first + v * L) * N;
  }

  void keep(int64_t tile) const {
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t i = 0; i < count(v); ++i)
        for (int64_t n = 0; n < N; ++n) {
          kept(tile, v)[2 * (i * N + n)] = state[v * N + n].re[i];
          kept(tile, v)[2 * (i * N + n) + 1] = state[v * N + n].im[i];
        }
  }

  template <bool WRITE>
  void forward() const {
    const T* x = static_cast<const T*>(p.x[0]);
    bool cleared = false;
    for (int64_t begin = 0; begin < p.steps; begin += TILE) {
      const int64_t end = begin + TILE < p.steps ? begin + TILE : p.steps;
      if (WRITE) keep(begin / TILE);
      for (int64_t v = 0; v < vectors; ++v) {
        Complex* h = &state[v * N];
        for (int64_t t = begin; t < end; ++t) {
          if (reset(t)) std::memset(static_cast<void*>(h), 0, N * sizeof(Complex)), cleared = true;
          const V in = channels<V>(x + place(t, v), count(v));
          V y{};
          for (int64_t n = 0; n < N; ++n) {
            h[n] = times(a[v * N + n], h[n]);
            h[n].re += in;
            if (WRITE) y += w[v * N + n].re * h[n].re - w[v * N + n].im * h[n].im;
          }
          if (WRITE) put_channels(static_cast<T*>(p.out[0]) + place(t, v), y + y, count(v));
        }
      }
    }
    leave(p.span_state ? p.span_state : p.state);
    if (p.span_decay) compose(cleared, false);
  }

  template <bool WRITE>
  void backward() const {
    Buffer<Complex> of_a(vectors * N), of_w(vectors * N), states((TILE + 1) * N);
    const T* x = static_cast<const T*>(p.x[0]);
    const T* grad = static_cast<const T*>(p.grad_y);
    bool cleared = false;
    for (int64_t begin = (p.steps - 1) / TILE * TILE; begin >= 0; begin -= TILE) {
      const int64_t end = begin + TILE < p.steps ? begin + TILE : p.steps;
      for (int64_t v = 0; v < vectors; ++v) {
        if (WRITE) make_again(begin, end, v, x, states.at);
        Complex* flow = &state[v * N];
        for (int64_t t = end - 1; t >= begin; --t) {
          const V twice = 2 * channels<V>(grad + place(t, v), count(v));
          const bool clear = reset(t);
          V of_x{};
          for (int64_t n = 0; n < N; ++n) {
            const Complex weight = w[v * N + n], decay = a[v * N + n];
            const Complex q{flow[n].re + twice * weight.re, flow[n].im - twice * weight.im};
            if (WRITE) {
              const Complex before = states[(t - begin) * N + n], h = states[(t - begin + 1) * N + n];
              of_x += q.re;
              of_w[v * N + n].re += twice * h.re;
              of_w[v * N + n].im -= twice * h.im;
              if (!clear) {
                const Complex d = times_conjugate(q, before);
                of_a[v * N + n].re += d.re;
                of_a[v * N + n].im += d.im;
              }
            }
            flow[n] = clear ? Complex{V{}, V{}} : times_conjugate(q, decay);
          }
          cleared |= clear;
          if (WRITE) put_channels(static_cast<T*>(p.out[0]) + place(t, v), of_x, count(v));
        }
      }
    }
    leave(p.span_state ? p.span_state : p.state);
    if (p.span_decay) compose(cleared, true);
    if (!WRITE) return;
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      const auto decay = lane(a[v * N + n], i);
      put(static_cast<double*>(p.out[1]), at, lane(of_a[v * N + n], i) * std::conj(decay));
      put(static_cast<double*>(p.out[2]), at, lane(of_w[v * N + n], i));
    });
  }

  // The states of a tile, from the one that entered: [0] before the first step, [1] after it.
  void make_again(int64_t begin, int64_t end, int64_t v, const T* x, Complex* states) const {
    const Kept* entered = kept(begin / TILE, v);
    for (int64_t n = 0; n < N; ++n) {
      states[n] = Complex{V{}, V{}};
      for (int64_t i = 0; i < count(v); ++i)
        set(states[n], i, {entered[2 * (i * N + n)], entered[2 * (i * N + n) + 1]});
    }
    for (int64_t t = begin; t < end; ++t) {
      const Complex* before = states + (t - begin) * N;
      Complex* h = states + (t - begin + 1) * N;
      const V in = channels<V>(x + place(t, v), count(v));
      const bool clear = reset(t);
      for (int64_t n = 0; n < N; ++n) {
        h[n] = clear ? Complex{V{}, V{}} : times(a[v * N + n], before[n]);
        h[n].re += in;
      }
    }
  }

  static INLINE void put_channels(T* to, V x, int64_t count) {
    if constexpr (sizeof(T) == 8) {
      store(to, x, count);
    } else {
      Vec<float> narrow{};
      for (int64_t i = 0; i < L; ++i) narrow[i] = x[i];
      store(to, narrow, count);
    }
  }

  void leave(double* to) const {
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) { put(to, at, lane(state[v * N + n], i)); });
  }

  // All steps' decays as one, or its conjugate: of the gradient.
  void compose(bool cleared, bool backwards) const {
    each([&](int64_t at, int64_t, int64_t, int64_t) {
      auto decay = std::exp(given(p.x[1], at % (H * N)) * double(p.steps));
      if (backwards) decay = std::conj(decay);
      put(p.span_decay, at, cleared ? 0 : decay);
    });
  }
};

}  // namespace

LONGHAUL_STATES(S4D)
