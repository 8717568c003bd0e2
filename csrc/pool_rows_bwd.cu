// SPDX-License-Identifier: Apache-2.0
//
// The gradient of pool_rows on CUDA: each token's sum of its rows' gradients, in an order that never changes.
//
// The contributions are sorted by token. The first kernel cuts them into tiles of kTileContributions, whatever their
// tokens, and gives each tile x column tile to a warp: it writes the tokens that begin and end in its tile, and leaves
// the part of a token that began earlier (its head) or goes on behind it (its tail) in a float32 workspace. The second
// adds, for every token that crosses a border, the tail and the heads that follow it. So a separator that is a sixth of
// the batch is as balanced as tokens that occur once, without a floating-point atomic.
//
// Budget: the batches of pool_rows_fwd.cu, in MB. The minimum is each row's gradient and the transposed index (0.2 MB)
// read once and each of the 2,551 tokens' gradients (10.4 MB) written once; floors as there. The borders add 4 to 5 MB
// of partial sums, written and read back, which stay in L2.
//
//   policy     contributions  tiles  minimum   A100 us  H200 us   read through L2   borders
//   text        24,016         376    109.0     70.3     25.4      98.4              545 partial sums, 4.5 MB
//   items       24,016         376     62.9     40.6     14.6      98.4              545, 4.5 MB
//   sessions    21,196         332     39.8     25.7      9.3      86.8              501, 4.1 MB
//   random      24,016         376     94.3     60.8     21.9      98.4              545, 4.5 MB
//
// Compact gradients cost just that, and so do those added to an existing one but for reading it (10.4 MB). A new dense
// one costs its zeros, too, which the caller writes: 525 MB, 339 us on an A100 and 122 us on an H200. Unlike in the
// forward pass hardly a read is answered by L1, as a row's tokens lie in different tiles: on an H200, at an assumed 5.5
// TB/s from L2, items take 18 us and sessions 16 us, 82 % and 59 % of the copy bandwidth; text and random are limited
// by DRAM. A tile of 64 makes 3,008 equal warps of a batch, which an H200 runs at once.

#include "pool_rows_device.cuh"

namespace patchkern::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kInFlight = 8;
constexpr int kBlocksPerSm = 6;
constexpr int kCombineWarps = 8;

__host__ __device__ int64_t num_tiles(const PoolRowsGrad& call) {
  return (call.num_contributions + kTileContributions - 1) / kTileContributions;
}

// The token of contribution `position`: the last u with offsets[u] <= position. The whole warp asks for the same one.
__device__ uint32_t token_of(const PoolRowsGrad& call, int position) {
  const int lane = threadIdx.x % 32;
  int64_t first = 0, end = call.num_tokens;  // offsets[first] <= position < offsets[end]
  while (end - first > 1) {
    const int64_t step = (end - first + 31) / 32;
    const int64_t probe = first + step * (lane + 1);
    const bool before = probe < end && __ldg(call.offsets + probe) <= position;
    first += step * __popc(__ballot_sync(kWarp, before));
    if (first + step < end) end = first + step;
  }
  return static_cast<uint32_t>(first);
}

// A lane's columns of a tile's head (0) or tail (1).
template <class A>
__device__ float* partial_at(const PoolRowsGrad& call, int which, int64_t tile, int64_t column) {
  return call.partials + (which * num_tiles(call) + tile) * call.dim + column;
}

// A lane's columns as 16-byte pieces, or one.
template <class A, class Move>
__device__ void for_each_piece(const Move& move) {
  constexpr int kPiece = A::kColumns < 4 ? A::kColumns : 4;
#pragma unroll
  for (int i = 0; i < A::kColumns; i += kPiece) move(i);
}

template <class A>
__device__ void store_partial(float* to, const Sum<A>& sum) {
  for_each_piece<A>([&](int i) {
    if constexpr (A::kColumns == 1) {
      to[i] = sum.values[i];
    } else {
      *reinterpret_cast<float4*>(to + i) =
          make_float4(sum.values[i], sum.values[i + 1], sum.values[i + 2], sum.values[i + 3]);
    }
  });
}

template <class A>
__device__ void add_partial(const float* from, Sum<A>& sum) {
  for_each_piece<A>([&](int i) {
    if constexpr (A::kColumns == 1) {
      sum.values[i] += __ldg(from + i);
    } else {
      const float4 piece = __ldg(reinterpret_cast<const float4*>(from + i));
      sum.values[i] += piece.x;
      sum.values[i + 1] += piece.y;
      sum.values[i + 2] += piece.z;
      sum.values[i + 3] += piece.w;
    }
  });
}

// Rounds the sum of token number `token` into its row.
template <class A>
__device__ void store_token(const PoolRowsGrad& call, const Matrix& out, uint32_t token, Sum<A> sum) {
  char* row = out.row(call.scatter ? static_cast<uint32_t>(__ldg(call.tokens + token)) : token);
  if (call.accumulate) sum.add(A::load_once(row), 1.0f);
  A::store(row, A::narrow(sum.values));
}

