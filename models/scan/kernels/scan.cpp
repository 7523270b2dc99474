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

#include <cstdint>
#include <cstring>
#include <utility>

#include "threads.h"
#include "vectors.h"

#include GATES_HEADER

namespace {

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
        const Sum<V> flow = passed.sum(c);
        const V given = load(o + c, count);
        passed.keep(c, flowed(flow, d, V(given + flow.value), given));
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
        passed.keep(c, flowed(flow, d, q, given));
      });
      if (cleared) passed.clear(tile.width);
    }
  }
};

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
