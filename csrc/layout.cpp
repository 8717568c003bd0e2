// SPDX-License-Identifier: Apache-2.0
//
// Planning in one sweep over the history items, one core: data loaders run one process per core.

#include "layout.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"

namespace patchkern {
namespace {

constexpr uint8_t kText = 0, kPatch = 1, kJoin = 2;
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kIgnore = -100;

// Numbers distinct keys by first appearance. Its memory follows the number of distinct keys, not their range: a
// catalogue may have millions of items and a batch a hundred.
class Numbering {
 public:
  int32_t number(int32_t key) {
    for (uint32_t slot = home(key);; slot = (slot + 1) & (capacity() - 1)) {
      if (keys_[slot] == key) return numbers_[slot];
      if (keys_[slot] == kVacant) {
        keys_[slot] = key;
        numbers_[slot] = count_;
        const int32_t number = count_++;
        if (static_cast<uint32_t>(count_) * 2 > capacity()) grow();
        return number;
      }
    }
  }
  int32_t count() const { return count_; }

 private:
  static constexpr int32_t kVacant = -1;
  uint32_t capacity() const { return uint32_t{1} << bits_; }
  uint32_t home(int32_t key) const { return static_cast<uint32_t>(key) * 2654435769u >> (32 - bits_); }

  void grow() {
    std::vector<int32_t> keys(size_t{2} << bits_, kVacant), numbers(size_t{2} << bits_);
    keys.swap(keys_);
    numbers.swap(numbers_);
    ++bits_;
    for (size_t old = 0; old < keys.size(); ++old) {
      if (keys[old] == kVacant) continue;
      uint32_t slot = home(keys[old]);
      while (keys_[slot] != kVacant) slot = (slot + 1) & (capacity() - 1);
      keys_[slot] = keys[old];
      numbers_[slot] = numbers[old];
    }
  }

  uint32_t bits_ = 12;
  int32_t count_ = 0;
  std::vector<int32_t> keys_ = std::vector<int32_t>(size_t{1} << 12, kVacant), numbers_ = std::vector<int32_t>(1 << 12);
};

Outcome check(const Batch& batch) {
  const int64_t users = batch.num_users;
  int64_t at;
  if (batch.user_offsets[0] != 0) return {Status::kHistoryOffsets, 0};
  for (int64_t user = 0; user < users; ++user) {
    const int64_t begin = batch.user_offsets[user], end = batch.user_offsets[user + 1];
    if (end < begin || end > batch.num_items) return {Status::kHistoryOffsets, user + 1};
    if (end > begin && batch.levels[begin] == kJoin) return {Status::kLevel, begin};
  }
  if (batch.user_offsets[users] != batch.num_items) return {Status::kHistoryOffsets, users};
  if ((at = first_outside(batch.items, batch.num_items, batch.catalog_size)) >= 0) return {Status::kCatalogItem, at};
  for (int64_t user = 0; batch.heads != nullptr && user < users; ++user) {
    if (batch.heads[user] > kNothing) return {Status::kHead, user};
  }
  const int32_t lowest = batch.heads == nullptr ? 0 : -1;
  for (int64_t user = 0; batch.targets != nullptr && user < users; ++user) {
    if (batch.targets[user] < lowest || batch.targets[user] >= batch.catalog_size) return {Status::kTarget, user};
  }
  bool good = true;
  for (int64_t i = 0; i < batch.num_items; ++i) good &= batch.levels[i] <= kJoin;
  for (int64_t i = 1; i < batch.num_items; ++i) good &= !(batch.levels[i] == kJoin && batch.levels[i - 1] == kText);
  for (int64_t i = 0; !good && i < batch.num_items; ++i) {
    const uint8_t level = batch.levels[i];
    if (level > kJoin || (level == kJoin && batch.levels[i - 1] == kText)) return {Status::kLevel, i};
  }
  return {};
}

int64_t title_length(const Batch& batch, int32_t item) {
  return batch.catalog_offsets[item + 1] - batch.catalog_offsets[item];
}

bool has_title(const Batch& batch, int32_t item) {
  const int32_t begin = batch.catalog_offsets[item], end = batch.catalog_offsets[item + 1];
  return 0 <= begin && begin < end && end <= batch.num_catalog_tokens;
}

Tokens head_of(const Batch& batch, int64_t user) {
  const uint8_t head = batch.heads == nullptr ? kPrefix : batch.heads[user];
  return head == kPrefix ? batch.prefix : head == kSeparator ? batch.separator : Tokens{nullptr, 0};
}

// A span that ends with its last entry: others go on from it.
bool is_open(const Batch& batch, int64_t user) { return batch.targets != nullptr && batch.targets[user] < 0; }

// Appends literal rows.
struct RowWriter {
  int32_t* lo;

