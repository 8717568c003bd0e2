// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of span attention, compiled once per instruction set as pool_rows_kernels.cpp is, and under its rules.
//
// A block's query rows times the heads that share a key head are the *lanes*: lane = row * group + head. Scores are
// kept transposed, (keys, lanes), so that maxima, sums and masks are vertical, and no lane's result depends on another
// lane. Per score: 2 x width products forward, 5 x width backward.

#include "span_lanes.h"
#include "span_products.h"

#define PK_STRING_OF(x) #x
#define PK_STRING(x) PK_STRING_OF(x)
// what all keys go through: inlined at every call, it is slower
#define PK_ONE_COPY __attribute__((noinline))

namespace patchkern {
namespace PK_ISA {
namespace {

// ---------------------------------------------------------------- forward

template <class Type, Activation activation>
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

  // Scores into weights.
  void weigh(const Keys& keys) {
    if constexpr (activation == Activation::kSoftmax) {
      exponentials(keys);
    } else {
      products_with_sigmoids(keys);
    }
  }

  void products_with_sigmoids(const Keys& keys) {
    using Vector = typename Type::Vector;
    for (int64_t k = 0; k < keys.count(); ++k) {
      Scalar* const row = scores + k * lanes.stride;
      for (int64_t lane = keys.first_lane; lane < lanes.stride; lane += Type::kLanes) {
        Vector score;
        __builtin_memcpy(&score, row + lane, sizeof(Vector));
        score *= sigmoid<Type>(score);
        if (keys.partly) score = seen_only<Type>(lanes, keys, keys.begin + k, lane, score, Vector{});
        __builtin_memcpy(row + lane, &score, sizeof(Vector));
      }
    }
  }

  // Relative to the highest score so far; what was summed before is worth `decay` of it now.
  void exponentials(const Keys& keys) {
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
    visit_keys<Type>(call, block, lanes.group, [&](const Keys& keys) { attend(call, key_head, keys); });
    store(call, key_head, block);
  }

  PK_ONE_COPY void attend(const SpanAttention& call, int64_t key_head, const Keys& keys) {
    const int64_t first = keys.first_lane, count = lanes.count - first;
    load_rows<Type>(keys.stored() ? call.stored_key : call.key, keys.begin, keys.count(), key_head, call.width, key, width);
    load_rows<Type>(keys.stored() ? call.stored_value : call.value, keys.begin, keys.count(), key_head, call.value_width,
                    value, value_width);
    product<Type>(keys.count(), lanes.stride - first, call.width, {key, width, 1}, transposed + first, lanes.stride,
                  scores + first, lanes.stride, false);
    weigh(keys);
    if constexpr (activation == Activation::kSoftmax) {
      for (int64_t lane = first; lane < lanes.count; ++lane) {
        if (decay[lane] == 1) continue;
        for (int64_t i = 0; i < value_width; ++i) out[lane * value_width + i] *= decay[lane];
      }
    }
    product<Type>(count, value_width, keys.count(), {scores + first, 1, lanes.stride}, value, value_width,
                  out + first * value_width, value_width, true);
  }

  void store(const SpanAttention& call, int64_t key_head, const SpanBlock& block) const {
    using Element = typename Type::Element;
    for (int64_t lane = 0; lane < lanes.count; ++lane) {
      const int64_t place = (block.begin + lane / lanes.group) * call.heads + key_head * lanes.group + lane % lanes.group;
      Element* const target = static_cast<Element*>(call.out) + place * call.value_width;
      constexpr bool kSoftmax = activation == Activation::kSoftmax;
      const Scalar share = 1 / (kSoftmax ? total[lane] : static_cast<Scalar>(call.normalizer));
      for (int64_t i = 0; i < call.value_width; ++i) target[i] = Type::round(out[lane * value_width + i] * share);
      if constexpr (kSoftmax) static_cast<Scalar*>(call.lse)[place] = peak[lane] + Type::log(total[lane]);
    }
  }
};

// ---------------------------------------------------------------- backward

template <class Type, Activation activation>
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
        Vector weight, change;
        __builtin_memcpy(&weight, weight_row + lane, sizeof(Vector));
        __builtin_memcpy(&change, grad_row + lane, sizeof(Vector));
        if constexpr (activation == Activation::kSoftmax) {
          Vector sum, shared;
          __builtin_memcpy(&sum, lse + lane, sizeof(Vector));
          __builtin_memcpy(&shared, balance + lane, sizeof(Vector));
          weight = exponential<Type>(weight - sum);
          change = weight * (change - shared);
        } else {
          const Vector gate = sigmoid<Type>(weight);
          change *= gate * (1 + weight * (1 - gate));
          weight *= gate;
        }
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
    const Scalar share = activation == Activation::kSilu ? static_cast<Scalar>(1 / of.normalizer) : 1;
    load_lanes<Type>(call.grad_out, block, key_head, lanes.group, of.value_width, share, grad, value_width);
    transpose<Type>(grad, value_width, of.value_width, lanes.count, lanes.stride, grad_transposed);
    if constexpr (activation == Activation::kSoftmax) load_sums(of, key_head, block);
    for (int64_t i = 0; i < lanes.count * width; ++i) grad_query[i] = 0;
    visit_keys<Type>(of, block, lanes.group, [&](const Keys& keys) { collect(call, key_head, keys); });
    store(call, key_head, block);
  }

