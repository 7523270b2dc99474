// The scan on a CPU, at the speed of memory: time is the outer loop, a block of channels the inner
// one, their states stay in L1, and gates are computed on the way. Every input is read once and
// every output written once. Plain C++ behind a C interface (native.py loads it), so that it builds
// in seconds without torch's headers. README.md beside this file has the mathematics.

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "native_gates.h"

namespace {

constexpr int64_t BLOCK = 512;      // channels at a time: their states fit L1 many times
constexpr int64_t NEAR = 2048;      // bytes to fetch ahead within a thread's own stream
constexpr int64_t PIECE = 512;      // bytes of a row that a thread wants for itself: see `run`
constexpr int64_t TILE = 1 << 15;   // elements of [steps, channels] in a tile: L2 holds two of each
constexpr int64_t SHARES = 2;       // groups of channels per thread: slack in the wait for a tile

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

// Steps [begin, end) of channels [first, first + width) of one row of the batch. While it is read,
// what comes later is fetched. With DISTANT false, into L1, the same channels `ahead` steps on.
// With DISTANT true, into L2, a part of this thread's next tile: all channels of a few steps, which
// begin `next` elements on, because memory is fastest in whole rows.
template <bool DISTANT>
struct Tile {
  static constexpr bool distant = DISTANT;
  int64_t row, begin, end, first, width, ahead, next;

  static inline void fetch(const void* p) { __builtin_prefetch(p, 0, DISTANT ? 2 : 3); }
  static inline void fetch_to_write(void* p) {
    if (DISTANT) __builtin_prefetch(p, 1, 2);  // the hardware does it for a thread's own stream
  }
};

// Run body(channel, count of lanes) over n channels, a vector at a time.
template <class S, class Body>
inline void for_lanes(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + LANES<S> <= n; c += LANES<S>) body(c, std::integral_constant<int64_t, LANES<S>>());
  if (c < n) body(c, n - c);
}

// The four kernels over one tile. `state` and `decay` enter as the tile's neighbour left them.
template <class R, class T, class S>
struct Scan {
  static constexpr int64_t P = R::PARTS;
  const Arguments& p;

  bool reset(int64_t row, int64_t t) const { return p.reset && p.reset[row * p.steps + t]; }

