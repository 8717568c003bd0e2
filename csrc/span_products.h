// SPDX-License-Identifier: Apache-2.0
//
// Products of matrices, one loop for all of them, C += A B: it broadcasts A's elements from wherever they lie and reads
// B's rows as vectors. A part of span_attention_kernels.cpp.

#pragma once

#include "span_numbers.h"

namespace patchkern {
namespace PK_ISA {
namespace {

// kRows x kColumns vectors of sums stay in registers
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

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

}  // namespace
}  // namespace PK_ISA
}  // namespace patchkern
