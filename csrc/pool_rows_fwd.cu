// SPDX-License-Identifier: Apache-2.0
//
// pool_rows on CUDA: literals, item patches and session patches in one launch.
//
// A block of 8 warps owns 32 rows x one column tile, a warp 4 of the rows. Literals are copied, 4 loads in flight. The
// titles of a warp's patches are one list, a lane for each; the lanes turn their tokens, 32 at a time, into embedding
// rows and factors, and the warp adds those rows up with 4 loads in flight across the patches' borders. Long rows,
// patches of more than 8 items, come in clusters, and a few can be more work than the rest of the batch: 8 blocks share
// theirs, and all warps of a block one at a time.
//
// Budget: ml-1m with the Llama-3 tokenizer, a batch of 64 at up to 100 items, D = 2048, bfloat16, in MB. The minimum is
// each output row written once and each of the batch's 2,551 distinct embeddings (10.4 MB) and the layout (0.2 MB) read
// once; the floors are that over the measured copy bandwidths of A100 (1.55 TB/s) and H200 (4.3 TB/s).
//
//   policy     rows    written  minimum   A100 us  H200 us   read through L2
//   text       24,016   98.4     109.0     70.3     25.4      98.4
//   items      12,758   52.3      62.8     40.5     14.6      98.4
//   sessions    7,118   29.2      39.7     25.6      9.2      86.8
//   random     20,418   83.6      94.3     60.8     21.9      98.4
//
// A patch reads all of its tokens, so the SMs ask the L2 cache for far more than DRAM delivers. A simulated L1 (300
// pieces of 512 bytes an SM) answers 24 to 30 % of it, mostly separators and words that repeat within a block's 32
// rows; that is why a block is many rows of one column tile and not one row of many. What is left of sessions, 66 MB,
// takes an H200 12 us at an assumed 5.5 TB/s from L2: there 77 % of the copy bandwidth is the most that can be had
// without pooling titles that occur several times only once. Text, items (69 MB, 12.5 us) and random are limited by
// DRAM, as is everything on an A100.
//
// Measured on an H100, D = 2048, bfloat16, batch 512 (docs/benchmarks.md): 88 % of the copy bandwidth for text, 59 % for
// items, 47 % for sessions. What limits it there is neither cache nor memory: 102 warp instructions for each piece of
// 512 bytes that is read take 62 % of the issue slots, and where rows are unequal a block's warps wait for the slowest,
// 39 % of their cycles at sessions. The Triton kernel, 62 instructions and warps that share their rows, is faster there.

#include "pool_rows_device.cuh"

namespace patchkern::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = 4;
static_assert(kWarps * kRowsPerWarp == 32, "one lane looks at each row of the block");
constexpr int kInFlight = 4;  // with more, the registers allow fewer warps and the literals suffer
constexpr int kBlocksPerSm = 4;
constexpr int kLongRow = 32 / kRowsPerWarp;  // a patch of more items is summed by all warps of a block
constexpr int kGroup = kWarps;  // so many blocks share their long rows: each thread looks at one of the group's rows

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

// The number of items of a patch; 0 for a literal, and behind the last row.
__device__ int members_of(const PoolRows& call, int64_t row) {
  if (row >= call.num_rows) return 0;
  const int lo = __ldg(call.lo + row), hi = __ldg(call.hi + row);
  return lo < 0 ? 0 : hi - lo;
}

// token_ids[begin .. begin + length) or, with a table, its row `begin`.
struct Title {
  int begin, length;
};

__device__ Title title_of(const PoolRows& call, int item_at) {
  const int item = __ldg(call.items + item_at);
  if (call.table != nullptr) return {__ldg(call.title_index + item), 1};
  const int begin = __ldg(call.offsets + item);
  return {begin, __ldg(call.offsets + item + 1) - begin};
}