  // WRITE: write h of every step. Otherwise compose the steps' maps onto (decay, state).
  template <bool WRITE, class AnyTile>
  void forward(const AnyTile& tile, S* state, S* decay) const {
    const int64_t H = p.width, start = tile.row * p.steps + tile.begin;
    const T* x = static_cast<const T*>(p.x) + start * P * H + tile.first;
    const T* y = static_cast<const T*>(p.y) + (P == 1 ? start * H + tile.first : 0);
    T* out = static_cast<T*>(p.out) + (WRITE ? start * H + tile.first : 0);
    int64_t ahead = AnyTile::distant ? tile.next - tile.first / P : tile.ahead * H;
    const int64_t W = AnyTile::distant ? tile.width : H;  // channels fetched per step
    for (int64_t t = tile.begin; t < tile.end; ++t, x += P * H, y += H, out += H, ahead += W - H) {
      if (reset(tile.row, t))
        for (int64_t c = 0; c < tile.width; ++c) state[c] = decay[c] = S(0);
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        for (int i = 0; i < P; ++i) tile.fetch(x + c + i * W + P * ahead);
        Gates<Vec<S>> gates;
        if constexpr (P == 1) {
          tile.fetch(y + c + ahead);
          gates = {load(x + c, count), load(y + c, count)};
        } else {
          gates = R::gates(load(x + c, count), load(x + c + H, count),
                           load(x + c + (P - 1) * H, count));
        }
        const Vec<S> h = gates.a * load(state + c) + gates.b;
        store(state + c, h);
        if constexpr (WRITE) {
          tile.fetch_to_write(out + c + ahead);
          store(out + c, h, count);
        } else {
          store(decay + c, Vec<S>(gates.a * load(decay + c)));
        }
      });
    }
  }

  // The maps of the gradient that flows from right to left, composed: G -> decay * G + state.
  template <class AnyTile>
  void summarize_backward(const AnyTile& tile, S* state, S* decay) const {
    const int64_t H = p.width, ahead = tile.ahead * H, end = tile.row * p.steps + tile.end;
    const T* x = static_cast<const T*>(p.x) + end * P * H + tile.first;
    const T* o = static_cast<const T*>(p.grad_h) + end * H + tile.first;
    for (int64_t t = tile.end - 1; t >= tile.begin; --t) {
      x -= P * H;
      o -= H;
      if (reset(tile.row, t)) {
        for (int64_t c = 0; c < tile.width; ++c) state[c] = decay[c] = S(0);
        continue;
      }
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        tile.fetch(o + c - ahead);
        tile.fetch(x + c - P * ahead);
        if (P == 3) tile.fetch(x + c + H - P * ahead);
        Vec<S> a = load(x + c, count);
        if constexpr (P > 1) a = R::decay(a, P == 2 ? a : load(x + c + H, count));
        store(state + c, Vec<S>(a * (load(o + c, count) + load(state + c))));
        store(decay + c, Vec<S>(a * load(decay + c)));
      });
    }
  }

  // Write the gradients of the inputs; `state` is G, the gradient that flows from right to left.
  template <class AnyTile>
  void backward(const AnyTile& tile, S* state) const {
    const int64_t H = p.width, end = tile.row * p.steps + tile.end;
    const T* x = static_cast<const T*>(p.x) + end * P * H + tile.first;
    const T* o = static_cast<const T*>(p.grad_h) + end * H + tile.first;
    const T* h = static_cast<const T*>(p.h) + end * H + tile.first;
    T* dx = static_cast<T*>(p.out) + end * P * H + tile.first;
    T* dy = static_cast<T*>(p.out_y) + (P == 1 ? end * H + tile.first : 0);
    const S* h_in = static_cast<const S*>(p.h_in) + tile.row * H + tile.first;
    int64_t ahead = AnyTile::distant ? tile.next + tile.first / P : tile.ahead * H;
    const int64_t W = AnyTile::distant ? tile.width : H;  // channels fetched per step
    for (int64_t t = tile.end - 1; t >= tile.begin; --t, ahead += W - H) {
      x -= P * H;
      dx -= P * H;
      o -= H;
      h -= H;
      dy -= H;
      const bool cleared = reset(tile.row, t);
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        tile.fetch(o + c - ahead);
        tile.fetch(h + c - ahead - H);
        for (int i = 0; i < P; ++i) tile.fetch(x + c + i * W - P * ahead);
        const Vec<S> q = load(o + c, count) + load(state + c);
        Vec<S> previous{}, a;  // previous: the state before the step
        if (!cleared) previous = t > 0 ? load(h + c - H, count) : load(h_in + c, count);
        if constexpr (P == 1) {
          a = load(x + c, count);
          tile.fetch_to_write(dx + c - ahead);
          tile.fetch_to_write(dy + c - ahead);
          store(dx + c, Vec<S>(q * previous), count);
          store(dy + c, q, count);
        } else {
          Vec<S> d0, d1, d2;
          a = R::backward(q, previous, load(x + c, count), load(x + c + H, count),
                          load(x + c + (P - 1) * H, count), &d0, &d1, &d2);
          for (int i = 0; i < P; ++i) tile.fetch_to_write(dx + c + i * W - P * ahead);
          store(dx + c, d0, count);
          store(dx + c + H, d1, count);
          if constexpr (P == 3) store(dx + c + 2 * H, d2, count);
        }
        store(state + c, Vec<S>(a * q));
      });
      if (cleared)
        for (int64_t c = 0; c < tile.width; ++c) state[c] = S(0);
    }
  }
};

template <class S>
struct alignas(64) Aligned {
  S channels[16];
};

