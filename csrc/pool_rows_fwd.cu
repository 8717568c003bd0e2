// SPDX-License-Identifier: Apache-2.0
//
// pool_rows on CUDA: literals, item patches and session patches in one launch.
//
// A block of 8 warps owns 32 rows x one column tile, a warp 4 of the rows. Literals are copied, 4 loads in flight. The
// warp's patches are one flat list of title tokens: lanes turn 32 of them at a time into (embedding row, factor), then
// the warp streams those rows, 8 loads in flight across the patches' borders. Rows of many items are shared by the
// block's warps.

#include "pool_rows_device.cuh"

namespace patchkern::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = 4;
static_assert(kWarps * kRowsPerWarp == 32, "one lane looks at each row of the block");
constexpr int kInFlight = 4;  // with more, the registers allow fewer warps and the literals suffer
constexpr int kBlocksPerSm = 4;
constexpr int kLongRow = 32 / kRowsPerWarp;  // a patch of more items is summed by all warps of the block

// Running sums over the lanes: lane i's entries are numbered ends[i - 1] .. ends[i] - 1.
__device__ int running_ends(int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kWarp, count, step);
    if (lane >= step) count += before;
  }
  return count;
}

// The lane that owns the entry.
__device__ int owner_of(int entry, int ends) {
  int owner = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if (__shfl_sync(kWarp, ends, owner + step - 1) <= entry) owner += step;
  }
  return owner;
}

// Adds up to 32 titles to `sum`, one for each lane: token_ids[begin .. begin + length) or, with a table, its row
// `begin`; each row counts for `share`. finish(sum) is called after the titles whose bits `ends` holds.
template <class A, class Finish>
__device__ __forceinline__ void add_titles(const PoolRows& call, const Matrix& source, Share* queue, int begin,
                                           int length, float share, uint32_t ends, Sum<A>& sum, const Finish& finish) {
  const int lane = threadIdx.x % 32;
  const int token_ends = running_ends(length);
  const int num_tokens = __shfl_sync(kWarp, token_ends, 31);
  const int shift = begin - (token_ends - length);
  for (int first = 0; first < num_tokens; first += 32) {
    const int entry = first + lane;
    const int title = owner_of(entry, token_ends);
    int row = entry + __shfl_sync(kWarp, shift, title);
    const float factor = __shfl_sync(kWarp, share, title);
    const bool last = entry + 1 == __shfl_sync(kWarp, token_ends, title);
    if (call.table == nullptr && entry < num_tokens) row = __ldg(call.token_ids + row);
    const uint32_t row_ends = __ballot_sync(kWarp, last && (ends >> title & 1));
    const int left = num_tokens - first;
    add_rows<A, kInFlight>(source.base, queue, {row * source.row_bytes, factor}, left < 32 ? left : 32, row_ends, sum, finish);
  }
}

struct Title {
  int begin, length;
};

__device__ Title title_of(const PoolRows& call, int item_at) {
  const int item = __ldg(call.items + item_at);
  if (call.table != nullptr) return {__ldg(call.title_index + item), 1};
  const int begin = __ldg(call.offsets + item);
  return {begin, __ldg(call.offsets + item + 1) - begin};
}

