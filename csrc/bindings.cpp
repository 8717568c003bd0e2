// SPDX-License-Identifier: Apache-2.0
//
// patchkern._native: addresses and sizes in, status codes out. Python owns the memory, the dtypes and the messages, so
// one build works under every torch.

#include "bind.h"
#include "layout.h"
#include "pool_rows.h"
#include "span_attention.h"

using namespace patchkern;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Status and position, then what was counted.
template <class... Counts>
auto result(const Outcome& outcome, Counts... counts) {
  return std::make_tuple(static_cast<int>(outcome.status), outcome.position, counts...);
}

Batch batch_of(uintptr_t catalog_tokens, uintptr_t catalog_offsets, int64_t num_catalog_tokens,
               int64_t catalog_size, uintptr_t items, int64_t num_items, uintptr_t user_offsets, int64_t num_users,
               uintptr_t levels, uintptr_t targets,
               uintptr_t heads, uintptr_t hidden, uintptr_t prompt, int64_t prefix, int64_t separator, int64_t suffix,
               int64_t response_end) {
  // the prompt's parts lie one after the other
  const int32_t* ids = at<const int32_t>(prompt);
  const Tokens parts[4] = {{ids, prefix},
                           {ids + prefix, separator},
                           {ids + prefix + separator, suffix},
                           {ids + prefix + separator + suffix, response_end}};
  return {at<const int32_t>(catalog_tokens), at<const int32_t>(catalog_offsets), num_catalog_tokens, catalog_size,
          at<const int32_t>(items), num_items, at<const int64_t>(user_offsets), num_users,
          at<const uint8_t>(levels), at<const int32_t>(targets), at<const uint8_t>(heads), at<const int64_t>(hidden),
          parts[0], parts[1], parts[2], parts[3]};
}

std::vector<const char*> isa_levels_py() {
  std::vector<const char*> names;
  for (const Kernels* const* level = isa_levels(); *level != nullptr; ++level) names.push_back((*level)->isa);
  return names;
}

auto pool_rows_py(int dtype, uintptr_t weight, int64_t num_embeddings, int64_t dim, int64_t weight_stride, uintptr_t lo,
                  uintptr_t hi, int64_t num_rows, uintptr_t items, int64_t num_items, uintptr_t token_ids,
                  int64_t num_title_tokens, uintptr_t offsets, int64_t num_titles, uintptr_t table,
                  int64_t num_table_rows, int64_t table_stride, uintptr_t title_index, double scale, uintptr_t out,
                  int64_t out_stride, int num_threads, const char* isa) {
  const PoolRows call = {static_cast<DType>(dtype), at<const void>(weight), num_embeddings, dim, weight_stride,
                         at<const int32_t>(lo), at<const int32_t>(hi), num_rows, at<const int32_t>(items), num_items,
                         at<const int32_t>(token_ids), num_title_tokens, at<const int32_t>(offsets), num_titles,
                         at<const void>(table), num_table_rows, table_stride, at<const int32_t>(title_index), scale,
                         at<void>(out), out_stride};
  return result(pool_rows(call, num_threads, isa));
}

auto pool_rows_grad_py(int dtype, uintptr_t grad_rows, int64_t num_rows, int64_t dim, int64_t grad_stride,
                       uintptr_t tokens, int64_t num_tokens, uintptr_t offsets, uintptr_t rows, uintptr_t divisors,
                       int64_t num_contributions, double scale, bool scatter, bool accumulate, uintptr_t out,
                       int64_t num_out_rows, int64_t out_stride, int num_threads, const char* isa) {
  const PoolRowsGrad call = {static_cast<DType>(dtype), at<const void>(grad_rows), num_rows, dim, grad_stride,
                             at<const int32_t>(tokens), num_tokens, at<const int32_t>(offsets),
                             at<const int32_t>(rows), at<const int32_t>(divisors), num_contributions, scale, scatter,
                             accumulate, at<void>(out), num_out_rows, out_stride};
  return result(pool_rows_grad(call, num_threads, isa));
}

