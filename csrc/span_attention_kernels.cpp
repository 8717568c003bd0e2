// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of span attention, compiled once per instruction set as pool_rows_kernels.cpp is, and under its rules.
//
// A block's query rows times the heads that share a key head are the *lanes*: lane = row * group + head. Scores are
// kept transposed, (keys, lanes), so that maxima, sums and masks are vertical, and no lane's result depends on another
// lane. All products are one loop, C += A B, that broadcasts A's elements from wherever they lie and reads B's rows as
// vectors: 6 x 4 vectors of sums stay in registers. Per score: 2 x width products forward, 5 x width backward.

#include "span_attention.h"

#ifndef PK_ISA
#error "compile with -DPK_ISA=baseline, avx2 or avx512"
#endif
#define PK_STRING_OF(x) #x
#define PK_STRING(x) PK_STRING_OF(x)
#define PK_UNROLL _Pragma("GCC unroll 8")

namespace patchkern {
namespace PK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kColumns = 4;  // vectors of sums per row, of kRows
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kColumns = 2;
#else
constexpr int kVectorBytes = 16;
constexpr int kColumns = 2;
#endif
constexpr int kRows = 6;
constexpr int64_t kKeys = 64;  // keys whose scores are held at once

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits() changes the type, not the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// What exp() and log() need to know of a type; exp: 2^n times a polynomial of x - n log 2, |.| <= log(2) / 2.
struct Single {
  using Scalar = float;
  using Integer = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 4, kMantissa = 23, kTerms = 7;
  static constexpr float kRound = 12582912.f, kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr float kSmallest = -87.f, kLargest = 88.f;
  static float log(float x) { return __builtin_logf(x); }
};

struct Double {
  using Scalar = double;
  using Integer = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Unsigned __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8, kMantissa = 52, kTerms = 13;
  static constexpr double kRound = 6755399441055744.0, kLog2High = 6.93147180369123816490e-01;
  static constexpr double kLog2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallest = -708, kLargest = 709;
  static double log(double x) { return __builtin_log(x); }
};

constexpr double kInverseFactorials[] = {1.0,        1.0,         1.0 / 2,       1.0 / 6,        1.0 / 24,
                                         1.0 / 120,  1.0 / 720,   1.0 / 5040,    1.0 / 40320,    1.0 / 362880,
                                         1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};

template <class Type>
inline typename Type::Vector splat(typename Type::Scalar x) {
  return x - typename Type::Vector{};
}

// Zero below kSmallest, and so for minus infinity; NaN for NaN.
template <class Type>
inline typename Type::Vector exponential(typename Type::Vector x) {
  using Scalar = typename Type::Scalar;
  using Vector = typename Type::Vector;
  using Integers = typename Type::Integers;
  using Unsigned = typename Type::Unsigned;
  const Integers vanishes = x < splat<Type>(Type::kSmallest);
  x = x > splat<Type>(Type::kLargest) ? splat<Type>(Type::kLargest) : x;
  const Vector shifted = x * Scalar(1.44269504088896340736) + Type::kRound;
  const Vector n = shifted - Type::kRound;
  const Vector rest = (x - n * Type::kLog2High) - n * Type::kLog2Low;
  Vector sum = splat<Type>(Scalar(kInverseFactorials[Type::kTerms]));
  _Pragma("GCC unroll 16") for (int i = Type::kTerms - 1; i >= 0; --i) sum = sum * rest + Scalar(kInverseFactorials[i]);
  // unsigned: what vanishes may overflow here
  const Vector result = bits<Vector>(bits<Unsigned>(sum) + (bits<Unsigned>(shifted) << Type::kMantissa));
  return vanishes ? Vector{} : result;
}

// Storage: what an element is in memory, and the type it is computed in.
struct Float32 : Single {
  using Element = float;
  static float widen(float x) { return x; }
  static float round(float x) { return x; }
};
struct Float64 : Double {
  using Element = double;
  static double widen(double x) { return x; }
  static double round(double x) { return x; }
};
struct BFloat16 : Single {
  using Element = uint16_t;
  static float widen(uint16_t x) { return bits<float>(uint32_t{x} << 16); }
  static uint16_t round(float x) {
    const uint32_t raw = bits<uint32_t>(x);
    const uint32_t nearest_even = (raw + (0x7fffu + ((raw >> 16) & 1u))) >> 16;
    return static_cast<uint16_t>(x == x ? nearest_even : (raw >> 16) | 0x40u);
  }
};
// By arithmetic on the bits, which vectorises everywhere; subnormal numbers are numbers.
struct Float16 : Single {
  using Element = uint16_t;
  static float widen(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13, special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    const uint32_t raw = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f) | special;
    return bits<float>(raw | (x & 0x8000u) << 16);
  }
  static uint16_t round(float x) {
    const uint32_t raw = bits<uint32_t>(x), magnitude = raw & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rounded = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
    return static_cast<uint16_t>(rounded | (raw >> 16 & 0x8000u));
  }
};

