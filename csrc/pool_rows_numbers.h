// SPDX-License-Identifier: Apache-2.0
//
// Vectors on their way from memory and back, and what numbers are in memory: a part of pool_rows_kernels.cpp, compiled
// once per instruction set as that is.

#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace patchkern {
namespace PK_ISA {
namespace {

constexpr int kLanes = kVectorBytes / 4;  // of float32

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Unaligned ordinary store, or aligned store past the cache.
template <bool kStream, class Vector>
inline void store(void* to, const Vector& vector) {
#if defined(__SSE2__)
  if constexpr (kStream && sizeof(Vector) >= 16) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Vector) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bits<__m512i>(vector));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(Vector) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bits<__m256i>(vector));
#endif
    if constexpr (sizeof(Vector) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bits<__m128i>(vector));
  }
#endif
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Each storage type: the vector that is loaded and stored, the kSums vectors in which its elements are summed, and the
// two conversions. round() is round-to-nearest-even; infinities stay, NaN stays a NaN.

struct Float32 {
  using Element = float;
  using Scalar = float;
  using Sum = Floats;
  using Stored = Floats;
  static constexpr int kSums = 1;
  static void widen(const Stored& x, Sum* sum) { *sum = x; }
  static Stored round(const Sum* sum) { return *sum; }
};

struct Float64 {
  using Element = double;
  using Scalar = double;
  using Sum = Doubles;
  using Stored = Doubles;
  static constexpr int kSums = 1;
  static void widen(const Stored& x, Sum* sum) { *sum = x; }
  static Stored round(const Sum* sum) { return *sum; }
};

// Elements of even place are summed in one vector and those of odd place in another: a shift or a mask widens them, and
// no lane ever crosses to another.
struct BFloat16 {
  using Element = uint16_t;
  using Scalar = float;
  using Sum = Floats;
  using Stored = Words;
  static constexpr int kSums = 2;
  static void widen(const Stored& x, Sum* sum) {
    sum[0] = bits<Floats>(x << 16);
    sum[1] = bits<Floats>(x & 0xffff0000u);
  }
  // A NaN comes from a bfloat16 or from the processor, so the bits that rounding adds to are zero: nothing carries into
  // the rest, and it stays a NaN without being looked for.
  static Words nearest_even(const Sum& x) {
    const Words raw = bits<Words>(x);
    return raw + (0x7fffu + ((raw >> 16) & 1u));
  }
  static Stored round(const Sum* sum) {
    return (nearest_even(sum[0]) >> 16) | (nearest_even(sum[1]) & 0xffff0000u);
  }
};

struct Float16 {
  using Element = uint16_t;
  using Scalar = float;
  using Sum = Floats;
  using Stored = Halves;
  static constexpr int kSums = 1;
  static void widen(const Stored& x, Sum* sum) { *sum = widened(x); }
  static Stored round(const Sum* sum) { return rounded(*sum); }
#if defined(__AVX512F__)
  // the maskz forms: GCC 12 warns about the undefined vector inside the plain ones
  static Sum widened(const Stored& x) { return bits<Floats>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(x))); }
  static Stored rounded(const Sum& x) {
    return bits<Halves>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static Sum widened(const Stored& x) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(x))); }
  static Stored rounded(const Sum& x) {
    return bits<Halves>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static Sum widened(const Stored& x) {
    const Words half = __builtin_convertvector(x, Words);
    const Words magnitude = (half & 0x7fff) << 13;
    const Words exponent = magnitude & (0x7c00u << 13);
    const Words normal = magnitude + ((127u - 15u) << 23);
    const Words infinite = magnitude + ((255u - 31u) << 23);
    // a subnormal half is the difference of two normal floats, so flush-to-zero modes cannot touch it
    const Words one_binade_up = normal + (1u << 23);
    const Floats smallest = bits<Floats>(Words{} + (113u << 23));
    const Words subnormal = bits<Words>(bits<Floats>(one_binade_up) - smallest);
    const Words finite = exponent == 0u ? subnormal : normal;
    const Words value = exponent == (0x7c00u << 13) ? infinite : finite;
    return bits<Floats>(value | ((half & 0x8000u) << 16));
  }
  static Stored rounded(const Sum& x) {
    const Words raw = bits<Words>(x);
    const Words magnitude = raw & 0x7fffffffu;
    // adding 2^-1 aligns a subnormal result with the last bits of the float, which rounds it
    const Floats half = bits<Floats>(Words{} + (126u << 23));
    const Words subnormal = bits<Words>(bits<Floats>(magnitude) + half) - (126u << 23);
    const Words normal = (magnitude + ((15u - 127u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Words finite = magnitude < (113u << 23) ? subnormal : normal;
    const Words bounded = magnitude >= (143u << 23) ? Words{} + 0x7c00u : finite;
    const Words quiet = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    const Words value = magnitude > 0x7f800000u ? quiet : bounded;
    return __builtin_convertvector(value | ((raw >> 16) & 0x8000u), Halves);
  }
#endif
};

template <class T>
inline constexpr int lanes() {
  return static_cast<int>(sizeof(typename T::Stored) / sizeof(typename T::Element));
}

}  // namespace
}  // namespace PK_ISA
}  // namespace patchkern