// Run body(tile, state, decay) over all steps of all channels of all rows.
//
// With a row of the batch for every thread, or long pieces of each step's channels, a thread runs
// its own from end to end. Otherwise threads would share memory in short pieces, and the hardware
// fetch for each of them what another one needs. So time is cut into tiles, dealt to the threads in
// turn, and channels into groups: a thread runs its tile group by group, each as soon as the tile
// before has left that group's state. Nothing is computed or read twice.
template <class S, class Body>
void run(const Arguments& p, int64_t element_bytes, bool backwards, Body body) {
  const int64_t H = p.width, row_bytes = H * element_bytes;
  const auto enter = [&](int64_t row, int64_t first, int64_t width, S* state, S* decay) {
    const S* entering = static_cast<const S*>(p.state_in);
    for (int64_t c = 0; c < width; ++c) {
      state[c] = entering ? entering[row * H + first + c] : S(0);
      decay[c] = S(1);
    }
  };
  const auto leave = [&](int64_t row, int64_t first, int64_t width, S* state, S* decay) {
    std::memcpy(static_cast<S*>(p.state) + row * H + first, state, width * sizeof(S));
    if (p.decay) std::memcpy(static_cast<S*>(p.decay) + row * H + first, decay, width * sizeof(S));
  };
  // Groups of whole vectors, as equal as can be, of which the last may be narrower.
  const auto group_width = [&](int64_t n) { return ((H + n - 1) / n + 15) / 16 * 16; };
  const auto narrower = [](int64_t a, int64_t b) { return a < b ? a : b; };

  const int64_t length = TILE / H + 1, tiles = (p.steps + length - 1) / length;
  const bool narrow = H < 16 * p.threads;  // fewer groups of whole vectors than threads
  if (p.batch >= p.threads || row_bytes / p.threads >= PIECE || narrow || tiles < 2 * p.threads) {
    int64_t groups = (H + BLOCK - 1) / BLOCK;
    while (p.batch * groups < p.threads && H / (groups + 1) >= 16) ++groups;
    const int64_t width = group_width(groups);
    groups = (H + width - 1) / width;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.threads > 1)
    for (int64_t task = 0; task < p.batch * groups; ++task) {
      const int64_t row = task / groups, first = task % groups * width;
      const int64_t own = narrower(width, H - first);
      alignas(64) S state[BLOCK], decay[BLOCK];
      enter(row, first, own, state, decay);
      const Tile<false> tile{row, 0, p.steps, first, own, NEAR / row_bytes + 1, 0};
      body(tile, state, decay);
      leave(row, first, own, state, decay);
    }
    return;
  }

  const int64_t width = group_width(SHARES * p.threads), groups = (H + width - 1) / width;
  struct alignas(64) Progress {  // alone on its cache line
    std::atomic<int64_t> tiles{0};  // of all rows, in the order of the scan
  };
  std::vector<Progress> progress(groups);
  std::vector<Aligned<S>> states(groups * width / 16), decays(groups * width / 16);
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t threads = omp_get_num_threads();
    for (int64_t n = omp_get_thread_num(); n < p.batch * tiles; n += threads) {
      const int64_t row = n / tiles, i = backwards ? tiles - 1 - n % tiles : n % tiles;
      const int64_t begin = i * length, end = narrower(begin + length, p.steps);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * width, own = narrower(width, H - first);
        S *state = states.front().channels + first, *decay = decays.front().channels + first;
        unsigned spins = 0;
        while (progress[g].tiles.load(std::memory_order_acquire) != n)
          if (++spins % 1024 == 0) sched_yield();  // there may be more threads than processors
        if (n % tiles == 0) enter(row, first, own, state, decay);
        const int64_t ahead = threads * length, next = (ahead + g * (length / groups)) * H;
        const Tile<true> tile{row, begin, end, first, own, ahead, next};
        body(tile, state, decay);
        if (n % tiles == tiles - 1) leave(row, first, own, state, decay);
        progress[g].tiles.store(n + 1, std::memory_order_release);
      }
    }
  }
}

enum Kernel { FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD };

template <class R, class T, class S>
void run_kernel(int kernel, const Arguments& p) {
  const Scan<R, T, S> scan{p};
  const auto start = [&](bool backwards, auto body) { run<S>(p, sizeof(T), backwards, body); };
  switch (kernel) {
    case FORWARD:
      return start(false, [&](auto& tile, S* h, S* A) { scan.template forward<true>(tile, h, A); });
    case SUMMARIZE:
      return start(false,
                   [&](auto& tile, S* h, S* A) { scan.template forward<false>(tile, h, A); });
    case BACKWARD:
      return start(true, [&](auto& tile, S* G, S*) { scan.backward(tile, G); });
    case SUMMARIZE_BACKWARD:
      return start(true, [&](auto& tile, S* G, S* A) { scan.summarize_backward(tile, G, A); });
  }
}

template <class R>
void run_dtype(int kernel, int dtype, const Arguments& p) {
  switch (dtype) {
    case 0: return run_kernel<R, float, float>(kernel, p);
    case 1: return run_kernel<R, bf16, float>(kernel, p);
    case 2: return run_kernel<R, double, double>(kernel, p);
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
