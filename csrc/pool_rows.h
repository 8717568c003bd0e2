// SPDX-License-Identifier: Apache-2.0
//
// The ABI of pool_rows: addresses, sizes and status codes. No torch, no Python, no allocation of results.
//
// Row t of a packed batch is either one token's embedding (lo[t] = -1 - token, hi[t] = 0) or the mean over
// items[lo[t]:hi[t]] of the mean over each item's title tokens; either times `scale`. Sums, means and products are taken
// in float32 (float64 for float64) and rounded once, at the store.

#pragma once

#include <cstdint>

namespace patchkern {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kNumDTypes = 4;

// What is wrong with a call; the position that goes with it is an index into the named array.
enum class Status : int {
  kOk = 0,
  kUnknownIsa = 1,        // the requested instruction set was not built or the CPU lacks it
  kLiteralToken = 2,      // lo[position] names a token >= num_embeddings
  kLiteralHi = 3,         // lo[position] < 0 but hi[position] != 0
  kRowRange = 4,          // not 0 <= lo[position] < hi[position] <= num_items
  kItem = 5,              // items[position] outside [0, num_titles)
  kOffsets = 6,           // offsets[position] does not start at 0, exceed its predecessor, or end at the last token
  kTitleToken = 7,        // token_ids[position] outside [0, num_embeddings)
  kToken = 8,             // tokens[position] outside [0, num output rows), or not ascending
  kContributionOffsets = 9,  // as kOffsets, of the transpose
  kContributionRow = 10,  // rows[position] outside [0, num_rows)
  kDivisor = 11,          // divisors[position] < 1
  kLevel = 12,            // levels[position] is no level, or joins where there is no patch to join
  kHistoryOffsets = 13,   // history_offsets[position]: not from 0 to the number of history items without falling
  kCatalogItem = 14,      // history item `position` is not in the catalog
  kTarget = 15,           // targets[position] is not in the catalog
  kTooManyRows = 16,      // the batch needs `position` rows, tokens or contributions: more than 2^31 - 1
  kLargeDivisor = 17,     // title length x session size of contribution `position` exceeds 2^31 - 1
  kTitleIndex = 18,       // title_index[position] outside [0, num_table_rows)
  kHead = 19,             // heads[position] is no head
  kCatalogOffsets = 20,   // the title of catalog item `position` does not lie within the catalog's tokens
  kSpanOffsets = 21,      // cu_seqlens[position] does not start at 0, falls, or does not end at the number of rows
  kSpanPrefix = 22,       // range `position` of prefix is no range of the stored rows
  kSpanOverlap = 23,      // range `position` of prefix overlaps its span, or an earlier range of it
};

struct Outcome {
  Status status = Status::kOk;
  int64_t position = 0;
};

// out[t] for every row t. Strides count elements. `weight`, `table` and `out` have unit stride in the last dimension.
//
// With a `table`, the mean over title i's tokens is not taken but read from row title_index[i] of it, and token_ids and
// offsets are not used. With scale 1 a literal, and a patch that is one row of the table, is a copy bit for bit.
struct PoolRows {
  DType dtype;
  const void* weight;
  int64_t num_embeddings, dim, weight_stride;
  const int32_t *lo, *hi;
  int64_t num_rows;
  const int32_t* items;
  int64_t num_items;
  const int32_t* token_ids;
  int64_t num_title_tokens;
  const int32_t* offsets;
  int64_t num_titles;
  const void* table;  // or null
  int64_t num_table_rows, table_stride;
  const int32_t* title_index;  // num_titles of them; null without a table
  double scale;
  void* out;
  int64_t out_stride;
};

// out[scatter ? tokens[u] : u] = scale * sum over c in [offsets[u], offsets[u + 1]) of grad_rows[rows[c]] / divisors[c],
// added to what is there if `accumulate`, rounded once. Other rows of `out` are left alone.
struct PoolRowsGrad {
  DType dtype;
  const void* grad_rows;
  int64_t num_rows, dim, grad_stride;
  const int32_t* tokens;
  int64_t num_tokens;
  const int32_t* offsets;
  const int32_t *rows, *divisors;
  int64_t num_contributions;
  double scale;
  bool scatter, accumulate;
  void* out;
  int64_t num_out_rows, out_stride;
};

// Both check every index before they write anything. The result depends on neither num_threads nor timing.
// `isa`: "auto", or one of isa_levels().
Outcome pool_rows(const PoolRows& call, int num_threads, const char* isa);
Outcome pool_rows_grad(const PoolRowsGrad& call, int num_threads, const char* isa);

// One instruction set's kernels, one function per dtype. A kernel handles one tile and checks nothing.
struct Kernels {
  const char* isa;
  // rows [row_begin, row_end); `stream`: bypass the cache when storing
  void (*forward[kNumDTypes])(const PoolRows& call, int64_t row_begin, int64_t row_end, bool stream);
  // tokens [token_begin, token_end) x columns [column_begin, column_end)
  void (*backward[kNumDTypes])(const PoolRowsGrad& call, int64_t token_begin, int64_t token_end,
                               int64_t column_begin, int64_t column_end);
};

// Levels that were built and that this CPU runs, slowest first; ends with nullptr. The last one is "auto".
const Kernels* const* isa_levels();

}  // namespace patchkern