  PK_ONE_COPY void collect(const SpanAttentionGrad& call, int64_t key_head, const Keys& keys) {
    const SpanAttention& of = call.attention;
    const int64_t first = keys.first_lane, seen = lanes.stride - first, count = lanes.count - first;
    const int64_t stride = lanes.stride;
    load_rows<Type>(keys.stored() ? of.stored_key : of.key, keys.begin, keys.count(), key_head, of.width, key, width);
    load_rows<Type>(keys.stored() ? of.stored_value : of.value, keys.begin, keys.count(), key_head, of.value_width, value,
                    value_width);
    product<Type>(keys.count(), seen, of.width, {key, width, 1}, query_transposed + first, stride, weights + first, stride,
                  false);
    product<Type>(keys.count(), seen, of.value_width, {value, value_width, 1}, grad_transposed + first, stride,
                  grad_scores + first, stride, false);
    weigh(keys);
    product<Type>(count, width, keys.count(), {grad_scores + first, 1, stride}, key, width, grad_query + first * width,
                  width, true);
    product<Type>(keys.count(), width, count, {grad_scores + first, stride, 1}, query + first * width, width, grad_key,
                  width, false);
    product<Type>(keys.count(), value_width, count, {weights + first, stride, 1}, grad + first * value_width, value_width,
                  grad_value, value_width, false);
    add_rows(keys.stored() ? call.grad_stored_key : call.grad_key, of, keys, key_head, of.width, grad_key, width);
    add_rows(keys.stored() ? call.grad_stored_value : call.grad_value, of, keys, key_head, of.value_width, grad_value,
             value_width);
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

template <class Type>
int64_t scratch_of(const SpanAttention& call, int64_t lanes, bool backward) {
  constexpr Activation kAny = Activation::kSoftmax;  // silu leaves some of it unused
  return backward ? Backward<Type, kAny>(call, lanes, nullptr).scratch.used
                  : Forward<Type, kAny>(call, lanes, nullptr).scratch.used;
}

int64_t scratch_bytes(const SpanAttention& call, int64_t lanes, bool backward) {
  const bool wide = call.dtype == DType::kFloat64;
  return wide ? scratch_of<Float64>(call, lanes, backward) : scratch_of<Float32>(call, lanes, backward);
}

template <class Type, Activation activation>
void forward(const SpanAttention& call, int64_t key_head, const SpanBlock& block, void* scratch) {
  Forward<Type, activation>(call, block.rows() * (call.heads / call.key_heads), scratch).run(call, key_head, block);
}

template <class Type, Activation activation>
void backward(const SpanAttentionGrad& call, int64_t key_head, const SpanBlock& block, void* scratch) {
  const SpanAttention& of = call.attention;
  Backward<Type, activation>(of, block.rows() * (of.heads / of.key_heads), scratch).run(call, key_head, block);
}

}  // namespace

extern const SpanKernels span_kernels;
#define PK_DTYPES(pass, activation) \
  {pass<Float32, activation>, pass<BFloat16, activation>, pass<Float16, activation>, pass<Float64, activation>}
const SpanKernels span_kernels = {
    PK_STRING(PK_ISA),
    scratch_bytes,
    {PK_DTYPES(forward, Activation::kSoftmax), PK_DTYPES(forward, Activation::kSilu)},
    {PK_DTYPES(backward, Activation::kSoftmax), PK_DTYPES(backward, Activation::kSilu)}};

}  // namespace PK_ISA
}  // namespace patchkern
