// SPDX-License-Identifier: Apache-2.0
//
// A block's rows, the keys that they see, and their way from memory into scratch. A part of span_attention_kernels.cpp.

#pragma once

#include "span_attention.h"
#include "span_numbers.h"

namespace patchkern {
namespace PK_ISA {
namespace {

constexpr int64_t kKeys = 64;  // keys whose scores are held at once

template <class Type>
int64_t padded(int64_t width) {
  return (width + Type::kLanes - 1) / Type::kLanes * Type::kLanes;
}

// Hands out pieces of scratch, each whole vectors; with no memory it only counts.
template <class Type>
struct Scratch {
  char* memory;
  int64_t used = 0;
  template <class T = typename Type::Scalar>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(memory + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory == nullptr ? nullptr : piece;
  }
};

// The lanes of a block, and which keys each sees.
template <class Type>
struct Lanes {
  using Integer = typename Type::Integer;
  int64_t group, count, stride;  // lanes and lanes with padding
  int64_t ranges;
  Integer *prefix_end, *own_begin, *own_row;  // of each lane, the first range after range; padding sees nothing

  Lanes(const SpanAttention& call, int64_t lanes, Scratch<Type>& scratch)
      : group(call.heads / call.key_heads), count(lanes), stride(padded<Type>(lanes)),
        ranges(call.num_ranges), prefix_end(scratch.template take<Integer>(ranges * stride)),
        own_begin(scratch.template take<Integer>(stride)),
        own_row(scratch.template take<Integer>(stride)) {}

  void describe(const SpanAttention& call, const SpanBlock& block) {
    int64_t lane = 0;
    for (int64_t span = block.first_span; span <= block.last_span; ++span) {
      const int64_t begin = call.cu_seqlens[span] > block.begin ? call.cu_seqlens[span] : block.begin;
      const int64_t end = call.cu_seqlens[span + 1] < block.end ? call.cu_seqlens[span + 1] : block.end;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t head = 0; head < group; ++head, ++lane) {
          for (int64_t range = 0; range < ranges; ++range) {
            prefix_end[range * stride + lane] = static_cast<Integer>(call.prefix[2 * (span * ranges + range) + 1]);
          }
          own_begin[lane] = static_cast<Integer>(call.cu_seqlens[span]);
          own_row[lane] = static_cast<Integer>(row);
        }
      }
    }
    for (; lane < stride; ++lane) {
      for (int64_t range = 0; range < ranges; ++range) prefix_end[range * stride + lane] = 0;
      own_begin[lane] = 0, own_row[lane] = -1;
    }
  }
};

constexpr int64_t kOwn = -1;

// Keys begin .. end - 1, and the first lane, whole vectors from the block's, that sees any of them.
struct Keys {
  int64_t begin, end;
  int64_t range;  // that these are of, or kOwn
  bool partly;    // some lanes do not see all
  int64_t first_lane;
  int64_t count() const { return end - begin; }
  bool stored() const { return range != kOwn; }
};

// Calls visit(keys) for all that a block sees, in an order that depends on nothing else.
template <class Type, class Visit>
void visit_keys(const SpanAttention& call, const SpanBlock& block, int64_t group, const Visit& visit) {
  for (int64_t range = 0; range < call.num_ranges; ++range) {
    const SpanRange& of = block.prefix[range];
    for (int64_t at = of.begin; at < of.end; at += kKeys) {
      const int64_t end = at + kKeys < of.end ? at + kKeys : of.end;
      visit(Keys{at, end, range, end > of.shared, 0});
    }
  }
  const bool several = block.first_span != block.last_span;
  for (int64_t at = call.cu_seqlens[block.first_span]; at < block.end; at += kKeys) {
    const int64_t end = at + kKeys < block.end ? at + kKeys : block.end;
    const int64_t unseen = at > block.begin ? (at - block.begin) * group : 0;
    visit(Keys{at, end, kOwn, several || end > block.begin + 1, unseen / Type::kLanes * Type::kLanes});
  }
}

// Minus infinity, or zero, for keys that a lane does not see.
template <class Type>
inline typename Type::Vector seen_only(const Lanes<Type>& lanes, const Keys& keys, int64_t key, int64_t lane,
                                       typename Type::Vector x, typename Type::Vector otherwise) {
  using Integers = typename Type::Integers;
  Integers end, begin, row;
  const typename Type::Integer n = static_cast<typename Type::Integer>(key);
  if (keys.stored()) {
    __builtin_memcpy(&end, lanes.prefix_end + keys.range * lanes.stride + lane, sizeof(end));
    return end > n ? x : otherwise;
  }
  __builtin_memcpy(&begin, lanes.own_begin + lane, sizeof(begin));
  __builtin_memcpy(&row, lanes.own_row + lane, sizeof(row));
  return ((begin <= n) & (row >= n)) ? x : otherwise;
}

// One head's rows begin .. begin + count - 1 as (count, stride), widened; the rest of a row is zero.
template <class Type>
void load_rows(const Heads& from, int64_t begin, int64_t count, int64_t head, int64_t width,
               typename Type::Scalar* to, int64_t stride) {
  using Element = typename Type::Element;
  const Element* const data = static_cast<const Element*>(from.data) + head * from.head_stride;
  for (int64_t row = 0; row < count; ++row) {
    const Element* const source = data + (begin + row) * from.row_stride;
    typename Type::Scalar* const target = to + row * stride;
    for (int64_t i = 0; i < width; ++i) target[i] = Type::widen(source[i]);
    for (int64_t i = width; i < stride; ++i) target[i] = 0;
  }
}

// A block's rows of all heads that share a key head, lane by lane, times `scale`.
template <class Type>
void load_lanes(const Heads& from, const SpanBlock& block, int64_t key_head, int64_t group, int64_t width,
                typename Type::Scalar scale, typename Type::Scalar* to, int64_t stride) {
  using Element = typename Type::Element;
  for (int64_t row = block.begin; row < block.end; ++row) {
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head, to += stride) {
      const Element* const source =
          static_cast<const Element*>(from.data) + row * from.row_stride + head * from.head_stride;
      for (int64_t i = 0; i < width; ++i) to[i] = Type::widen(source[i]) * scale;
      for (int64_t i = width; i < stride; ++i) to[i] = 0;
    }
  }
}

// (lanes, width) as (width, lanes); padding lanes become zero.
template <class Type>
void transpose(const typename Type::Scalar* from, int64_t from_stride, int64_t width, int64_t count, int64_t stride,
               typename Type::Scalar* to) {
  constexpr int64_t kLanes = Type::kLanes;
  int64_t lane = 0;
  for (; lane + kLanes <= count; lane += kLanes) {
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t k = 0; k < kLanes; ++k) to[i * stride + lane + k] = from[(lane + k) * from_stride + i];
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t k = lane; k < stride; ++k) to[i * stride + k] = k < count ? from[k * from_stride + i] : 0;
  }
}

}  // namespace
}  // namespace PK_ISA
}  // namespace patchkern
