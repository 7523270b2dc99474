// How steps and channels are dealt to threads, and what one stretch of steps passes to the next.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

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

// What a tile leaves to the next, of some channels: a state or a gradient's flow, with what rounding
// has left of it.
template <class S>
struct Passed {
  S *state, *state_rest;

  INLINE Sum<Vec<S>> sum(int64_t c) const { return {load(state + c), load(state_rest + c)}; }
  INLINE void keep(int64_t c, Sum<Vec<S>> sum) const {
    store(state + c, sum.value);
    store(state_rest + c, sum.rest);
  }
  void clear(int64_t width) const {
    for (S* each : {state, state_rest}) std::fill(each, each + width, S(0));
  }
};

// Channels in groups of whole vectors, as equal as can be, of which the last may be narrower.
struct Groups {
  int64_t count, width;

  static Groups of(int64_t channels, int64_t wanted) {
    const int64_t width = ((channels + wanted - 1) / wanted + 15) / 16 * 16;
    return {(channels + width - 1) / width, width};
  }
  // At most BLOCK channels each, and enough of them that no thread is without.
  static Groups for_threads(const Arguments& p) {
    int64_t count = (p.width + BLOCK - 1) / BLOCK;
    while (p.batch * count < p.threads && p.width / (count + 1) >= 16) ++count;
    return of(p.width, count);
  }
};

template <class S>
struct alignas(64) Aligned {
  S channels[16];
};

// Run body(channel, count of lanes) over n channels, a vector at a time.
template <class S, class Body>
inline void for_lanes(int64_t n, Body body) {
  int64_t c = 0;
  for (; c + LANES<S> <= n; c += LANES<S>) body(c, std::integral_constant<int64_t, LANES<S>>());
  if (c < n) body(c, n - c);
}

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
    if (entering) std::memcpy(passed.state, entering + row * H + first, width * sizeof(S));
  };
  const auto leave = [&](int64_t row, int64_t first, int64_t width, Passed<S> passed) {
    std::memcpy(static_cast<S*>(p.state) + row * H + first, passed.state, width * sizeof(S));
  };
  const auto narrower = [](int64_t a, int64_t b) { return a < b ? a : b; };

  const int64_t length = TILE / H + 1, tiles = (p.steps + length - 1) / length;
  const bool narrow = H < 16 * p.threads;  // fewer groups of whole vectors than threads
  if (p.batch >= p.threads || row_bytes / p.threads >= PIECE || narrow || tiles < 2 * p.threads) {
    const auto [groups, width] = Groups::for_threads(p);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.threads > 1)
    for (int64_t task = 0; task < p.batch * groups; ++task) {
      const int64_t row = task / groups, first = task % groups * width;
      const int64_t own = narrower(width, H - first);
      alignas(64) S here[2][BLOCK];
      const Passed<S> passed{here[0], here[1]};
      enter(row, first, own, passed);
      const Tile<false> tile{row, 0, p.steps, first, own, NEAR / row_bytes + 1, 0};
      body(tile, passed);
      leave(row, first, own, passed);
    }
    return;
  }

  const auto [groups, width] = Groups::of(H, SHARES * p.threads);
  struct alignas(64) Progress {  // alone on its cache line
    std::atomic<int64_t> tiles{0};  // of all rows, in the order of the scan
  };
  std::vector<Progress> progress(groups);
  std::vector<Aligned<S>> here(2 * groups * width / 16);
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t threads = omp_get_num_threads();
    for (int64_t n = omp_get_thread_num(); n < p.batch * tiles; n += threads) {
      const int64_t row = n / tiles, i = backwards ? tiles - 1 - n % tiles : n % tiles;
      const int64_t begin = i * length, end = narrower(begin + length, p.steps);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * width, own = narrower(width, H - first);
        S* own_here = here.front().channels + 2 * first;
        const Passed<S> passed{own_here, own_here + width};
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

// What a map's piece fetches: the same step of the next one asked.
struct NextPiece {
  static INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
};

// The map of some steps of a vector of channels: state -> decay * state + given.
template <class V>
struct Map {
  Sum<V> decay, given;
};

// Compose the maps of pieces of so many steps to that of all, p.span_decay and p.span_state.
//
// The piece that comes last is asked first: piece(row, begin, end, channel, lanes) is its Map. What
// comes before enters through its decay and those of all pieces asked so far; where of a state no
// more than `least` of it would get through, nothing earlier is read. Gates forget, so that of a long
// shard it is mostly the end that counts. Last is last in the scan: where that goes backwards, it is
// the piece that begins at step 0.
template <class S, class Piece>
void compose(const Arguments& p, bool backwards, int64_t length, double least, Piece piece) {
  const int64_t H = p.width, pieces = (p.steps + length - 1) / length;
  const auto [groups, width] = Groups::for_threads(p);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.threads > 1)
  for (int64_t task = 0; task < p.batch * groups; ++task) {
    const int64_t row = task / groups, first = task % groups * width;
    const int64_t own = width < H - first ? width : H - first;
    double* const decay = p.span_decay + row * H + first;
    double* const given = p.span_state + row * H + first;
    std::fill(decay, decay + own, 1.0);
    std::fill(given, given + own, 0.0);
    bool open[BLOCK / LANES<S>];  // vectors of channels that are not done
    std::fill(open, open + BLOCK / LANES<S>, true);
    bool any = true;
    for (int64_t n = 0; n < pieces && any; ++n) {
      const int64_t begin = (backwards ? n : pieces - 1 - n) * length;
      const int64_t end = begin + length < p.steps ? begin + length : p.steps;
      any = false;
      for_lanes<S>(own, [&](int64_t c, auto lanes) {
        bool& its = open[c / LANES<S>];
        if (!its) return;
        const Map<Vec<S>> map = piece(row, begin, end, first + c, lanes);
        its = false;
        for (int64_t l = 0; l < lanes; ++l) {
          given[c + l] += decay[c + l] * (double(map.given.value[l]) + map.given.rest[l]);
          decay[c + l] *= double(map.decay.value[l]) + map.decay.rest[l];
          its |= !(std::abs(decay[c + l]) <= least);  // of NaN too the rest is read
        }
        any |= its;
      });
    }
    // through a reset that was not read nothing gets at all: 0 lets no NaN in
    const uint8_t* const resets = p.reset + row * p.steps;
    if (p.reset && std::any_of(resets, resets + p.steps, [](uint8_t r) { return r != 0; }))
      std::fill(decay, decay + own, 0.0);
  }
}

}  // namespace