// ---------------------------------------------------------------- products

// A matrix whose element (i, k) is data[i * row + k * column].
template <class Scalar>
struct Strided {
  const Scalar* data;
  int64_t row, column;
};

template <class Type, int rows, int columns>
void product_of(int64_t depth, const Strided<typename Type::Scalar>& a, const typename Type::Scalar* b, int64_t b_stride,
                typename Type::Scalar* c, int64_t c_stride, bool add) {
  using Vector = typename Type::Vector;
  constexpr int kLanes = Type::kLanes;
  Vector sums[rows][columns];
  const typename Type::Scalar* from[rows];
  PK_UNROLL for (int i = 0; i < rows; ++i) {
    from[i] = a.data + i * a.row;
    PK_UNROLL for (int j = 0; j < columns; ++j) sums[i][j] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[columns];
    PK_UNROLL for (int j = 0; j < columns; ++j) __builtin_memcpy(&row[j], b + j * kLanes, sizeof(Vector));
    PK_UNROLL for (int i = 0; i < rows; ++i) {
      const typename Type::Scalar factor = *from[i];
      from[i] += a.column;
      PK_UNROLL for (int j = 0; j < columns; ++j) sums[i][j] += factor * row[j];
    }
    b += b_stride;
  }
  PK_UNROLL for (int i = 0; i < rows; ++i) {
    PK_UNROLL for (int j = 0; j < columns; ++j) {
      Vector before = {};
      if (add) __builtin_memcpy(&before, c + i * c_stride + j * kLanes, sizeof(Vector));
      before += sums[i][j];
      __builtin_memcpy(c + i * c_stride + j * kLanes, &before, sizeof(Vector));
    }
  }
}

template <class Type, int columns, int rows = kRows>
void product_rows(int64_t count, int64_t depth, Strided<typename Type::Scalar> a, const typename Type::Scalar* b,
                  int64_t b_stride, typename Type::Scalar* c, int64_t c_stride, bool add) {
  for (; count >= rows; count -= rows) {
    product_of<Type, rows, columns>(depth, a, b, b_stride, c, c_stride, add);
    a.data += rows * a.row;
    c += rows * c_stride;
  }
  if constexpr (rows > 1) {
    if (count > 0) product_rows<Type, columns, rows - 1>(count, depth, a, b, b_stride, c, c_stride, add);
  }
}

template <class Type, int columns = kColumns>
void product_columns(int columns_wanted, int64_t count, int64_t depth, const Strided<typename Type::Scalar>& a,
                     const typename Type::Scalar* b, int64_t b_stride, typename Type::Scalar* c, int64_t c_stride,
                     bool add) {
  if (columns_wanted == columns) return product_rows<Type, columns>(count, depth, a, b, b_stride, c, c_stride, add);
  if constexpr (columns > 1) {
    product_columns<Type, columns - 1>(columns_wanted, count, depth, a, b, b_stride, c, c_stride, add);
  }
}

// C (count x width) = A (count x depth) B (depth x width), or += where `add`; whole vectors of `width`. Every element is
// summed in the order of `depth`, however the matrices are cut, and then added: sums of sums lose less.
template <class Type>
void product(int64_t count, int64_t width, int64_t depth, const Strided<typename Type::Scalar>& a,
             const typename Type::Scalar* b, int64_t b_stride, typename Type::Scalar* c, int64_t c_stride, bool add) {
  const int64_t vectors = (width + Type::kLanes - 1) / Type::kLanes;
  const int64_t panels = (vectors + kColumns - 1) / kColumns;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = vectors * panel / panels, end = vectors * (panel + 1) / panels;
    const int64_t at = begin * Type::kLanes;
    product_columns<Type>(static_cast<int>(end - begin), count, depth, a, b + at, b_stride, c + at, c_stride, add);
  }
}