// Adds up to 32 titles to `sum`, one for each lane, as members of patches of `size` items. finish(sum) is called after
// the titles whose bits are set in `ends`.
template <class A, class Finish>
__device__ __forceinline__ void add_titles(const PoolRows& call, const Matrix& source, Share* queue, const Title& own,
                                           int size, uint32_t ends, Sum<A>& sum, const Finish& finish) {
  const int lane = threadIdx.x % 32;
  const float share = call.scale / (static_cast<float>(own.length) * static_cast<float>(size));
  const int token_ends = running_ends(own.length);
  const int num_tokens = __shfl_sync(kWarp, token_ends, 31);
  const int shift = own.begin - (token_ends - own.length);
  for (int first = 0; first < num_tokens; first += 32) {
    // a token for each lane
    const int entry = first + lane;
    const int title = owner_of(entry, token_ends);
    int row = entry + __shfl_sync(kWarp, shift, title);
    const float factor = __shfl_sync(kWarp, share, title);
    const bool last = entry + 1 == __shfl_sync(kWarp, token_ends, title);
    if (call.table == nullptr && entry < num_tokens) row = __ldg(call.token_ids + row);
    const uint32_t row_ends = __ballot_sync(kWarp, last && (ends >> title & 1));
    const int count = num_tokens - first < 32 ? num_tokens - first : 32;
    __syncwarp();  // the previous rows have been read
    queue[lane] = {row * source.row_bytes, factor};
    __syncwarp();
    add_rows<A, kInFlight>(source.base, queue, count, row_ends, sum, finish);
  }
}

template <class Element, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm) pool_rows_kernel(PoolRows call) {
  using A = Access<Element, kVector>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = row_block() * 32;
  const Columns<A> columns(call.dim);
  const Matrix weight = matrix_at<A>(call.weight, call.weight_stride, columns.first);
  const Matrix out = matrix_at<A>(call.out, call.out_stride, columns.first);

  // Lane i looks at the block's row i.
  const int lo = first_row + lane < call.num_rows ? __ldg(call.lo + first_row + lane) : 0;
  const int members = members_of(call, first_row + lane);
  __shared__ uint32_t long_rows[kWarps];  // of the block's group, a word for each block
  const int64_t group = row_block() / kGroup * kGroup;
  const bool is_long = members_of(call, group * 32 + threadIdx.x) > kLongRow;
  const uint32_t longs = __ballot_sync(kWarp, is_long);
  if (lane == 0) long_rows[warp] = longs;

  const uint32_t own = ((1u << kRowsPerWarp) - 1) << (warp * kRowsPerWarp);
  const uint32_t literals = __ballot_sync(kWarp, lo < 0) & own;
  const uint32_t patches = __ballot_sync(kWarp, members > 0 && members <= kLongRow) & own;

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
    uint32_t unfinished = patches;
    const auto store = [&](const Sum<A>& patch) {
      const int row = __ffs(static_cast<int>(unfinished)) - 1;
      unfinished &= unfinished - 1;
      if (columns.inside) A::store(out.row(first_row + row), A::narrow(patch.values));
    };
    add_titles<A>(call, source, queues[warp], title, size, __ballot_sync(kWarp, lane + 1 == end), sum, store);
  }

  // The group's long rows are dealt to its blocks in turn. Each warp sums an equal part of a row's items; one of them
  // adds the parts, in the warps' order.
  __shared__ Parts<A, kWarps> parts;
  const int64_t blocks = (call.num_rows + 31) / 32 - group;  // from the group's first
  const int dealt = static_cast<int>(blocks < kGroup ? blocks : kGroup);
  int turn = static_cast<int>(row_block() - group);
  __syncthreads();
  for (int word = 0; word < kGroup; ++word) {
    for (uint32_t left = long_rows[word]; left != 0; left &= left - 1) {
      if (turn-- != 0) continue;
      turn = dealt - 1;
      const int64_t row = (group + word) * 32 + __ffs(static_cast<int>(left)) - 1;
      const int items = __ldg(call.lo + row), size = members_of(call, row);
      const int end = static_cast<int>(int64_t{size} * (warp + 1) / kWarps);
      for (int first = static_cast<int>(int64_t{size} * warp / kWarps); first < end; first += 32) {
        const Title title = first + lane < end ? title_of(call, items + first + lane) : Title{0, 0};
        add_titles<A>(call, source, queues[warp], title, size, 0, sum, [](const Sum<A>&) {});
      }
      parts.put(sum);
      sum.clear();
      __syncthreads();
      if (warp == 0 && columns.inside) A::store(out.row(row), A::narrow(parts.total().values));
      __syncthreads();
    }
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
