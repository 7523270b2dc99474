// Scans over states [B, D, N] that are not their output: what their kernels share.
//
// A kernel (../recurrences/*/states.cpp) runs a task: some channels of one row of the batch, from end
// to end. Channels lie in the lanes of a vector, so that an output is a sum over N without a sum over
// lanes. Time is cut into tiles: the forward keeps the states that enter them, and the backward makes
// those in between again, so that no [B, T, D, N] is ever in memory.

#pragma once

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t TILE = 64;  // steps: their states of one vector of channels fit L2
constexpr int MOST = 8;       // inputs

// What every kernel gets. Pointers that a kernel does not use are null.
struct Arguments {
  int64_t batch, steps, width, states;
  int64_t groups, group;  // of channels: a task has `group` of them, fewer at the end
  const void* x[MOST];    // the inputs; weights in the accumulators' type
  // y alone; or gradients of the inputs: as they are; of those that all channels read, a part for
  // each group, [groups, B, T, N]; of weights, a part for each row, [B, ...] fp64
  void* out[MOST];
  const uint8_t* reset;    // [B, T]
  const void* grad_y;      // [B, T, D]
  void* kept;              // [B, tiles, D, N], the states that enter the tiles
  const double* state_in;  // [B, D, N]: h_in, or the gradient of h_last
  double* state;           // [B, D, N]: h_last, or the gradient of h_in
  double *span_decay, *span_state;  // [B, D, N]: all steps as one map
  int32_t threads;
};

// Channels [first, first + width) of one row.
struct Task {
  int64_t row, group, first, width;
};

template <class Body>
void for_tasks(const Arguments& p, Body body) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.threads > 1)
  for (int64_t task = 0; task < p.batch * p.groups; ++task) {
    const int64_t group = task % p.groups, first = group * p.group;
    const int64_t width = p.width - first < p.group ? p.width - first : p.group;
    body(Task{task / p.groups, group, first, width});
  }
}

// Vectors in memory of their own, aligned for them.
template <class V>
struct Buffer {
  explicit Buffer(int64_t count)
      : at(static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(at), 0, count * sizeof(V));
  }
  ~Buffer() { ::operator delete(at, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  INLINE V& operator[](int64_t i) const { return at[i]; }
  V* at;
};

// Numbers as they lie in memory.
INLINE double number(const float* p) { return *p; }
INLINE double number(const double* p) { return *p; }
INLINE double number(const bf16* p) {
  const uint32_t wide = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// `count` of them, in the lanes of V; zeros in those beyond.
template <class V, class T>
INLINE V channels(const T* p, int64_t count) {
  V x{};
  constexpr int64_t lanes = sizeof(V) / sizeof(x[0]);
  if (count == lanes) {
    for (int64_t i = 0; i < lanes; ++i) x[i] = number(p + i);
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] = number(p + i);
  }
  return x;
}

template <class V>
INLINE auto sum(V x) {
  constexpr int64_t lanes = sizeof(V) / sizeof(x[0]);
  auto total = x[0];
  for (int64_t i = 1; i < lanes; ++i) total += x[i];
  return total;
}

enum Kernel { FORWARD, SUMMARIZE, BACKWARD, SUMMARIZE_BACKWARD };

template <class K>
void run_kernel(int kernel, const Arguments& p) {
  for_tasks(p, [&](const Task& task) {
    K scan(p, task);
    switch (kernel) {
      case FORWARD: return scan.template forward<true>();
      case SUMMARIZE: return scan.template forward<false>();
      case BACKWARD: return scan.template backward<true>();
      case SUMMARIZE_BACKWARD: return scan.template backward<false>();
    }
  });
}

}  // namespace

// A kernel K<T> over inputs of type T. dtype: 0 fp32, 1 bf16, 2 fp64.
#define LONGHAUL_STATES(K)                                                              \
  extern "C" void longhaul_scan(int kernel, int dtype, const Arguments* arguments) { \
    switch (dtype) {                                                                    \
      case 0: return run_kernel<K<float>>(kernel, *arguments);                          \
      case 1: return run_kernel<K<bf16>>(kernel, *arguments);                           \
      case 2: return run_kernel<K<double>>(kernel, *arguments);                         \
    }                                                                                   \
  }