// ---------------------------------------------------------------- a block's rows

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
  int64_t group, count, stride;                // lanes and lanes with padding
  Integer *prefix_end, *own_begin, *own_row;  // of each lane; padding sees nothing

  Lanes(const SpanAttention& call, int64_t lanes, Scratch<Type>& scratch)
      : group(call.heads / call.key_heads), count(lanes), stride(padded<Type>(lanes)),
        prefix_end(scratch.template take<Integer>(stride)), own_begin(scratch.template take<Integer>(stride)),
        own_row(scratch.template take<Integer>(stride)) {}

  void describe(const SpanAttention& call, const SpanBlock& block) {
    int64_t lane = 0;
    for (int64_t span = block.first_span; span <= block.last_span; ++span) {
      const int64_t begin = call.cu_seqlens[span] > block.begin ? call.cu_seqlens[span] : block.begin;
      const int64_t end = call.cu_seqlens[span + 1] < block.end ? call.cu_seqlens[span + 1] : block.end;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t head = 0; head < group; ++head, ++lane) {
          prefix_end[lane] = static_cast<Integer>(call.prefix[2 * span + 1]);
          own_begin[lane] = static_cast<Integer>(call.cu_seqlens[span]);
          own_row[lane] = static_cast<Integer>(row);
        }
      }
    }
    for (; lane < stride; ++lane) prefix_end[lane] = own_begin[lane] = 0, own_row[lane] = -1;
  }
};

// Keys begin .. end - 1, stored or own, and the first lane, whole vectors from the block's, that sees any of them.
struct Keys {
  int64_t begin, end;
  bool stored, partly;  // partly: some lanes do not see all
  int64_t first_lane;
  int64_t count() const { return end - begin; }
};

// Calls visit(keys) for all that a block sees, in an order that depends on nothing else.
template <class Type, class Visit>
void visit_keys(const SpanAttention& call, const SpanBlock& block, int64_t group, const Visit& visit) {
  for (int64_t at = block.prefix_begin; at < block.prefix_end; at += kKeys) {
    const int64_t end = at + kKeys < block.prefix_end ? at + kKeys : block.prefix_end;
    visit(Keys{at, end, true, end > block.shared, 0});
  }
  const bool several = block.first_span != block.last_span;
  for (int64_t at = call.cu_seqlens[block.first_span]; at < block.end; at += kKeys) {
    const int64_t end = at + kKeys < block.end ? at + kKeys : block.end;
    const int64_t unseen = at > block.begin ? (at - block.begin) * group : 0;
    visit(Keys{at, end, false, several || end > block.begin + 1, unseen / Type::kLanes * Type::kLanes});
  }
}