template <class Element, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm) pool_rows_kernel(PoolRows call) {
  using A = Access<Element, kVector>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = row_block() * 32;
  const Columns<A> columns(call.dim);
  const Matrix weight = matrix_at<A>(call.weight, call.weight_stride, columns.first);
  const Matrix out = matrix_at<A>(call.out, call.out_stride, columns.first);

  // Lane i looks at the block's row i: every warp knows them all.
  int lo = 0, members = 0;
  if (first_row + lane < call.num_rows) {
    lo = __ldg(call.lo + first_row + lane);
    const int hi = __ldg(call.hi + first_row + lane);
    if (lo >= 0) members = hi - lo;
  }
  const uint32_t own = ((1u << kRowsPerWarp) - 1) << (warp * kRowsPerWarp);
  const uint32_t literals = __ballot_sync(kWarp, lo < 0) & own;
  const uint32_t long_rows = __ballot_sync(kWarp, members > kLongRow);
  const uint32_t patches = __ballot_sync(kWarp, members > 0) & own & ~long_rows;

  if (literals != 0) {
    typename A::Words rows[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int row = warp * kRowsPerWarp + i;
      const int token = -1 - __shfl_sync(kWarp, lo, row);
      if (literals >> row & 1) rows[i] = A::load(weight.row(token));
    }
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int row = warp * kRowsPerWarp + i;
      if ((literals >> row & 1) == 0 || !columns.inside) continue;
      if (call.scale != 1.0f) {
        float values[A::kFloats];
        A::widen(rows[i], values);
#pragma unroll
        for (float& value : values) value *= call.scale;
        rows[i] = A::narrow(values);
      }
      A::store(out.row(first_row + row), rows[i]);
    }
  }

  if ((patches | long_rows) == 0) return;
  const Matrix source = call.table == nullptr ? weight : matrix_at<A>(call.table, call.table_stride, columns.first);
  __shared__ Share queues[kWarps][32];
  Sum<A> sum;
  sum.clear();

  if (patches != 0) {
    // a lane for each item of the warp's patches
    const int ends = running_ends(patches >> lane & 1 ? members : 0);
    const int patch = owner_of(lane, ends);
    const int size = __shfl_sync(kWarp, members, patch);
    const int end = __shfl_sync(kWarp, ends, patch);
    const int item_at = __shfl_sync(kWarp, lo, patch) + lane - (end - size);
    const Title title = lane < __shfl_sync(kWarp, ends, 31) ? title_of(call, item_at) : Title{0, 0};
    const float share = call.scale / (static_cast<float>(title.length) * static_cast<float>(size));
    uint32_t unfinished = patches;
    add_titles<A>(call, source, queues[warp], title.begin, title.length, share, __ballot_sync(kWarp, lane + 1 == end), sum,
                  [&](const Sum<A>& patch_sum) {
                    const int row = __ffs(static_cast<int>(unfinished)) - 1;
                    unfinished &= unfinished - 1;
                    if (columns.inside) A::store(out.row(first_row + row), A::narrow(patch_sum.values));
                  });
  }

  // Each warp sums an equal part of a long row's items; one of them adds the parts, in the warps' order.
  __shared__ Parts<A, kWarps> parts;
  for (uint32_t left = long_rows; left != 0; left &= left - 1) {
    const int row = __ffs(static_cast<int>(left)) - 1;
    const int items = __ldg(call.lo + first_row + row);
    const int size = __ldg(call.hi + first_row + row) - items;
    const int end = static_cast<int>(int64_t{size} * (warp + 1) / kWarps);
    for (int first = static_cast<int>(int64_t{size} * warp / kWarps); first < end; first += 32) {
      const Title title = first + lane < end ? title_of(call, items + first + lane) : Title{0, 0};
      const float share = call.scale / (static_cast<float>(title.length) * static_cast<float>(size));
      add_titles<A>(call, source, queues[warp], title.begin, title.length, share, 0, sum, [](const Sum<A>&) {});
    }
    parts.put(sum);
    sum.clear();
    __syncthreads();
    if (warp == row % kWarps && columns.inside) A::store(out.row(first_row + row), A::narrow(parts.total().values));
    __syncthreads();
  }
}

template <class Element>
cudaError_t run(const PoolRows& call, void* stream) {
  constexpr int64_t kBytes = sizeof(typename Element::Bits);
  const bool vectors = takes_vectors(call.weight, call.weight_stride, call.dim, kBytes) &&
                       takes_vectors(call.table, call.table_stride, call.dim, kBytes) &&
                       takes_vectors(call.out, call.out_stride, call.dim, kBytes);
  const int64_t tile_columns =
      vectors ? Access<Element, true>::kTileColumns : Access<Element, false>::kTileColumns;
  const dim3 grid = grid_of(ceil_div(call.dim, tile_columns), ceil_div(call.num_rows, 32));
  const auto kernel = vectors ? pool_rows_kernel<Element, true> : pool_rows_kernel<Element, false>;
  return launch(kernel, grid, 32 * kWarps, stream, call);
}

}  // namespace

int pool_rows(const PoolRows& call, int device, void* stream) {
  if (call.num_rows == 0 || call.dim == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  switch (call.dtype) {
    case DType::kFloat32: return run<Float32>(call, stream);
    case DType::kBFloat16: return run<BFloat16>(call, stream);
    case DType::kFloat16: return run<Float16>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace patchkern::cuda
