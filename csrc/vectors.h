// SPDX-License-Identifier: Apache-2.0
//
// The width of a vector, and bits of one type as another: a part of every file that is compiled once per instruction set.

#pragma once

#ifndef PK_ISA
#error "compile with -DPK_ISA=baseline, avx2 or avx512"
#endif

namespace patchkern {
namespace PK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class To, class From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits() changes the type, not the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace
}  // namespace PK_ISA
}  // namespace patchkern
