// The scan on a CPU, at the speed of memory: time is the outer loop, a block of channels the inner
// one, their states stay in L1, and gates are computed on the way. Every input is read once and
// every output written once. Plain C++ behind a C interface (../native.py builds and loads it), so
// that it builds in seconds without torch's headers. ../README.md has the mathematics.
//
// The gates are a type R of a header of their own (../recurrences), both named by the compiler's
// command line: -DGATES_HEADER and -DGATES. The state is a row of channels, and is the output. With
// the vectors of vectors.h R says
//   TENSORS, PARTS        its inputs, and the values of a channel in each, [B, T, PARTS * H]
//   DECAY_READS           how many of the values, the first ones, the decay is made of
//   BACKWARD_READS        how many the backward is made of
//   decay(x), gates(x)    Decay (a and 1 - a), and Step (b with them) of h = a * h + b
//   backward(q, previous, x, d)    Decay, and d, the gradients of the values, from the gradient q of
//                                  h and the state before the step, 0 after a reset

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "vectors.h"

#include GATES_HEADER

namespace {

constexpr int64_t BLOCK = 512;      // channels at a time: their states fit L1 many times
constexpr int64_t NEAR = 2048;      // bytes to fetch ahead within a thread's own stream
constexpr int64_t PIECE = 512;      // bytes of a row that a thread wants for itself: see `run`
constexpr int64_t TILE = 1 << 15;   // elements of [steps, channels] in a tile: L2 holds two of each
constexpr int64_t SHARES = 2;       // groups of channels per thread: slack in the wait for a tile

constexpr int MOST = 4;  // inputs, and values of a channel

// What every kernel gets. Pointers that a kernel does not use are null.
struct Arguments {
  int64_t batch, steps, width;
  const void* x[MOST];   // the inputs
  void* out[MOST];       // their gradients; or h alone
  const uint8_t* reset;  // [B, T]
  const void* h;         // [B, T, H], the forward's output
  const void* grad_h;    // [B, T, H]
  const void* state_in;  // [B, H]: h_in, or the gradient of h_last
  const void* h_in;      // [B, H]
  void* state;           // [B, H]: h_last, or the gradient of h_in
  double *span_decay, *span_state;  // [B, H]: all steps as one map
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

