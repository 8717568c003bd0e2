// SPDX-License-Identifier: Apache-2.0
//
// What the forward and the backward kernels share: element types, memory accesses, and the loop that adds up rows.
//
// A warp works on a column tile: 32 lanes x 16 bytes, or 32 single elements where a width, a stride or an address does
// not allow 16 bytes. Sums are float32 and rounded once, at the store.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "pool_rows_cuda.h"

namespace patchkern::cuda {

constexpr unsigned kWarp = 0xffffffffu;  // every lane takes part in every shuffle and vote

// Element types. Memory is handled in 32-bit words of one or two elements; a single 16-bit element is the low half.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int kPerWord = 1;
  static __device__ void widen(uint32_t word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ uint32_t narrow(const float* values) { return __float_as_uint(values[0]); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ void widen(uint32_t word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ uint32_t narrow(const float* values) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ void widen(uint32_t word, float* values) {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof word);
    const float2 wide = __half22float2(pair);
    values[0] = wide.x;
    values[1] = wide.y;
  }
  static __device__ uint32_t narrow(const float* values) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    uint32_t word;
    std::memcpy(&word, &pair, sizeof word);
    return word;
  }
};

// What one lane reads and writes of a row: 16 bytes, or one element.
template <class Element, bool kVector>
struct Access {
  using Bits = typename Element::Bits;
  static constexpr int kWords = kVector ? 4 : 1;
  static constexpr int kFloats = kWords * Element::kPerWord;
  static constexpr int kColumns = kVector ? kFloats : 1;  // of a lane
  static constexpr int kTileColumns = 32 * kColumns;      // of a warp

  struct Words {
    uint32_t words[kWords];
  };

  // Rows are read again by others: they stay in the caches.
  static __device__ Words load(const void* from) {
    if constexpr (kVector) {
      const uint4 bits = __ldg(static_cast<const uint4*>(from));
      return {{bits.x, bits.y, bits.z, bits.w}};
    } else {
      return {{__ldg(static_cast<const Bits*>(from))}};
    }
  }

  // An output that is added to.
  static __device__ Words load_once(const void* from) {
    if constexpr (kVector) {
      const uint4 bits = __ldcs(static_cast<const uint4*>(from));
      return {{bits.x, bits.y, bits.z, bits.w}};
    } else {
      return {{__ldcs(static_cast<const Bits*>(from))}};
    }
  }

  // Outputs are written once and not read here: first to leave the caches.
  static __device__ void store(void* to, const Words& w) {
    if constexpr (kVector) {
      __stcs(static_cast<uint4*>(to), make_uint4(w.words[0], w.words[1], w.words[2], w.words[3]));
    } else {
      __stcs(static_cast<Bits*>(to), static_cast<Bits>(w.words[0]));
    }
  }

  static __device__ void widen(const Words& w, float* values) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) Element::widen(w.words[i], values + i * Element::kPerWord);
  }

  static __device__ Words narrow(const float* values) {
    Words w;
#pragma unroll
    for (int i = 0; i < kWords; ++i) w.words[i] = Element::narrow(values + i * Element::kPerWord);
    return w;
  }
};

// A lane's columns of a sum of rows.
template <class A>
struct Sum {
  float values[A::kFloats];

  // -0.0 is the neutral element: a sum of one value is that value, also where it is -0.0.
  __device__ void clear() {
#pragma unroll
    for (float& value : values) value = -0.0f;
  }

  __device__ void add(const typename A::Words& row, float factor) {
    float wide[A::kFloats];
    A::widen(row, wide);
#pragma unroll
    for (int i = 0; i < A::kFloats; ++i) values[i] = fmaf(wide[i], factor, values[i]);
  }
};

// The parts of a sum that a block's warps hold. They are added in the warps' order.
template <class A, int kWarps>
struct Parts {
  float values[kWarps][A::kFloats][32];

  __device__ void put(const Sum<A>& sum) {
#pragma unroll
    for (int i = 0; i < A::kFloats; ++i) values[threadIdx.x / 32][i][threadIdx.x % 32] = sum.values[i];
  }

  __device__ Sum<A> total() const {
    Sum<A> sum;
#pragma unroll
    for (int i = 0; i < A::kFloats; ++i) {
      sum.values[i] = values[0][i][threadIdx.x % 32];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sum.values[i] += values[warp][i][threadIdx.x % 32];
    }
    return sum;
  }
};

// A lane's place in a row. Lanes past the width read the last columns again and write nothing.
template <class A>
struct Columns {
  bool inside;
  int64_t first;

  __device__ explicit Columns(int64_t dim) {
    first = int64_t{blockIdx.x} * A::kTileColumns + static_cast<int>(threadIdx.x % 32) * A::kColumns;
    inside = first < dim;
    if (!inside) first = dim - A::kColumns;
  }
};

// Rows of a matrix as one lane sees them: from its own column on.
struct Matrix {
  char* base;
  int64_t row_bytes;

  __device__ char* row(int64_t number) const { return base + number * row_bytes; }
};

template <class A>
__device__ Matrix matrix_at(const void* data, int64_t stride, int64_t column) {
  constexpr int64_t kBytes = sizeof(typename A::Bits);
  return {const_cast<char*>(static_cast<const char*>(data)) + column * kBytes, stride * kBytes};
}

// A row to add up, as a lane prepares it for its warp.
struct Share {
  int64_t offset;  // of the row, in bytes
  float factor;
};

// Adds `count` <= 32 rows to `sum`, in their order. Where bit j of `ends` is set a sum is complete with row j:
// finish(sum) takes it, and the next sum begins.
//
// kInFlight loads are on their way before the first is needed. The queue is in shared memory and read by the whole warp
// at once: it leaves the registers to the loads.
template <class A, int kInFlight, class Finish>
__device__ __forceinline__ void add_rows(const char* base, const Share* queue, int count, uint32_t ends, Sum<A>& sum,
                                         const Finish& finish) {
  for (int first = 0; first < count; first += kInFlight) {
    typename A::Words rows[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) rows[i] = A::load(base + queue[first + i].offset);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < count) {
        sum.add(rows[i], queue[first + i].factor);
        if (ends >> (first + i) & 1) {
          finish(sum);
          sum.clear();
        }
      }
    }
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The column tiles of a row run next to each other in time, so that its pieces meet in DRAM pages. The blocks of rows
// take two dimensions, because one ends at 65,535.
inline dim3 grid_of(int64_t column_tiles, int64_t row_blocks) {
  const int64_t y = row_blocks < 65535 ? row_blocks : 65535;
  return dim3(static_cast<unsigned>(column_tiles), static_cast<unsigned>(y),
              static_cast<unsigned>(ceil_div(row_blocks, y)));
}

__device__ inline int64_t row_block() { return int64_t{blockIdx.z} * gridDim.y + blockIdx.y; }

template <class Call>
cudaError_t launch(void (*kernel)(Call), dim3 grid, int threads, void* stream, const Call& call) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, call);
}

// May every row of the matrix be accessed in pieces of 16 bytes?
inline bool takes_vectors(const void* data, int64_t stride, int64_t dim, int64_t element_bytes) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * element_bytes) |
          static_cast<uintptr_t>(dim * element_bytes)) % 16 == 0;
}

}  // namespace patchkern::cuda