template <class Element, bool kVector>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm) pool_rows_grad_tiles(PoolRowsGrad call) {
  using A = Access<Element, kVector>;
  __shared__ Share queues[kWarps][kTileContributions];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (row_block() * kWarps + warp >= num_tiles(call)) return;
  const int tile = static_cast<int>(row_block() * kWarps + warp);
  const Columns<A> columns(call.dim);
  const Matrix grad_rows = matrix_at<A>(call.grad_rows, call.grad_stride, columns.first);
  const Matrix out = matrix_at<A>(call.out, call.out_stride, columns.first);

  const int begin = tile * kTileContributions;
  const int64_t behind = call.num_contributions - begin;
  const int size = behind < kTileContributions ? static_cast<int>(behind) : kTileContributions;

  // The loads for the whole queue are under way while the first token is looked up.
  constexpr int kPerLane = kTileContributions / 32;
  int numbers[kPerLane], divisors[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = lane + 32 * i;
    numbers[i] = at < size ? __ldg(call.rows + begin + at) : 0;
    divisors[i] = at < size ? __ldg(call.divisors + begin + at) : 1;
  }
  uint32_t token = token_of(call, begin);
  Share* queue = queues[warp];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    queue[lane + 32 * i] = {numbers[i] * grad_rows.row_bytes, call.scale / static_cast<float>(divisors[i])};
  }
  __syncwarp();

  bool head = __ldg(call.offsets + token) < begin;  // the sum at hand is part of a token that began in an earlier tile
  bool tail = false;                                // the sum at hand goes on in the next tile
  Sum<A> sum;
  sum.clear();
  for (int first = 0; first < size; first += 32) {
    const int count = size - first < 32 ? size - first : 32;
    // Every token has a contribution, so these 32 complete at most the 32 tokens from `token` on.
    uint32_t last = 0;
    if (token + lane < call.num_tokens) {
      const int at = __ldg(call.offsets + token + lane + 1) - 1 - begin - first;
      if (at < count) last = 1u << at;
    }
    const uint32_t ends = __reduce_or_sync(kWarp, last);
    add_rows<A, kInFlight>(grad_rows.base, queue + first, count, ends, sum, [&](const Sum<A>& token_sum) {
      if (columns.inside) {
        if (head) {
          store_partial<A>(partial_at<A>(call, 0, tile, columns.first), token_sum);
        } else {
          store_token<A>(call, out, token, token_sum);
        }
      }
      head = false;
      ++token;
    });
    tail = (ends >> (count - 1) & 1) == 0;
  }
  if (tail && columns.inside) store_partial<A>(partial_at<A>(call, head ? 0 : 1, tile, columns.first), sum);
  if (blockIdx.x == 0 && lane == 0) call.tails[tile] = tail && !head ? static_cast<int32_t>(token) : -1;
}

// A block takes the tile in which a token begins, and adds the heads of the tiles that follow.
template <class Element, bool kVector>
__global__ void __launch_bounds__(32 * kCombineWarps) pool_rows_grad_borders(PoolRowsGrad call) {
  using A = Access<Element, kVector>;
  const int warp = threadIdx.x / 32;
  const int64_t tile = row_block();
  if (tile >= num_tiles(call)) return;
  const int32_t tail = __ldg(call.tails + tile);
  if (tail < 0) return;
  const uint32_t token = static_cast<uint32_t>(tail);
  const Columns<A> columns(call.dim);
  const int64_t last_tile = (int64_t{__ldg(call.offsets + token + 1)} - 1) / kTileContributions;
  Sum<A> sum;
  sum.clear();
  if (warp == 0) add_partial<A>(partial_at<A>(call, 1, tile, columns.first), sum);
#pragma unroll 4
  for (int64_t next = tile + 1 + warp; next <= last_tile; next += kCombineWarps) {
    add_partial<A>(partial_at<A>(call, 0, next, columns.first), sum);
  }
  __shared__ Parts<A, kCombineWarps> parts;
  parts.put(sum);
  __syncthreads();
  if (warp == 0 && columns.inside) {
    store_token<A>(call, matrix_at<A>(call.out, call.out_stride, columns.first), token, parts.total());
  }
}

template <class Element, bool kVector>
cudaError_t run(const PoolRowsGrad& call, void* stream) {
  const int64_t column_tiles = ceil_div(call.dim, Access<Element, kVector>::kTileColumns);
  const int64_t tiles = num_tiles(call);
  const cudaError_t error = launch(pool_rows_grad_tiles<Element, kVector>,
                                   grid_of(column_tiles, ceil_div(tiles, kWarps)), 32 * kWarps, stream, call);
  if (error != cudaSuccess || tiles == 1) return error;
  return launch(pool_rows_grad_borders<Element, kVector>, grid_of(column_tiles, tiles), 32 * kCombineWarps, stream,
                call);
}

template <class Element>
cudaError_t run(const PoolRowsGrad& call, void* stream) {
  constexpr int64_t kBytes = sizeof(typename Element::Bits);
  const bool vectors = takes_vectors(call.grad_rows, call.grad_stride, call.dim, kBytes) &&
                       takes_vectors(call.out, call.out_stride, call.dim, kBytes);
  return vectors ? run<Element, true>(call, stream) : run<Element, false>(call, stream);
}

}  // namespace

int pool_rows_grad(const PoolRowsGrad& call, int device, void* stream) {
  if (call.num_tokens == 0 || call.dim == 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  switch (call.dtype) {
    case DType::kFloat32: return run<Float32>(call, stream);
    case DType::kBFloat16: return run<BFloat16>(call, stream);
    case DType::kFloat16: return run<Float16>(call, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace patchkern::cuda
