// Mamba's selective scan on a CPU: h = exp(dt A) h + dt x B, y = sum_n C h, dt = softplus(k + bias);
// inputs x, k, B, C, A, bias.

#include "../../kernels/states.h"

namespace {

// log(1 + exp(z)), right to a rounding or two where it is small too; and its derivative.
INLINE Vec<float> softplus(Vec<float> z) {
  const Vec<float> size = z < 0 ? -z : z;
  const Vec<float> u = exp_minus(size);  // from 0 to 1
  const Vec<float> s = u / (2 + u), ss = s * s;  // log(1 + u) = 2 atanh(u / (2 + u))
  Vec<float> p = ss * (1.0f / 13) + 1.0f / 11;
  p = p * ss + 1.0f / 9;
  p = p * ss + 1.0f / 7;
  p = p * ss + 1.0f / 5;
  p = p * ss + 1.0f / 3;
  p = p * ss + 1;
  return (z < 0 ? Vec<float>{} : z) + 2 * s * p;
}
INLINE Vec<double> softplus(Vec<double> z) {
  for (int i = 0; i < LANES<double>; ++i)
    z[i] = z[i] > 0 ? z[i] + std::log1p(std::exp(-z[i])) : std::log1p(std::exp(z[i]));
  return z;
}
template <class V>
INLINE V sigmoid(V z) {
  return 1 / (1 + exp_minus(z));
}

// exp(-x) of an x >= 0, and what it lacks to one, each right to a rounding or two.
INLINE Decay<Vec<float>> decay_of(Vec<float> x) {
  const Vec<float> near = x < 87.0f ? x : Vec<float>{} + 87.0f;
  const Vec<float> shifted = near * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = n * 0.693147182f + near + n * -1.90465421e-9f;  // ln 2 in two parts
  Vec<float> m = r * (1.0f / 5040) - 1.0f / 720;  // exp(-r) - 1
  m = m * r + 1.0f / 120;
  m = m * r - 1.0f / 24;
  m = m * r + 1.0f / 6;
  m = m * r - 0.5f;
  m = m * r + 1.0f;
  m = -m * r;
  const Vec<float> a = (Vec<float>)((Word)(m + 1) + ((Word)shifted << 23));
  const Vec<float> c = n == 0 ? -m : 1 - a;
  return {x == x ? a : x, x == x ? c : x};
}
INLINE Decay<Vec<double>> decay_of(Vec<double> x) {
  Decay<Vec<double>> d;
  for (int i = 0; i < LANES<double>; ++i) {
    d.a[i] = std::exp(-x[i]);
    d.c[i] = -std::expm1(-x[i]);
  }
  return d;
}

template <class T>
struct Mamba {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using V = Vec<S>;
  static constexpr int64_t L = LANES<S>;
  const Arguments& p;
  const Task& task;
  const int64_t N, H, vectors;
  Buffer<V> rate, bias;  // minus A [vectors][N]; [vectors]
  Buffer<Sum<V>> state;  // [vectors][N]