// Each of `heads` is an address, a row's stride and a head's.
SpanAttention spans_of(int dtype, int64_t num_rows, int64_t num_spans, int64_t num_ranges, int64_t heads,
                       int64_t key_heads, int64_t width, int64_t value_width, uintptr_t cu_seqlens, uintptr_t prefix,
                       double scale, bool silu, double normalizer, uintptr_t strided, int64_t num_stored, bool apart,
                       uintptr_t out, uintptr_t lse) {
  const int64_t* numbers = at<const int64_t>(strided);
  const auto next = [&]() -> Heads {
    numbers += 3;
    return {at<const void>(static_cast<uintptr_t>(numbers[-3])), numbers[-2], numbers[-1]};
  };
  const Heads query = next(), key = next(), value = next(), stored_key = next(), stored_value = next();
  const Activation activation = silu ? Activation::kSilu : Activation::kSoftmax;
  return {static_cast<DType>(dtype), activation, num_rows, num_spans, num_ranges, heads, key_heads, width, value_width,
          at<const int32_t>(cu_seqlens), at<const int32_t>(prefix), scale, normalizer, query, key, value, num_stored,
          stored_key, stored_value, apart, at<void>(out), at<void>(lse)};
}

auto span_attention_py(int dtype, int64_t num_rows, int64_t num_spans, int64_t num_ranges, int64_t heads,
                       int64_t key_heads, int64_t width, int64_t value_width, uintptr_t cu_seqlens, uintptr_t prefix,
                       double scale, bool silu, double normalizer, uintptr_t strided, int64_t num_stored, bool apart,
                       uintptr_t out, uintptr_t lse, int num_threads, const char* isa) {
  return result(span_attention(spans_of(dtype, num_rows, num_spans, num_ranges, heads, key_heads, width, value_width,
                                        cu_seqlens, prefix, scale, silu, normalizer, strided, num_stored, apart, out, lse),
                               num_threads, isa));
}

auto span_attention_grad_py(int dtype, int64_t num_rows, int64_t num_spans, int64_t num_ranges, int64_t heads,
                            int64_t key_heads, int64_t width, int64_t value_width, uintptr_t cu_seqlens,
                            uintptr_t prefix, double scale, bool silu, double normalizer, uintptr_t strided,
                            int64_t num_stored, bool apart, uintptr_t out, uintptr_t lse,
                            uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value, uintptr_t grad_stored_key,
                            uintptr_t grad_stored_value, int num_threads, const char* isa) {
  const int64_t* grad_out = at<const int64_t>(strided) + 15;
  const SpanAttentionGrad call = {
      spans_of(dtype, num_rows, num_spans, num_ranges, heads, key_heads, width, value_width, cu_seqlens, prefix, scale,
               silu, normalizer, strided, num_stored, apart, out, lse),
      {at<const void>(static_cast<uintptr_t>(grad_out[0])), grad_out[1], grad_out[2]},
      at<void>(grad_query), at<void>(grad_key), at<void>(grad_value), at<void>(grad_stored_key),
      at<void>(grad_stored_value)};
  return result(span_attention_grad(call, num_threads, isa));
}

auto count_rows_py(uintptr_t catalog_tokens, uintptr_t catalog_offsets, int64_t num_catalog_tokens,
                   int64_t catalog_size, uintptr_t items, int64_t num_items, uintptr_t user_offsets, int64_t num_users, uintptr_t levels, uintptr_t targets,
                   uintptr_t heads, uintptr_t hidden, uintptr_t prompt, int64_t prefix, int64_t separator,
                   int64_t suffix, int64_t response_end, uintptr_t numbers, uintptr_t title_index) {
  const Batch batch = batch_of(catalog_tokens, catalog_offsets, num_catalog_tokens, catalog_size, items, num_items,
                               user_offsets, num_users, levels, targets, heads, hidden, prompt, prefix, separator, suffix, response_end);
  RowCounts counts = {};
  const Outcome outcome = count_rows(batch, at<int32_t>(numbers), at<int32_t>(title_index), &counts);
  return result(outcome, counts.rows, counts.pooled_items, counts.titles, counts.title_tokens, counts.supervised,
                counts.max_seqlen, counts.history_tokens, counts.history_rows);
}

