// SPDX-License-Identifier: Apache-2.0
//
// Vectors of numbers, their exponential, and what numbers are in memory: a part of span_attention_kernels.cpp, compiled
// once per instruction set as that is.

#pragma once

#include <cstdint>

#include "vectors.h"

#define PK_UNROLL _Pragma("GCC unroll 8")

namespace patchkern {
namespace PK_ISA {
namespace {

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

template <class Type>
inline typename Type::Vector sigmoid(typename Type::Vector x) {
  return 1 / (1 + exponential<Type>(-x));
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

}  // namespace
}  // namespace PK_ISA
}  // namespace patchkern