  Mamba(const Arguments& p, const Task& task)
      : p(p), task(task), N(p.states), H(p.width), vectors((task.width + L - 1) / L),
        rate(vectors * N), bias(vectors), state(vectors * N) {
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      rate[v * N + n][i] = -static_cast<const S*>(p.x[4])[at % (H * N)];
      const double entering = p.state_in ? p.state_in[at] : 0.0;
      state[v * N + n].value[i] = entering;
      state[v * N + n].rest[i] = entering - double(S(entering));
    });
    const S* given = static_cast<const S*>(p.x[5]) + task.first;
    for (int64_t v = 0; v < vectors; ++v) bias[v] = load(given + v * L, count(v));
  }

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
  const T* input(int i, int64_t t, int64_t v) const {
    return static_cast<const T*>(p.x[i]) + place(t, v);
  }
  S* kept(int64_t tile, int64_t v) const {  // of [B, tiles, D, N]
    const int64_t tiles = (p.steps + TILE - 1) / TILE;
    return static_cast<S*>(p.kept) + ((task.row * tiles + tile) * H + task.first + v * L) * N;
  }
  // The tile's rows of an input that all channels read, [TILE][N], as numbers.
  void read_rows(int i, int64_t begin, int64_t end, S* rows) const {
    const T* from = static_cast<const T*>(p.x[i]) + (task.row * p.steps + begin) * N;
    for (int64_t at = 0; at < (end - begin) * N; ++at) rows[at] = number(from + at);
  }

  template <bool WRITE>
  void forward() const {
    std::vector<S> B(TILE * N), C(TILE * N);
    Buffer<Vec<double>> dt_sums(2 * vectors);  // L may be two vectors of fp64
    bool cleared = false;
    for (int64_t begin = 0; begin < p.steps; begin += TILE) {
      const int64_t end = begin + TILE < p.steps ? begin + TILE : p.steps;
      read_rows(2, begin, end, B.data());
      if (WRITE) read_rows(3, begin, end, C.data());
      for (int64_t v = 0; v < vectors; ++v) {
        Sum<V>* h = &state[v * N];
        if (WRITE)
          for (int64_t i = 0; i < count(v); ++i)
            for (int64_t n = 0; n < N; ++n) kept(begin / TILE, v)[i * N + n] = h[n].value[i];
        V dt_sum{};
        for (int64_t t = begin; t < end; ++t) {
          if (reset(t)) {
            for (int64_t n = 0; n < N; ++n) h[n] = Sum<V>{V{}, V{}};
            cleared = true;
          }
          const V dt = softplus(load(input(1, t, v), count(v)) + bias[v]);
          const V u = dt * load(input(0, t, v), count(v));
          const S *b = &B[(t - begin) * N], *c = &C[(t - begin) * N];
          V y{};
          for (int64_t n = 0; n < N; ++n) {
            h[n] = decayed(h[n], decay_of(dt * rate[v * N + n]), V(u * b[n]));
            if (WRITE) y += h[n].value * c[n];
          }
          if (WRITE) store(static_cast<T*>(p.out[0]) + place(t, v), y, count(v));
          dt_sum += dt;
        }
        if (p.span_decay) add_lanes(&dt_sums[2 * v], dt_sum);
      }
    }
    leave(p.span_state ? p.span_state : p.state);
    if (p.span_decay) compose(cleared, dt_sums.at);
  }

  template <bool WRITE>
  void backward() const {
    std::vector<S> B(TILE * N), C(TILE * N);
    Buffer<V> dts(TILE), of_B(TILE * N), of_C(TILE * N), of_rate(N);
    Buffer<V> states((TILE + 1) * N);
    Buffer<Vec<double>> dt_sums(2 * vectors), rates(2 * vectors * N), biases(2 * vectors);
    bool cleared = false;
    for (int64_t begin = (p.steps - 1) / TILE * TILE; begin >= 0; begin -= TILE) {
      const int64_t end = begin + TILE < p.steps ? begin + TILE : p.steps;
      read_rows(2, begin, end, B.data());
      read_rows(3, begin, end, C.data());
      for (int64_t at = 0; at < TILE * N; ++at) of_B[at] = of_C[at] = V{};
      for (int64_t v = 0; v < vectors; ++v) {
        if (WRITE) make_again(begin, end, v, B.data(), states.at, dts.at);
        for (int64_t n = 0; n < N; ++n) of_rate[n] = V{};
        V dt_sum{}, bias_sum{};
        Sum<V>* flow = &state[v * N];
        for (int64_t t = end - 1; t >= begin; --t) {
          const int64_t row = (t - begin) * N;
          const V k = load(input(1, t, v), count(v)) + bias[v];
          const V dt = WRITE ? dts[t - begin] : softplus(k);
          const V x = load(input(0, t, v), count(v)), u = dt * x;
          const V grad = load(static_cast<const T*>(p.grad_y) + place(t, v), count(v));
          const bool clear = reset(t);
          V of_u{}, of_dt{};
          for (int64_t n = 0; n < N; ++n) {
            const Decay<V> d = decay_of(dt * rate[v * N + n]);
            const V given = grad * C[row + n], q = given + flow[n].value;
            if (WRITE) {
              of_C[row + n] += grad * states[row + N + n];
              of_B[row + n] += q * u;
              of_u += q * B[row + n];
              const V of_log = clear ? V{} : V(q * d.a * states[row + n]);  // of dt A
              of_dt -= of_log * rate[v * N + n];
              of_rate[n] += of_log * dt;
            }
            flow[n] = clear ? Sum<V>{V{}, V{}} : flowed(flow[n], d, q, given);
          }
          cleared |= clear;
          dt_sum += dt;
          if (!WRITE) continue;
          const V of_k = (of_dt + of_u * x) * sigmoid(k);
          bias_sum += of_k;
          store(static_cast<T*>(p.out[0]) + place(t, v), V(of_u * dt), count(v));
          store(static_cast<T*>(p.out[1]) + place(t, v), of_k, count(v));
        }
        add_lanes(&dt_sums[2 * v], dt_sum);
        add_lanes(&biases[2 * v], bias_sum);
        for (int64_t n = 0; n < N; ++n) add_lanes(&rates[2 * (v * N + n)], of_rate[n]);
      }
      if (!WRITE) continue;
      const int64_t part = ((task.group * p.batch + task.row) * p.steps + begin) * N;
      for (int64_t at = 0; at < (end - begin) * N; ++at) {
        static_cast<S*>(p.out[2])[part + at] = sum(of_B[at]);
        static_cast<S*>(p.out[3])[part + at] = sum(of_C[at]);
      }
    }
    leave(p.span_state ? p.span_state : p.state);
    if (p.span_decay) compose(cleared, dt_sums.at);
    if (!WRITE) return;
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      static_cast<double*>(p.out[4])[at] = of_lane(&rates[2 * (v * N + n)], i);
      static_cast<double*>(p.out[5])[at / N] = of_lane(&biases[2 * v], i);
    });
  }

  // The states of a tile, from the one that entered: [0] before the first step, [1] after it.
  void make_again(int64_t begin, int64_t end, int64_t v, const S* B, V* states, V* dts) const {
    Buffer<Sum<V>> h(N);
    const S* entered = kept(begin / TILE, v);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t i = 0; i < count(v); ++i) h[n].value[i] = entered[i * N + n];
      states[n] = h[n].value;
    }
    for (int64_t t = begin; t < end; ++t, states += N) {
      const V dt = softplus(load(input(1, t, v), count(v)) + bias[v]);
      const V u = dt * load(input(0, t, v), count(v));
      const S* b = B + (t - begin) * N;
      const bool clear = reset(t);
      dts[t - begin] = dt;
      for (int64_t n = 0; n < N; ++n) {
        if (clear) h[n] = Sum<V>{V{}, V{}};
        h[n] = decayed(h[n], decay_of(dt * rate[v * N + n]), V(u * b[n]));
        states[N + n] = h[n].value;
      }
    }
  }

  // Sums over all steps go on in fp64, tile by tile.
  static void add_lanes(Vec<double>* total, V x) {
    for (int64_t i = 0; i < L; ++i) total[i / LANES<double>][i % LANES<double>] += x[i];
  }
  static double of_lane(const Vec<double>* total, int64_t i) {
    return total[i / LANES<double>][i % LANES<double>];
  }

  void leave(double* to) const {
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      const Sum<V>& h = state[v * N + n];
      to[at] = double(h.value[i]) + h.rest[i];
    });
  }

  // All steps' decays as one: exp(A sum dt).
  void compose(bool cleared, const Vec<double>* dt_sums) const {
    each([&](int64_t at, int64_t v, int64_t n, int64_t i) {
      const double log = -double(rate[v * N + n][i]) * of_lane(dt_sums + 2 * v, i);
      p.span_decay[at] = cleared ? 0 : std::exp(log);
    });
  }
};

}  // namespace

LONGHAUL_STATES(Mamba)