int64_t fill_rows_py(uintptr_t catalog_tokens, uintptr_t catalog_offsets, int64_t num_catalog_tokens,
                     int64_t catalog_size, uintptr_t items, int64_t num_items, uintptr_t user_offsets, int64_t num_users, uintptr_t levels, uintptr_t targets,
                     uintptr_t heads, uintptr_t hidden, uintptr_t prompt, int64_t prefix, int64_t separator,
                     int64_t suffix, int64_t response_end, int64_t rows, int64_t titles, int64_t title_tokens,
                     uintptr_t title_index, uintptr_t lo, uintptr_t hi, uintptr_t token_ids, uintptr_t offsets,
                     uintptr_t cu_seqlens, uintptr_t position_ids, uintptr_t labels, uintptr_t logit_rows,
                     uintptr_t logit_labels) {
  const Batch batch = batch_of(catalog_tokens, catalog_offsets, num_catalog_tokens, catalog_size, items, num_items,
                               user_offsets, num_users, levels, targets, heads, hidden, prompt, prefix, separator, suffix, response_end);
  RowCounts counts = {};
  counts.rows = rows;
  counts.titles = titles;
  counts.title_tokens = title_tokens;
  const RowArrays arrays = {at<int32_t>(lo), at<int32_t>(hi), at<int32_t>(token_ids), at<int32_t>(offsets),
                            at<int32_t>(cu_seqlens), at<int64_t>(position_ids), at<int64_t>(labels),
                            at<int64_t>(logit_rows), at<int64_t>(logit_labels)};
  return fill_rows(batch, counts, at<const int32_t>(title_index), arrays);
}

auto count_contributions_py(uintptr_t lo, uintptr_t hi, int64_t num_rows, uintptr_t items, int64_t num_items,
                            uintptr_t token_ids, int64_t num_title_tokens, uintptr_t offsets, int64_t num_titles) {
  const Rows rows = {at<const int32_t>(lo), at<const int32_t>(hi), num_rows, at<const int32_t>(items), num_items,
                     at<const int32_t>(token_ids), num_title_tokens, at<const int32_t>(offsets), num_titles};
  ContributionCounts counts = {};
  const Outcome outcome = count_contributions(rows, &counts);
  return result(outcome, counts.contributions, counts.max_token_id);
}

int64_t fill_transpose_py(uintptr_t lo, uintptr_t hi, int64_t num_rows, uintptr_t items, int64_t num_items,
                          uintptr_t token_ids, int64_t num_title_tokens, uintptr_t offsets, int64_t num_titles,
                          int64_t contributions, int64_t max_token_id, uintptr_t tokens, uintptr_t token_offsets,
                          uintptr_t contribution_rows, uintptr_t divisors) {
  const Rows rows = {at<const int32_t>(lo), at<const int32_t>(hi), num_rows, at<const int32_t>(items), num_items,
                     at<const int32_t>(token_ids), num_title_tokens, at<const int32_t>(offsets), num_titles};
  return fill_transpose(rows, {contributions, max_token_id}, at<int32_t>(tokens), at<int32_t>(token_offsets),
                        at<int32_t>(contribution_rows), at<int32_t>(divisors));
}

PyMethodDef functions[] = {
    bind::function<isa_levels_py>("isa_levels"),
    bind::function<pool_rows_py>("pool_rows"),
    bind::function<pool_rows_grad_py>("pool_rows_grad"),
    bind::function<span_attention_py>("span_attention"),
    bind::function<span_attention_grad_py>("span_attention_grad"),
    bind::function<count_rows_py>("count_rows"),
    bind::function<fill_rows_py>("fill_rows"),
    bind::function<count_contributions_py>("count_contributions"),
    bind::function<fill_transpose_py>("fill_transpose"),
    {},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
