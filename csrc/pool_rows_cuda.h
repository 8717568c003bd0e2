// SPDX-License-Identifier: Apache-2.0
//
// The ABI of pool_rows on CUDA: device addresses, sizes and a stream in, a cudaError_t out. No torch, no Python, no
// allocation, no synchronisation. The kernels trust the indices, which were checked when the layout was built.

#pragma once

#include <cstdint>

#include "pool_rows.h"

namespace patchkern::cuda {

// out[t] for every row t: see patchkern::PoolRows. Strides count elements; float64 is refused.
// With `table`, item i is row title_index[i] of it, and token_ids and offsets are not read.
struct PoolRows {
  DType dtype;
  const void* weight;
  int64_t dim, weight_stride;
  const int32_t *lo, *hi;
  int64_t num_rows;
  const int32_t *items, *token_ids, *offsets;
  const void* table;  // or nullptr
  int64_t table_stride;
  const int32_t* title_index;
  float scale;  // 1 copies literals bit for bit
  void* out;
  int64_t out_stride;
};

// The backward kernels sum the contributions in tiles of this many, whatever their tokens.
constexpr int kTileContributions = 64;

// out[scatter ? tokens[u] : u] = (accumulate ? itself : 0) + scale * sum over c in [offsets[u], offsets[u + 1]) of
// grad_rows[rows[c]] / divisors[c]. With num_tiles = ceil(num_contributions / kTileContributions), `partials` is a
// workspace of 2 x num_tiles x dim floats and `tails` one of num_tiles integers; neither need be initialised.
struct PoolRowsGrad {
  DType dtype;
  const void* grad_rows;
  int64_t dim, grad_stride;
  const int32_t* tokens;
  int64_t num_tokens;
  const int32_t *offsets, *rows, *divisors;
  int64_t num_contributions;
  float scale;
  bool scatter, accumulate;
  void* out;
  int64_t out_stride;
  float* partials;
  int32_t* tails;
};

// Both leave `device` the current one of the calling thread. `stream`: a cudaStream_t of that device.
int pool_rows(const PoolRows& call, int device, void* stream);
int pool_rows_grad(const PoolRowsGrad& call, int device, void* stream);

const char* error_string(int error);
// CUDA versions as 1000 * major + 10 * minor: the runtime's that is linked in, and the newest the driver serves (0: no
// driver).
int runtime_version();
int driver_version();

}  // namespace patchkern::cuda
