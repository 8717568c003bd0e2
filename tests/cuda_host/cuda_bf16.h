// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_runtime.h"

struct alignas(4) __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_host {
inline uint16_t bfloat16_of(float value) {
  const uint32_t word = bits_of<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
}  // namespace cuda_host

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {cuda_host::bfloat16_of(x), cuda_host::bfloat16_of(y)};
}