  void literals(const int32_t* ids, int64_t count) {
    for (int64_t i = 0; i < count; ++i) lo[i] = -1 - ids[i];
    lo += count;
  }
  void literals(const Tokens& tokens) { literals(tokens.ids, tokens.count); }
};

}  // namespace

Outcome count_rows(const Batch& batch, int32_t* numbers, int32_t* title_index, RowCounts* counts) {
  const Outcome outcome = check(batch);
  if (outcome.status != Status::kOk) return outcome;
  *counts = {};
  Numbering numbering;
  int64_t pooled = 0, title_tokens = 0;
  for (int64_t user = 0; user < batch.num_users; ++user) {
    int64_t entries = 0, entry_rows = 0, tokens = 0;
    for (int64_t i = batch.user_offsets[user]; i < batch.user_offsets[user + 1]; ++i) {
      const int32_t item = batch.items[i];
      if (!has_title(batch, item)) return {Status::kCatalogOffsets, item};
      const int64_t length = title_length(batch, item);
      const uint8_t level = batch.levels[i];
      tokens += length;
      entries += level != kJoin;
      entry_rows += level == kText ? length : level == kPatch;
      if (level != kText) {
        const int32_t known = numbering.count();
        const int32_t number = numbering.number(item);
        numbers[pooled++] = number;
        if (number == known) {
          title_index[number] = item;
          title_tokens += length;
        }
      }
    }
    int64_t rows =
        head_of(batch, user).count + entry_rows + std::max<int64_t>(entries - 1, 0) * batch.separator.count;
    if (!is_open(batch, user)) rows += batch.suffix.count;
    if (batch.targets != nullptr && !is_open(batch, user)) {
      if (!has_title(batch, batch.targets[user])) return {Status::kCatalogOffsets, batch.targets[user]};
      const int64_t response = title_length(batch, batch.targets[user]) + batch.response_end.count;
      counts->supervised += rows > 0 ? response : std::max<int64_t>(response - 1, 0);
      rows += response;
    }
    counts->rows += rows;
    counts->max_seqlen = std::max(counts->max_seqlen, rows);
    counts->history_tokens += tokens;
    counts->history_rows += entry_rows;
    const int64_t most = std::max({counts->rows, pooled, title_tokens});
    if (most > kMostRows) return {Status::kTooManyRows, most};
  }
  counts->pooled_items = pooled;
  counts->titles = numbering.count();
  counts->title_tokens = title_tokens;
  return {};
}

int64_t fill_rows(const Batch& batch, const RowCounts& counts, const int32_t* title_index, const RowArrays& arrays) {
  std::fill_n(arrays.hi, counts.rows, 0);
  if (batch.targets != nullptr) std::fill_n(arrays.labels, counts.rows, kIgnore);
  RowWriter writer{arrays.lo};
  int32_t pooled = 0;
  int64_t supervised = 0;
  arrays.cu_seqlens[0] = 0;
  for (int64_t user = 0; user < batch.num_users; ++user) {
    const int64_t first_row = writer.lo - arrays.lo;
    const int64_t begin = batch.user_offsets[user], end = batch.user_offsets[user + 1];
    writer.literals(head_of(batch, user));
    for (int64_t i = begin; i < end;) {
      if (i > begin) writer.literals(batch.separator);
      if (batch.levels[i] == kText) {
        const int32_t item = batch.items[i++];
        writer.literals(batch.catalog_tokens + batch.catalog_offsets[item], title_length(batch, item));
        continue;
      }
      *writer.lo = pooled;
      do {
        ++pooled;
        ++i;
      } while (i < end && batch.levels[i] == kJoin);
      arrays.hi[writer.lo++ - arrays.lo] = pooled;
    }
    if (!is_open(batch, user)) writer.literals(batch.suffix);
    if (batch.targets != nullptr && !is_open(batch, user)) {
      const int64_t response = writer.lo - arrays.lo;
      const int32_t target = batch.targets[user];
      writer.literals(batch.catalog_tokens + batch.catalog_offsets[target], title_length(batch, target));
      writer.literals(batch.response_end);
      // nothing stands before a user's first row, so nothing can predict it
      for (int64_t row = std::max(response, first_row + 1); row < writer.lo - arrays.lo; ++row) {
        arrays.labels[row] = -1 - int64_t{arrays.lo[row]};
        arrays.logit_rows[supervised] = row - 1;
        arrays.logit_labels[supervised++] = arrays.labels[row];
      }
    }
    const int64_t rows = writer.lo - arrays.lo - first_row;
    const int64_t hidden = batch.hidden == nullptr ? 0 : batch.hidden[user];
    for (int64_t row = 0; row < rows; ++row) arrays.position_ids[first_row + row] = hidden + row;
    arrays.cu_seqlens[user + 1] = static_cast<int32_t>(first_row + rows);
  }

  arrays.offsets[0] = 0;
  for (int64_t title = 0; title < counts.titles; ++title) {
    const int64_t length = title_length(batch, title_index[title]);
    std::copy_n(batch.catalog_tokens + batch.catalog_offsets[title_index[title]], length,
                arrays.token_ids + arrays.offsets[title]);
    arrays.offsets[title + 1] = arrays.offsets[title] + static_cast<int32_t>(length);
  }
  int32_t lowest = 0, largest = -1;
  for (int64_t row = 0; row < counts.rows; ++row) lowest = std::min(lowest, arrays.lo[row]);
  for (int64_t i = 0; i < counts.title_tokens; ++i) largest = std::max(largest, arrays.token_ids[i]);
  return std::max(-1 - lowest, largest);
}

Outcome count_contributions(const Rows& rows, ContributionCounts* counts) {
  *counts = {0, -1};
  int64_t at;
  if ((at = first_bad_offset(rows.offsets, rows.num_titles, rows.num_title_tokens)) >= 0) return {Status::kOffsets, at};
  if ((at = first_outside(rows.token_ids, rows.num_title_tokens, kMostRows)) >= 0) return {Status::kTitleToken, at};
  if ((at = first_outside(rows.items, rows.num_items, rows.num_titles)) >= 0) return {Status::kItem, at};
  int64_t contributions = 0;
  int32_t lowest = 0, largest = -1;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int32_t lo = rows.lo[row], hi = rows.hi[row];
    lowest = std::min(lowest, lo);
    if (lo < 0) {
      ++contributions;
      continue;
    }
    if (lo >= hi || hi > rows.num_items) return {Status::kRowRange, row};
    for (int32_t i = lo; i < hi; ++i) {
      const int64_t length = rows.offsets[rows.items[i] + 1] - rows.offsets[rows.items[i]];
      if (length * (hi - lo) > kMostRows) return {Status::kLargeDivisor, row};
      contributions += length;
    }
  }
  if (contributions > kMostRows) return {Status::kTooManyRows, contributions};
  for (int64_t i = 0; contributions > 0 && i < rows.num_title_tokens; ++i) largest = std::max(largest, rows.token_ids[i]);
  *counts = {contributions, std::max(-1 - lowest, largest)};
  return {};
}