// Minus infinity, or zero, for keys that a lane does not see.
template <class Type>
inline typename Type::Vector seen_only(const Lanes<Type>& lanes, const Keys& keys, int64_t key, int64_t lane,
                                       typename Type::Vector x, typename Type::Vector otherwise) {
  using Integers = typename Type::Integers;
  Integers end, begin, row;
  const typename Type::Integer n = static_cast<typename Type::Integer>(key);
  if (keys.stored) {
    __builtin_memcpy(&end, lanes.prefix_end + lane, sizeof(end));
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

// ---------------------------------------------------------------- forward

template <class Type>
struct Forward {
  using Scalar = typename Type::Scalar;
  Scratch<Type> scratch;
  Lanes<Type> lanes;
  int64_t width, value_width;  // padded
  Scalar *query, *transposed, *key, *value, *scores, *out, *peak, *total, *decay;

  Forward(const SpanAttention& call, int64_t count, void* memory)
      : scratch{static_cast<char*>(memory)}, lanes(call, count, scratch), width(padded<Type>(call.width)),
        value_width(padded<Type>(call.value_width)), query(scratch.take(lanes.stride * width)),
        transposed(scratch.take(lanes.stride * call.width)), key(scratch.take(kKeys * width)),
        value(scratch.take(kKeys * value_width)), scores(scratch.take(kKeys * lanes.stride)),
        out(scratch.take(lanes.stride * value_width)), peak(scratch.take(lanes.stride)),
        total(scratch.take(lanes.stride)), decay(scratch.take(lanes.stride)) {}

  // Scores into weights, relative to the highest score so far; what was summed before is worth `decay` of it now.
  void weigh(const Keys& keys) {
    using Vector = typename Type::Vector;
    const Vector lowest = splat<Type>(-static_cast<Scalar>(__builtin_inf()));
    for (int64_t lane = keys.first_lane; lane < lanes.stride; lane += Type::kLanes) {
      Vector highest, sum = {}, sum_before;
      __builtin_memcpy(&highest, peak + lane, sizeof(Vector));
      __builtin_memcpy(&sum_before, total + lane, sizeof(Vector));
      const Vector before = highest;
      Scalar* const column = scores + lane;
      for (int64_t k = 0; k < keys.count(); ++k) {
        Vector score;
        __builtin_memcpy(&score, column + k * lanes.stride, sizeof(Vector));
        if (keys.partly) {
          score = seen_only<Type>(lanes, keys, keys.begin + k, lane, score, lowest);
          __builtin_memcpy(column + k * lanes.stride, &score, sizeof(Vector));
        }
        highest = score > highest ? score : highest;
      }
      const Vector shift = highest > lowest ? highest : Vector{};
      const Vector factor = exponential<Type>(before - shift);
      for (int64_t k = 0; k < keys.count(); ++k) {
        Vector score;
        __builtin_memcpy(&score, column + k * lanes.stride, sizeof(Vector));
        score = exponential<Type>(score - shift);
        sum += score;
        __builtin_memcpy(column + k * lanes.stride, &score, sizeof(Vector));
      }
      sum += sum_before * factor;
      __builtin_memcpy(peak + lane, &highest, sizeof(Vector));
      __builtin_memcpy(total + lane, &sum, sizeof(Vector));
      __builtin_memcpy(decay + lane, &factor, sizeof(Vector));
    }
  }

  void run(const SpanAttention& call, int64_t key_head, const SpanBlock& block) {
    lanes.describe(call, block);
    load_lanes<Type>(call.query, block, key_head, lanes.group, call.width, static_cast<Scalar>(call.scale), query, width);
    transpose<Type>(query, width, call.width, lanes.count, lanes.stride, transposed);
    for (int64_t lane = 0; lane < lanes.stride; ++lane) {
      peak[lane] = -static_cast<Scalar>(__builtin_inf());
      total[lane] = 0;
    }
    for (int64_t i = 0; i < lanes.count * value_width; ++i) out[i] = 0;
    visit_keys<Type>(call, block, lanes.group, [&](const Keys& keys) {
      const int64_t first = keys.first_lane, count = lanes.count - first;
      load_rows<Type>(keys.stored ? call.stored_key : call.key, keys.begin, keys.count(), key_head, call.width, key, width);
      load_rows<Type>(keys.stored ? call.stored_value : call.value, keys.begin, keys.count(), key_head, call.value_width,
                      value, value_width);
      product<Type>(keys.count(), lanes.stride - first, call.width, {key, width, 1}, transposed + first, lanes.stride,
                    scores + first, lanes.stride, false);
      weigh(keys);
      for (int64_t lane = first; lane < lanes.count; ++lane) {
        if (decay[lane] == 1) continue;
        for (int64_t i = 0; i < value_width; ++i) out[lane * value_width + i] *= decay[lane];
      }
      product<Type>(count, value_width, keys.count(), {scores + first, 1, lanes.stride}, value, value_width,
                    out + first * value_width, value_width, true);
    });
    store(call, key_head, block);
  }

  void store(const SpanAttention& call, int64_t key_head, const SpanBlock& block) const {
    using Element = typename Type::Element;
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t place = (block.begin + lane / lanes.group) * call.heads + key_head * lanes.group + lane % lanes.group;
      Element* const target = static_cast<Element*>(call.out) + place * call.value_width;
      const Scalar share = 1 / total[lane];
      for (int64_t i = 0; i < call.value_width; ++i) target[i] = Type::round(out[lane * value_width + i] * share);
      static_cast<Scalar*>(call.lse)[place] = peak[lane] + Type::log(total[lane]);
    }
  }
};

// ---------------------------------------------------------------- backward

template <class Type>
struct Backward {
  using Scalar = typename Type::Scalar;
  Scratch<Type> scratch;
  Lanes<Type> lanes;
  int64_t width, value_width;  // padded
  Scalar *query, *query_transposed, *grad, *grad_transposed, *key, *value, *weights, *grad_scores;
  Scalar *grad_query, *grad_key, *grad_value, *lse, *balance;

  Backward(const SpanAttention& call, int64_t count, void* memory)
      : scratch{static_cast<char*>(memory)}, lanes(call, count, scratch), width(padded<Type>(call.width)),
        value_width(padded<Type>(call.value_width)), query(scratch.take(lanes.stride * width)),
        query_transposed(scratch.take(lanes.stride * call.width)), grad(scratch.take(lanes.stride * value_width)),
        grad_transposed(scratch.take(lanes.stride * call.value_width)), key(scratch.take(kKeys * width)),
        value(scratch.take(kKeys * value_width)), weights(scratch.take(kKeys * lanes.stride)),
        grad_scores(scratch.take(kKeys * lanes.stride)), grad_query(scratch.take(lanes.stride * width)),
        grad_key(scratch.take(kKeys * width)), grad_value(scratch.take(kKeys * value_width)),
        lse(scratch.take(lanes.stride)), balance(scratch.take(lanes.stride)) {}

  // Scores and the weights' gradients into weights and the scores' gradients.
  void weigh(const Keys& keys) {
    using Vector = typename Type::Vector;
    for (int64_t k = 0; k < keys.count(); ++k) {
      Scalar *const weight_row = weights + k * lanes.stride, *const grad_row = grad_scores + k * lanes.stride;
      for (int64_t lane = keys.first_lane; lane < lanes.stride; lane += Type::kLanes) {
        Vector weight, change, sum, shared;
        __builtin_memcpy(&weight, weight_row + lane, sizeof(Vector));
        __builtin_memcpy(&change, grad_row + lane, sizeof(Vector));
        __builtin_memcpy(&sum, lse + lane, sizeof(Vector));
        __builtin_memcpy(&shared, balance + lane, sizeof(Vector));
        weight = exponential<Type>(weight - sum);
        change = weight * (change - shared);
        if (keys.partly) {
          weight = seen_only<Type>(lanes, keys, keys.begin + k, lane, weight, Vector{});
          change = seen_only<Type>(lanes, keys, keys.begin + k, lane, change, Vector{});
        }
        __builtin_memcpy(weight_row + lane, &weight, sizeof(Vector));
        __builtin_memcpy(grad_row + lane, &change, sizeof(Vector));
      }
    }
  }

  void run(const SpanAttentionGrad& call, int64_t key_head, const SpanBlock& block) {
    const SpanAttention& of = call.attention;
    const Scalar scale = static_cast<Scalar>(of.scale);
    lanes.describe(of, block);
    load_lanes<Type>(of.query, block, key_head, lanes.group, of.width, scale, query, width);
    transpose<Type>(query, width, of.width, lanes.count, lanes.stride, query_transposed);
    load_lanes<Type>(call.grad_out, block, key_head, lanes.group, of.value_width, 1, grad, value_width);
    transpose<Type>(grad, value_width, of.value_width, lanes.count, lanes.stride, grad_transposed);
    load_sums(of, key_head, block);
    for (int64_t i = 0; i < lanes.count * width; ++i) grad_query[i] = 0;
    visit_keys<Type>(of, block, lanes.group, [&](const Keys& keys) {
      const int64_t first = keys.first_lane, seen = lanes.stride - first, count = lanes.count - first;
      const int64_t stride = lanes.stride;
      load_rows<Type>(keys.stored ? of.stored_key : of.key, keys.begin, keys.count(), key_head, of.width, key, width);
      load_rows<Type>(keys.stored ? of.stored_value : of.value, keys.begin, keys.count(), key_head, of.value_width, value,
                      value_width);
      product<Type>(keys.count(), seen, of.width, {key, width, 1}, query_transposed + first, stride, weights + first,
                    stride, false);
      product<Type>(keys.count(), seen, of.value_width, {value, value_width, 1}, grad_transposed + first, stride,
                    grad_scores + first, stride, false);
      weigh(keys);
      product<Type>(count, width, keys.count(), {grad_scores + first, 1, stride}, key, width, grad_query + first * width,
                    width, true);
      product<Type>(keys.count(), width, count, {grad_scores + first, stride, 1}, query + first * width, width, grad_key,
                    width, false);
      product<Type>(keys.count(), value_width, count, {weights + first, stride, 1}, grad + first * value_width,
                    value_width, grad_value, value_width, false);
      add_rows(keys.stored ? call.grad_stored_key : call.grad_key, of, keys, key_head, of.width, grad_key, width);
      add_rows(keys.stored ? call.grad_stored_value : call.grad_value, of, keys, key_head, of.value_width, grad_value,
               value_width);
    });
    store(call, key_head, block);
  }

  void load_sums(const SpanAttention& of, int64_t key_head, const SpanBlock& block) {
    using Element = typename Type::Element;
    for (int64_t lane = 0; lane < lanes.stride; ++lane) {
      lse[lane] = balance[lane] = 0;
      if (lane >= lanes.count) continue;
      const int64_t place = (block.begin + lane / lanes.group) * of.heads + key_head * lanes.group + lane % lanes.group;
      const Element* const out = static_cast<const Element*>(of.out) + place * of.value_width;
      const Scalar* const change = grad + lane * value_width;
      typename Type::Vector sums = {};
      int64_t i = 0;
      for (; i + Type::kLanes <= of.value_width; i += Type::kLanes) {
        Scalar wide[Type::kLanes];
        for (int k = 0; k < Type::kLanes; ++k) wide[k] = Type::widen(out[i + k]) * change[i + k];
        sums += bits<typename Type::Vector>(wide);
      }
      for (; i < of.value_width; ++i) balance[lane] += change[i] * Type::widen(out[i]);
      for (int k = 0; k < Type::kLanes; ++k) balance[lane] += sums[k];
      lse[lane] = static_cast<const Scalar*>(of.lse)[place];
    }
  }

  static void add_rows(void* to, const SpanAttention& of, const Keys& keys, int64_t key_head, int64_t columns,
                       const Scalar* from, int64_t stride) {
    for (int64_t row = 0; row < keys.count(); ++row) {
      Scalar* const target = static_cast<Scalar*>(to) + ((keys.begin + row) * of.key_heads + key_head) * columns;
      for (int64_t i = 0; i < columns; ++i) target[i] += from[row * stride + i];
    }
  }

  void store(const SpanAttentionGrad& call, int64_t key_head, const SpanBlock& block) const {
    const SpanAttention& of = call.attention;
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t place = (block.begin + lane / lanes.group) * of.heads + key_head * lanes.group + lane % lanes.group;
      auto* const target = static_cast<typename Type::Element*>(call.grad_query) + place * of.width;
      const Scalar scale = static_cast<Scalar>(of.scale);
      for (int64_t i = 0; i < of.width; ++i) target[i] = Type::round(grad_query[lane * width + i] * scale);
    }
  }
};