  static INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, DISTANT ? 2 : 3); }
  static INLINE void fetch_to_write(void* p) {
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

template <int N>
using First = std::make_integer_sequence<int, N>;  // 0 .. N - 1, each a constant to the compiler
template <int... I>
using Numbers = std::integer_sequence<int, I...>;

// A channel's place in a row of every input: value i is part i % PARTS of input i / PARTS. Passed by
// value and unrolled by folds, or values would go through memory.
template <class R, class Pointer>
struct Rows {
  static constexpr int P = R::PARTS;
  Pointer of[R::TENSORS];

  template <class Given, int... I>
  static INLINE Rows at(Given* const* given, int64_t step, int64_t H, int64_t first, Numbers<I...>) {
    return {{static_cast<Pointer>(given[I]) + step * P * H + first...}};
  }
  template <int... I>
  INLINE void advance(int64_t elements, Numbers<I...>) {
    ((of[I] += elements), ...);
  }
  INLINE Pointer value(int i, int64_t channel, int64_t H) const {
    return of[i / P] + channel + (i % P) * H;
  }
};

// What a tile leaves to the next, of some channels: a state or a gradient's flow, and the decay of
// all steps so far, each with what rounding has left of it.
template <class S>
struct Passed {
  S *state, *state_rest, *decay, *decay_rest;

  INLINE Sum<Vec<S>> sum(int64_t c) const { return {load(state + c), load(state_rest + c)}; }
  INLINE void keep(int64_t c, Sum<Vec<S>> sum) const {
    store(state + c, sum.value);
    store(state_rest + c, sum.rest);
  }
  // The decay is the state of one who entered with 1 and is given nothing.
  INLINE void decay_by(int64_t c, Decay<Vec<S>> d) const {
    const Sum<Vec<S>> sum = decayed({load(decay + c), load(decay_rest + c)}, d, Vec<S>{});
    store(decay + c, sum.value);
    store(decay_rest + c, sum.rest);
  }
  void clear(int64_t width) const {
    for (S* each : {state, state_rest, decay, decay_rest}) std::fill(each, each + width, S(0));
  }
};

// The four kernels over one tile. What is `passed` enters as the tile's neighbour left it.
template <class R, class T, class S>
struct Scan {
  static constexpr int P = R::PARTS, VALUES = R::TENSORS * R::PARTS;
  static_assert(VALUES <= MOST, "more inputs or values than the loops know");
  static_assert(R::DECAY_READS <= P, "the decay reads the first input alone");
  static_assert(R::TENSORS == TENSORS_GIVEN && P == PARTS_GIVEN,
                "TENSORS and PARTS differ from the recurrence's tensors and parts");
  using In = Rows<R, const T*>;
  using Out = Rows<R, T*>;
  using V = Vec<S>;
  static constexpr First<R::TENSORS> TENSORS{};
  static constexpr First<VALUES> ALL{};
  static constexpr First<R::DECAY_READS> DECAY{};
  static constexpr First<R::BACKWARD_READS> BACKWARD{};
  const Arguments& p;

  template <class Count, int... I>
  static INLINE Values<V> read(In x, int64_t c, int64_t H, Count count, Numbers<I...>) {
    return {{load(x.value(I, c, H), count)...}};
  }
  template <class Count, int... I>
  static INLINE void write(Out x, int64_t c, int64_t H, const Values<V>& d, Count count,
                           Numbers<I...>) {
    (store(x.value(I, c, H), d[I], count), ...);
  }
  // what a step `ahead` elements of a value on will read, or write
  template <class AnyTile, int... I>
  static INLINE void fetch(const AnyTile& tile, In x, int64_t c, int64_t W, int64_t ahead,
                           Numbers<I...>) {
    (tile.fetch(x.value(I, c, W) + P * ahead), ...);
  }
  template <class AnyTile, int... I>
  static INLINE void fetch_to_write(const AnyTile& tile, Out x, int64_t c, int64_t W,
                                    int64_t ahead, Numbers<I...>) {
    (tile.fetch_to_write(x.value(I, c, W) + P * ahead), ...);
  }

  bool reset(int64_t row, int64_t t) const { return p.reset && p.reset[row * p.steps + t]; }

  // WRITE: write h of every step. Otherwise compose the steps' maps onto (decay, state).
  template <bool WRITE, class AnyTile>
  void forward(const AnyTile& tile, Passed<S> passed) const {
    const int64_t H = p.width, start = tile.row * p.steps + tile.begin;
    In x = In::at(p.x, start, H, tile.first, TENSORS);
    T* out = static_cast<T*>(p.out[0]) + (WRITE ? start * H + tile.first : 0);
    int64_t ahead = AnyTile::distant ? tile.next - tile.first / P : tile.ahead * H;
    const int64_t W = AnyTile::distant ? tile.width : H;  // channels fetched per step
    for (int64_t t = tile.begin; t < tile.end; ++t, x.advance(P * H, TENSORS), out += H, ahead += W - H) {
      if (reset(tile.row, t)) passed.clear(tile.width);
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        fetch(tile, x, c, W, ahead, ALL);
        const Step<V> step = R::gates(read(x, c, H, count, ALL));
        const Decay<V> d = {step.a, step.c};
        const Sum<V> h = decayed(passed.sum(c), d, step.b);
        passed.keep(c, h);
        if constexpr (WRITE) {
          tile.fetch_to_write(out + c + ahead);
          store(out + c, h.value, count);
        } else {
          passed.decay_by(c, d);
        }
      });
    }
  }

  // The maps of the gradient that flows from right to left, composed: G -> decay * G + state.
  template <class AnyTile>
  void summarize_backward(const AnyTile& tile, Passed<S> passed) const {
    const int64_t H = p.width, ahead = tile.ahead * H, end = tile.row * p.steps + tile.end;
    In x = In::at(p.x, end, H, tile.first, TENSORS);
    const T* o = static_cast<const T*>(p.grad_h) + end * H + tile.first;
    for (int64_t t = tile.end - 1; t >= tile.begin; --t) {
      x.advance(-P * H, TENSORS);
      o -= H;
      if (reset(tile.row, t)) {
        passed.clear(tile.width);
        continue;
      }
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        tile.fetch(o + c - ahead);
        fetch(tile, x, c, H, -ahead, DECAY);
        const Decay<V> d = R::decay(read(x, c, H, count, DECAY));
        passed.keep(c, decayed(passed.sum(c), d, V(d.a * load(o + c, count))));
        passed.decay_by(c, d);
      });
    }
  }

  // Write the gradients of the inputs; The state is G, the gradient that flows from right to left.
  template <class AnyTile>
  void backward(const AnyTile& tile, Passed<S> passed) const {
    const int64_t H = p.width, end = tile.row * p.steps + tile.end;
    In x = In::at(p.x, end, H, tile.first, TENSORS);
    Out dx = Out::at(p.out, end, H, tile.first, TENSORS);
    const T* o = static_cast<const T*>(p.grad_h) + end * H + tile.first;
    const T* h = static_cast<const T*>(p.h) + end * H + tile.first;
    const S* h_in = static_cast<const S*>(p.h_in) + tile.row * H + tile.first;
    int64_t ahead = AnyTile::distant ? tile.next + tile.first / P : tile.ahead * H;
    const int64_t W = AnyTile::distant ? tile.width : H;  // channels fetched per step
    for (int64_t t = tile.end - 1; t >= tile.begin; --t, ahead += W - H) {
      x.advance(-P * H, TENSORS);
      dx.advance(-P * H, TENSORS);
      o -= H;
      h -= H;
      const bool cleared = reset(tile.row, t);
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        tile.fetch(o + c - ahead);
        tile.fetch(h + c - ahead - H);
        fetch(tile, x, c, W, -ahead, BACKWARD);
        const Sum<V> flow = passed.sum(c);
        const V given = load(o + c, count), q = given + flow.value;
        V previous{};  // the state before the step
        if (!cleared) previous = t > 0 ? load(h + c - H, count) : load(h_in + c, count);
        Values<V> gradients;
        const Decay<V> d = R::backward(q, previous, read(x, c, H, count, BACKWARD), &gradients);
        fetch_to_write(tile, dx, c, W, -ahead, ALL);
        write(dx, c, H, gradients, count, ALL);
        passed.keep(c, decayed(flow, d, V(d.a * given)));
      });
      if (cleared) passed.clear(tile.width);
    }
  }
};