// A counting sort by token. It is stable, so contributions stay ordered by row and by their place within a row.
int64_t fill_transpose(const Rows& rows, const ContributionCounts& counts, int32_t* tokens, int32_t* offsets,
                       int32_t* contribution_rows, int32_t* divisors) {
  constexpr size_t kGroup = 16;
  std::vector<int32_t> next((static_cast<size_t>(counts.max_token_id) + kGroup) / kGroup * kGroup);
  std::vector<int32_t> uses(static_cast<size_t>(rows.num_titles));
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int32_t lo = rows.lo[row];
    if (lo < 0) ++next[static_cast<size_t>(-1 - lo)];
    for (int32_t i = lo; i >= 0 && i < rows.hi[row]; ++i) ++uses[static_cast<size_t>(rows.items[i])];
  }
  for (int64_t title = 0; title < rows.num_titles; ++title) {
    const int32_t count = uses[static_cast<size_t>(title)];
    if (count == 0) continue;  // without contributions there is no table to count in
    for (int32_t t = rows.offsets[title]; t < rows.offsets[title + 1]; ++t) {
      next[static_cast<size_t>(rows.token_ids[t])] += count;
    }
  }
  int32_t distinct = 0, sum = 0;
  for (size_t group = 0; group < next.size(); group += kGroup) {
    // most of a vocabulary is absent from any batch
    int32_t present = 0;
    for (size_t i = 0; i < kGroup; ++i) present |= next[group + i];
    for (size_t token = group; present != 0 && token < group + kGroup; ++token) {
      const int32_t count = next[token];
      if (count == 0) continue;
      tokens[distinct] = static_cast<int32_t>(token);
      offsets[distinct++] = sum;
      next[token] = sum;
      sum += count;
    }
  }
  offsets[distinct] = sum;
  const auto place = [&](int32_t token, int64_t row, int32_t divisor) {
    const int32_t at = next[static_cast<size_t>(token)]++;
    contribution_rows[at] = static_cast<int32_t>(row);
    divisors[at] = divisor;
  };
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    const int32_t lo = rows.lo[row], hi = rows.hi[row];
    if (lo < 0) {
      place(-1 - lo, row, 1);
      continue;
    }
    for (int32_t i = lo; i < hi; ++i) {
      const int32_t begin = rows.offsets[rows.items[i]], end = rows.offsets[rows.items[i] + 1];
      for (int32_t t = begin; t < end; ++t) place(rows.token_ids[t], row, (end - begin) * (hi - lo));
    }
  }
  return distinct;
}

}  // namespace patchkern