// ---------------------------------------------------------------- entry

int64_t scratch_bytes(const SpanAttention& call, int64_t lanes, bool backward) {
  if (call.dtype == DType::kFloat64) {
    return backward ? Backward<Float64>(call, lanes, nullptr).scratch.used : Forward<Float64>(call, lanes, nullptr).scratch.used;
  }
  return backward ? Backward<Float32>(call, lanes, nullptr).scratch.used : Forward<Float32>(call, lanes, nullptr).scratch.used;
}

template <class Type>
void forward(const SpanAttention& call, int64_t key_head, const SpanBlock& block, void* scratch) {
  Forward<Type>(call, block.rows() * (call.heads / call.key_heads), scratch).run(call, key_head, block);
}

template <class Type>
void backward(const SpanAttentionGrad& call, int64_t key_head, const SpanBlock& block, void* scratch) {
  const SpanAttention& of = call.attention;
  Backward<Type>(of, block.rows() * (of.heads / of.key_heads), scratch).run(call, key_head, block);
}

}  // namespace

extern const SpanKernels span_kernels;
const SpanKernels span_kernels = {PK_STRING(PK_ISA),
                                  scratch_bytes,
                                  {forward<Float32>, forward<BFloat16>, forward<Float16>, forward<Float64>},
                                  {backward<Float32>, backward<BFloat16>, backward<Float16>, backward<Float64>}};

}  // namespace PK_ISA
}  // namespace patchkern
