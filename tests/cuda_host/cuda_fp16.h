// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct alignas(4) __half2 {
  uint16_t x, y;
};

namespace cuda_host {
inline float float_of(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float size;
  if (exponent == 31) {
    size = mantissa != 0 ? NAN : INFINITY;
  } else {
    size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  }
  return (half & 0x8000) != 0 ? -size : size;
}

inline uint16_t half_of(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;  // rounds to infinity
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // In units of the last place; rounding up to the next power of two carries into the exponent.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}
}  // namespace cuda_host

inline __half2 __floats2half2_rn(float x, float y) { return {cuda_host::half_of(x), cuda_host::half_of(y)}; }
inline float2 __half22float2(__half2 pair) { return {cuda_host::float_of(pair.x), cuda_host::float_of(pair.y)}; }
