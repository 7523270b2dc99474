// The scan on a CPU, at the speed of memory: time is the outer loop, a block of channels the inner
// one, their states stay in L1, and gates are computed on the way. Every input is read once and
// every output written once; for the map of all steps only what counts is read. Plain C++ behind a
// C interface (../native.py builds and loads it), so that it builds in seconds without torch's
// headers. ../README.md has the mathematics.
//
// The gates are a type R of a header of their own (../recurrences), both named by the compiler's
// command line: -DGATES_HEADER and -DGATES. The state is a row of channels, and is the output. With
// the vectors of vectors.h R says
//   TENSORS, PARTS        its inputs, and the values of a channel in each, [B, T, PARTS * H]
//   DECAY_READS           how many of the values, the first ones, the decay is made of
//   BACKWARD_READS        how many the backward is made of
//   FORGETS               whether no decay is above one: what is forgotten does not come back
//   decay(x), gates(x)    Decay (a and 1 - a), and Step (b with them) of h = a * h + b
//   backward(q, previous, x, d)    Decay, and d, the gradients of the values, from the gradient q of
//                                  h and the state before the step, 0 after a reset

#include <cstdint>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "threads.h"
#include "vectors.h"

#include GATES_HEADER

namespace {

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

// Both scans over one tile, where what is `passed` enters as the tile's neighbour left it; and the
// maps of some steps of a vector of channels.
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
  // Steps of a map that is composed with others: fewer where decays above one could overflow.
  static constexpr int64_t MAPPED = R::FORGETS ? 64 : 16;
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

  // Write h of every step.
  template <class AnyTile>
  void forward(const AnyTile& tile, Passed<S> passed) const {
    const int64_t H = p.width, start = tile.row * p.steps + tile.begin;
    In x = In::at(p.x, start, H, tile.first, TENSORS);
    T* out = static_cast<T*>(p.out[0]) + start * H + tile.first;
    int64_t ahead = AnyTile::distant ? tile.next - tile.first / P : tile.ahead * H;
    const int64_t W = AnyTile::distant ? tile.width : H;  // channels fetched per step
    for (int64_t t = tile.begin; t < tile.end; ++t, x.advance(P * H, TENSORS), out += H, ahead += W - H) {
      if (reset(tile.row, t)) passed.clear(tile.width);
      for_lanes<S>(tile.width, [&](int64_t c, auto count) {
        fetch(tile, x, c, W, ahead, ALL);
        const Step<V> step = R::gates(read(x, c, H, count, ALL));
        const Sum<V> h = decayed(passed.sum(c), {step.a, step.c}, step.b);
        passed.keep(c, h);
        tile.fetch_to_write(out + c + ahead);
        store(out + c, h.value, count);
      });
    }
  }

  static INLINE Map<V> entered_by(V decay) { return {{decay, V{}}, {V{}, V{}}}; }
  // A map's decay is the state of one who entered with 1 and is given nothing.
  static INLINE Sum<V> decayed_by(Decay<V> d, Sum<V> decay) { return decayed(decay, d, V{}); }

  // The map of steps [begin, end) of a vector of channels, h -> decay * h + given.
  template <class Count>
  INLINE Map<V> map(int64_t row, int64_t begin, int64_t end, int64_t channel, Count count) const {
    const int64_t H = p.width;
    In x = In::at(p.x, row * p.steps + begin, H, channel, TENSORS);
    Map<V> map = entered_by(V{} + 1);
    for (int64_t t = begin; t < end; ++t, x.advance(P * H, TENSORS)) {
      if (reset(row, t)) map = entered_by(V{});
      fetch(NextPiece(), x, 0, H, -MAPPED * H, ALL);
      const Step<V> step = R::gates(read(x, 0, H, count, ALL));
      const Decay<V> d = {step.a, step.c};
      map.decay = decayed_by(d, map.decay);
      map.given = decayed(map.given, d, step.b);
    }
    return map;
  }

  // The same of the gradient that flows from right to left, G -> decay * G + given.
  template <class Count>
  INLINE Map<V> map_backward(int64_t row, int64_t begin, int64_t end, int64_t channel,
                             Count count) const {
    const int64_t H = p.width, last = row * p.steps + end;
    In x = In::at(p.x, last, H, channel, TENSORS);
    const T* o = static_cast<const T*>(p.grad_h) + last * H + channel;
    Map<V> map = entered_by(V{} + 1);
    for (int64_t t = end - 1; t >= begin; --t) {
      x.advance(-P * H, TENSORS);
      o -= H;
      if (reset(row, t)) {
        map = entered_by(V{});
        continue;
      }
      NextPiece::fetch(o + MAPPED * H);
      fetch(NextPiece(), x, 0, H, MAPPED * H, DECAY);
      const Decay<V> d = R::decay(read(x, 0, H, count, DECAY));
      const V given = load(o, count);
      map.decay = decayed_by(d, map.decay);
      map.given = flowed(map.given, d, V(given + map.given.value), given);
    }
    return map;
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
  const double least = R::FORGETS ? std::ldexp(std::numeric_limits<S>::epsilon(), -40) : 0;
  switch (kernel) {
    case FORWARD:
      return start(false, [&](auto& tile, auto h) { scan.forward(tile, h); });
    case SUMMARIZE:
      return compose<S>(p, false, scan.MAPPED, least, [&](auto... of) { return scan.map(of...); });
    case BACKWARD:
      return start(true, [&](auto& tile, auto flow) { scan.backward(tile, flow); });
    case SUMMARIZE_BACKWARD:
      return compose<S>(p, true, scan.MAPPED, least, [&](auto... of) { return scan.map_backward(of...); });
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
