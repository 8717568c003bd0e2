// SPDX-License-Identifier: Apache-2.0
//
// Index checks: one branch-free pass over the integers that vectorises, and a second one only to find the culprit.

#pragma once

#include <algorithm>
#include <cstdint>

namespace patchkern {

// Position of the first value outside [0, limit), or -1.
inline int64_t first_outside(const int32_t* values, int64_t count, int64_t limit) {
  if (count == 0) return -1;
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(values[i]));
  if (int64_t{largest} < limit) return -1;
  for (int64_t i = 0; i < count; ++i) {
    if (int64_t{static_cast<uint32_t>(values[i])} >= limit) return i;
  }
  return -1;
}

// Position of the first fault in the CSR offsets of `groups` non-empty groups over `total` entries, or -1.
inline int64_t first_bad_offset(const int32_t* offsets, int64_t groups, int64_t total) {
  if (offsets[0] != 0) return 0;
  bool rising = true;
  for (int64_t i = 0; i < groups; ++i) rising &= offsets[i] < offsets[i + 1];
  for (int64_t i = 0; !rising && i < groups; ++i) {
    if (offsets[i] >= offsets[i + 1]) return i + 1;
  }
  return offsets[groups] == total ? -1 : groups;
}

}  // namespace patchkern
