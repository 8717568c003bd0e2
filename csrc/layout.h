// SPDX-License-Identifier: Apache-2.0
//
// The ABI of planning: which row of a packed batch is what, and the transpose that the gradient walks. Integers only.
// patchkern/batch/planning.py is the same in NumPy, and says what each array means; results are equal integer for integer.
//
// Each is two calls, because the caller owns all memory: the first checks and counts, the second fills arrays of the
// sizes that the first found.

#pragma once

#include <cstdint>

#include "pool_rows.h"

namespace patchkern {

struct Tokens {
  const int32_t* ids;
  int64_t count;
};

// What a span begins with; kPrefix where there are no heads.
enum Head : uint8_t { kPrefix = 0, kSeparator = 1, kNothing = 2 };

struct Batch {
  const int32_t *catalog_tokens, *catalog_offsets;  // those that the batch uses are checked
  int64_t num_catalog_tokens, catalog_size;
  const int32_t* items;  // catalogue positions of all users' history items
  int64_t num_items;
  const int64_t* user_offsets;
  int64_t num_users;
  const uint8_t* levels;
  const int32_t* targets;  // one per user, or null; with heads, -1 for a span that ends with its last entry
  const uint8_t* heads;    // one `Head` per user, or null
  const int64_t* hidden;   // rows before each user's span that its positions go on from, or null
  Tokens prefix, separator, suffix, response_end;
};

struct RowCounts {
  int64_t rows, pooled_items, titles, title_tokens, supervised, max_seqlen, history_tokens, history_rows;
};

// Checks the batch, counts, and numbers the titles of pooled items by first appearance: numbers[0 .. pooled_items) and
// title_index[0 .. titles), both with room for num_items.
Outcome count_rows(const Batch& batch, int32_t* numbers, int32_t* title_index, RowCounts* counts);

struct RowArrays {
  int32_t *lo, *hi, *token_ids, *offsets, *cu_seqlens;
  int64_t* position_ids;
  int64_t *labels, *logit_rows, *logit_labels;  // null without targets
};

// Returns the largest token id, -1 if there is none.
int64_t fill_rows(const Batch& batch, const RowCounts& counts, const int32_t* title_index, const RowArrays& arrays);

struct Rows {
  const int32_t *lo, *hi;
  int64_t num_rows;
  const int32_t* items;
  int64_t num_items;
  const int32_t* token_ids;
  int64_t num_title_tokens;
  const int32_t* offsets;
  int64_t num_titles;
};

struct ContributionCounts {
  int64_t contributions, max_token_id;
};

Outcome count_contributions(const Rows& rows, ContributionCounts* counts);

// `tokens` has room for min(contributions, max_token_id + 1) entries and `offsets` for one more. Memory and time grow
// with max_token_id. Returns how many distinct tokens there are.
int64_t fill_transpose(const Rows& rows, const ContributionCounts& counts, int32_t* tokens, int32_t* offsets,
                       int32_t* contribution_rows, int32_t* divisors);

}  // namespace patchkern
