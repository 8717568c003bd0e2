// SPDX-License-Identifier: Apache-2.0
//
// pool_rows on the CPU: check every index, choose the instruction set, share the tiles out among threads.
//
// A tile's result depends on nothing but its inputs, so neither does the whole.

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "pool_rows.h"
#include "threads.h"

namespace patchkern {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

// Work below this many bytes (read plus written) is not worth starting a thread for: about 50 us of copying, against
// about 20 us to start and join one.
constexpr int64_t kBytesPerThread = 1 << 20;
// A tile is large enough to make taking it from the counter free and small enough to balance the load.
constexpr int64_t kBytesPerTile = 1 << 18;
// Larger outputs are stored past the cache: they would evict the embedding rows being gathered, and themselves.
constexpr int64_t kStreamBytes = 8 << 20;
// Columns of one backward tile, in bytes: wide tiles read the gradient in longer pieces, and several of them still
// share a long run out among threads.
constexpr int64_t kTileColumnBytes = 4096;

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

struct Levels {
  const Kernels* levels[4] = {};
  Levels() {
    int count = 0;
    levels[count++] = &baseline::kernels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2) levels[count++] = &avx2::kernels;
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      levels[count++] = &avx512::kernels;
    }
#endif
  }
};

const Kernels* choose_kernels(const char* isa) {
  const Kernels* chosen = nullptr;
  const bool automatic = std::strcmp(isa, "auto") == 0;
  for (const Kernels* const* level = isa_levels(); *level != nullptr; ++level) {
    if (automatic || std::strcmp(isa, (*level)->isa) == 0) chosen = *level;
  }
  return chosen;
}

int64_t threads_for(int64_t bytes, int num_threads) {
  return std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(num_threads, 1));
}

Outcome check(const PoolRows& call) {
  int64_t at;
  if (call.table != nullptr) {
    if ((at = first_outside(call.title_index, call.num_titles, call.num_table_rows)) >= 0) {
      return {Status::kTitleIndex, at};
    }
  } else {
    if ((at = first_bad_offset(call.offsets, call.num_titles, call.num_title_tokens)) >= 0) {
      return {Status::kOffsets, at};
    }
    if ((at = first_outside(call.token_ids, call.num_title_tokens, call.num_embeddings)) >= 0) {
      return {Status::kTitleToken, at};
    }
  }
  if ((at = first_outside(call.items, call.num_items, call.num_titles)) >= 0) return {Status::kItem, at};
  bool good = true;
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t lo = call.lo[row], hi = call.hi[row];
    good &= lo < 0 ? (-1 - lo < call.num_embeddings) & (hi == 0) : (lo < hi) & (hi <= call.num_items);
  }
  if (good) return {};
  for (int64_t row = 0; row < call.num_rows; ++row) {
    const int64_t lo = call.lo[row], hi = call.hi[row];
    if (lo < 0 && -1 - lo >= call.num_embeddings) return {Status::kLiteralToken, row};
    if (lo < 0 && hi != 0) return {Status::kLiteralHi, row};
    if (lo >= 0 && !(lo < hi && hi <= call.num_items)) return {Status::kRowRange, row};
  }
  return {};
}

Outcome check(const PoolRowsGrad& call) {
  int64_t at;
  if ((at = first_bad_offset(call.offsets, call.num_tokens, call.num_contributions)) >= 0) {
    return {Status::kContributionOffsets, at};
  }
  for (int64_t i = 1; i < call.num_tokens; ++i) {
    if (call.tokens[i] <= call.tokens[i - 1]) return {Status::kToken, i};
  }
  if (call.scatter && (at = first_outside(call.tokens, call.num_tokens, call.num_out_rows)) >= 0) {
    return {Status::kToken, at};
  }
  if ((at = first_outside(call.rows, call.num_contributions, call.num_rows)) >= 0) return {Status::kContributionRow, at};
  int32_t smallest = 1;
  for (int64_t c = 0; c < call.num_contributions; ++c) smallest = std::min(smallest, call.divisors[c]);
  if (smallest == 1) return {};
  for (int64_t c = 0; c < call.num_contributions; ++c) {
    if (call.divisors[c] < 1) return {Status::kDivisor, c};
  }
  return {};
}

}  // namespace

const Kernels* const* isa_levels() {
  static const Levels levels;
  return levels.levels;
}

Outcome pool_rows(const PoolRows& call, int num_threads, const char* isa) {
  const Kernels* kernels = choose_kernels(isa);
  if (kernels == nullptr) return {Status::kUnknownIsa, 0};
  const Outcome outcome = check(call);
  if (outcome.status != Status::kOk || call.num_rows == 0 || call.dim == 0) return outcome;

  const auto forward = kernels->forward[static_cast<int>(call.dtype)];
  const int64_t row_bytes = call.dim * element_bytes(call.dtype);
  const int64_t out_bytes = call.num_rows * row_bytes;
  const bool aligned = reinterpret_cast<uintptr_t>(call.out) % 64 == 0 &&
                       call.out_stride * element_bytes(call.dtype) % 64 == 0;
  const bool stream = aligned && out_bytes > kStreamBytes;
  const int64_t rows_per_tile = std::max<int64_t>(kBytesPerTile / row_bytes, 1);
  const int64_t num_tiles = (call.num_rows + rows_per_tile - 1) / rows_per_tile;
  share_out(num_tiles, threads_for(2 * out_bytes, num_threads), [&](int64_t tile, int64_t) {
    const int64_t begin = tile * rows_per_tile;
    forward(call, begin, std::min(begin + rows_per_tile, call.num_rows), stream);
  });
  return {};
}

Outcome pool_rows_grad(const PoolRowsGrad& call, int num_threads, const char* isa) {
  const Kernels* kernels = choose_kernels(isa);
  if (kernels == nullptr) return {Status::kUnknownIsa, 0};
  const Outcome outcome = check(call);
  if (outcome.status != Status::kOk || call.num_tokens == 0 || call.dim == 0) return outcome;

  const auto backward = kernels->backward[static_cast<int>(call.dtype)];
  const int64_t column_bytes = element_bytes(call.dtype);
  const int64_t columns = std::min(kTileColumnBytes / column_bytes, call.dim);
  const int64_t column_tiles = (call.dim + columns - 1) / columns;

  // Runs of tokens whose contributions together make a tile's work; a long run is a tile of its own, and its columns
  // are shared out all the same.
  const int64_t contributions_per_tile = std::max<int64_t>(kBytesPerTile / (columns * column_bytes), 1);
  std::vector<int64_t> token_tiles{0};
  for (int64_t token = 1; token <= call.num_tokens; ++token) {
    if (token == call.num_tokens || call.offsets[token + 1] - call.offsets[token_tiles.back()] > contributions_per_tile) {
      token_tiles.push_back(token);
    }
  }
  const int64_t num_token_tiles = static_cast<int64_t>(token_tiles.size()) - 1;
  const int64_t bytes = (call.num_contributions + call.num_tokens) * call.dim * column_bytes;
  share_out(column_tiles * num_token_tiles, threads_for(bytes, num_threads), [&](int64_t tile, int64_t) {
    const int64_t column = tile / num_token_tiles * columns;
    const auto tokens = static_cast<size_t>(tile % num_token_tiles);
    backward(call, token_tiles[tokens], token_tiles[tokens + 1], column, std::min(column + columns, call.dim));
  });
  return {};
}

}  // namespace patchkern
