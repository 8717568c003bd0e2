// SPDX-License-Identifier: Apache-2.0
//
// The ABI of span attention on the CPU: addresses, sizes and status codes. No torch, no Python.
//
// Row r of span s sees rows cu_seqlens[s] .. r of the batch's own, and of the stored keys those of num_ranges ranges,
// prefix[s][i][0] .. prefix[s][i][1] - 1, which overlap neither each other nor the span. Scores, weights and sums are
// float32 (float64 for float64), whatever is stored. A score's weight is its share of all that a row sees (softmax), or
// its product with its own sigmoid, divided by a constant (silu).

#pragma once

#include <cstdint>

#include "pool_rows.h"

namespace patchkern {

// (rows, heads, width), unit stride in the last dimension; strides count elements.
struct Heads {
  const void* data;
  int64_t row_stride, head_stride;
};

enum class Activation : int { kSoftmax = 0, kSilu = 1 };
constexpr int kNumActivations = 2;

struct SpanAttention {
  DType dtype;  // of all but lse
  Activation activation;
  int64_t num_rows, num_spans, num_ranges, heads, key_heads, width, value_width;
  const int32_t* cu_seqlens;  // num_spans + 1
  const int32_t* prefix;      // num_spans x num_ranges x 2
  double scale, normalizer;  // of silu
  Heads query, key, value;
  int64_t num_stored;
  Heads stored_key, stored_value;  // key and value themselves where `apart` is false
  bool apart;
  void* out;  // (num_rows, heads, value_width)
  void* lse;  // (num_rows, heads), wide: the log-sum-exp of each row's scores; of softmax
};

// `attention` with what its forward pass wrote, which silu does not read. Keys' and values' gradients are wide, and added
// to what is there.
struct SpanAttentionGrad {
  SpanAttention attention;
  Heads grad_out;
  void* grad_query;  // (num_rows, heads, width)
  void *grad_key, *grad_value;                // (num_rows, key_heads, ...)
  void *grad_stored_key, *grad_stored_value;  // (num_stored, key_heads, ...), or the two above
};

// Both check all offsets and ranges before they write anything. The result depends on neither num_threads nor timing.
Outcome span_attention(const SpanAttention& call, int num_threads, const char* isa);
Outcome span_attention_grad(const SpanAttentionGrad& call, int num_threads, const char* isa);

// Stored rows begin .. end - 1, the longest of the query rows' ranges that begin there;
// `shared` is where the shortest ends.
struct SpanRange {
  int64_t begin, end, shared;
  int64_t rows() const { return end - begin; }
};

// Query rows begin .. end - 1, attended together: rows of one span, or all rows of several whose ranges begin alike.
struct SpanBlock {
  int64_t begin, end;
  int64_t first_span, last_span;  // whose rows these are, the last included
  const SpanRange* prefix;        // num_ranges

  int64_t rows() const { return end - begin; }
};

// Query rows times heads per key head of a block, at most, unless one row has more.
constexpr int64_t kSpanLanes = 192;

// One instruction set's kernels, one function per activation and dtype. A kernel handles one block and one key head, and
// checks nothing.
struct SpanKernels {
  const char* isa;
  // bytes of scratch, 64-aligned, for blocks of `lanes` at most
  int64_t (*scratch)(const SpanAttention& call, int64_t lanes, bool backward);
  void (*forward[kNumActivations][kNumDTypes])(const SpanAttention& call, int64_t key_head, const SpanBlock& block,
                                                     void* scratch);
  void (*backward[kNumActivations][kNumDTypes])(const SpanAttentionGrad& call, int64_t key_head, const SpanBlock& block,
                                                      void* scratch);
};

}  // namespace patchkern