template <class S>
struct alignas(64) Aligned {
  S channels[16];
};

// Run body(tile, passed) over all steps of all channels of all rows.
//
// With a row of the batch for every thread, or long pieces of each step's channels, a thread runs
// its own from end to end. Otherwise threads would share memory in short pieces, and the hardware
// fetch for each of them what another one needs. So time is cut into tiles, dealt to the threads in
// turn, and channels into groups: a thread runs its tile group by group, each as soon as the tile
// before has left that group's state. Nothing is computed or read twice.
template <class S, class Body>
void run(const Arguments& p, int64_t element_bytes, bool backwards, Body body) {
  const int64_t H = p.width, row_bytes = H * element_bytes;
  const auto enter = [&](int64_t row, int64_t first, int64_t width, Passed<S> passed) {
    const S* entering = static_cast<const S*>(p.state_in);
    passed.clear(width);
    std::fill(passed.decay, passed.decay + width, S(1));
    if (entering) std::memcpy(passed.state, entering + row * H + first, width * sizeof(S));
  };
  const auto leave = [&](int64_t row, int64_t first, int64_t width, Passed<S> passed) {
    const int64_t at = row * H + first;
    if (p.state) std::memcpy(static_cast<S*>(p.state) + at, passed.state, width * sizeof(S));
    for (int64_t c = 0; c < (p.span_decay ? width : 0); ++c) {
      p.span_decay[at + c] = double(passed.decay[c]) + passed.decay_rest[c];
      p.span_state[at + c] = double(passed.state[c]) + passed.state_rest[c];
    }
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
      alignas(64) S here[4][BLOCK];
      const Passed<S> passed{here[0], here[1], here[2], here[3]};
      enter(row, first, own, passed);
      const Tile<false> tile{row, 0, p.steps, first, own, NEAR / row_bytes + 1, 0};
      body(tile, passed);
      leave(row, first, own, passed);
    }
    return;
  }

  const int64_t width = group_width(SHARES * p.threads), groups = (H + width - 1) / width;
  struct alignas(64) Progress {  // alone on its cache line
    std::atomic<int64_t> tiles{0};  // of all rows, in the order of the scan
  };
  std::vector<Progress> progress(groups);
  std::vector<Aligned<S>> here(4 * groups * width / 16);
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t threads = omp_get_num_threads();
    for (int64_t n = omp_get_thread_num(); n < p.batch * tiles; n += threads) {
      const int64_t row = n / tiles, i = backwards ? tiles - 1 - n % tiles : n % tiles;
      const int64_t begin = i * length, end = narrower(begin + length, p.steps);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * width, own = narrower(width, H - first);
        S* own_here = here.front().channels + 4 * first;
        const Passed<S> passed{own_here, own_here + width, own_here + 2 * width, own_here + 3 * width};
        unsigned spins = 0;
        while (progress[g].tiles.load(std::memory_order_acquire) != n)
          if (++spins % 1024 == 0) sched_yield();  // there may be more threads than processors
        if (n % tiles == 0) enter(row, first, own, passed);
        const int64_t ahead = threads * length, next = (ahead + g * (length / groups)) * H;
        const Tile<true> tile{row, begin, end, first, own, ahead, next};
        body(tile, passed);
        if (n % tiles == tiles - 1) leave(row, first, own, passed);
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
      return start(false, [&](auto& tile, auto h) { scan.template forward<true>(tile, h); });
    case SUMMARIZE:
      return start(false, [&](auto& tile, auto map) { scan.template forward<false>(tile, map); });
    case BACKWARD:
      return start(true, [&](auto& tile, auto flow) { scan.backward(tile, flow); });
    case SUMMARIZE_BACKWARD:
      return start(true, [&](auto& tile, auto map) { scan.summarize_backward(tile, map); });
  }
}

}  // namespace

// kernel: enum Kernel. dtype: 0 fp32, 1 bf16, 2 fp64.
extern "C" void longhaul_scan(int kernel, int dtype, const Arguments* arguments) {
  switch (dtype) {
    case 0: return run_kernel<GATES, float, float>(kernel, *arguments);
    case 1: return run_kernel<GATES, bf16, float>(kernel, *arguments);
    case 2: return run_kernel<GATES, double, double>(kernel, *arguments);
  }
}
