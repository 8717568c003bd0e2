// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of pool_rows, compiled once per instruction set: -DPK_ISA=baseline|avx2|avx512 with the flags to
// match. Everything lives in a namespace of that name and nothing from the standard library is instantiated here: the
// linker merges inline functions across objects, and an AVX-512 copy must never be the one an AVX2 machine runs.
//
// Both directions work on blocks of columns whose sums stay in registers, so a row is read once and written once
// however many tokens it pools. Vectors are the compiler's vector extension; intrinsics appear only where it has no
// word for the thing (float16 conversion, non-temporal stores).

#include "pool_rows.h"
#include "pool_rows_numbers.h"

#define PK_STRING_OF(x) #x
#define PK_STRING(x) PK_STRING_OF(x)

namespace patchkern {
namespace PK_ISA {
namespace {

// Vectors of sums per block: two sets of them must fit the registers.
constexpr int kBlock = kVectorBytes == 64 ? 8 : 4;

// A block of kCount whole vectors of columns, or (kPartial) one vector of which only `valid` columns exist.
template <class T, int kCount, bool kPartial = false>
struct Block {
  static_assert(!kPartial || kCount == 1, "a partial block is one vector");
  static constexpr int kSums = kCount * T::kSums;
  typename T::Sum sum[kSums];

  static constexpr int64_t columns() { return kCount * lanes<T>(); }
  static constexpr int64_t bytes() { return columns() * static_cast<int64_t>(sizeof(typename T::Element)); }

  void read(const typename T::Element* from, int64_t valid) {
    if constexpr (kPartial) {
      typename T::Stored stored{};
      __builtin_memcpy(&stored, from, static_cast<unsigned long>(valid) * sizeof(*from));
      T::widen(stored, sum);
    } else {
      for (int i = 0; i < kCount; ++i) T::widen(load<typename T::Stored>(from + i * lanes<T>()), sum + i * T::kSums);
    }
  }

  template <bool kStream>
  void write(typename T::Element* to, int64_t valid) const {
    if constexpr (kPartial) {
      const typename T::Stored stored = T::round(sum);
      __builtin_memcpy(to, &stored, static_cast<unsigned long>(valid) * sizeof(*to));
    } else {
      for (int i = 0; i < kCount; ++i) store<kStream>(to + i * lanes<T>(), T::round(sum + i * T::kSums));
    }
  }

  void zero() {
    for (int i = 0; i < kSums; ++i) sum[i] = typename T::Sum{};
  }
  void add(const Block& other) {
    for (int i = 0; i < kSums; ++i) sum[i] += other.sum[i];
  }
  void add(const Block& other, typename T::Scalar weight) {
    for (int i = 0; i < kSums; ++i) sum[i] += other.sum[i] * weight;
  }
  void multiply(typename T::Scalar factor) {
    for (int i = 0; i < kSums; ++i) sum[i] *= factor;
  }
  void divide(int32_t count) {
    const auto divisor = typename T::Sum{} + static_cast<typename T::Scalar>(count);
    for (int i = 0; i < kSums; ++i) sum[i] /= divisor;
  }
};

template <class T>
using WholeBlock = Block<T, kBlock / T::kSums>;
template <class T>
using OneVector = Block<T, 1>;
template <class T>
using PartVector = Block<T, 1, true>;

template <class T>
inline const typename T::Element* weight_row(const PoolRows& call, int32_t token) {
  return static_cast<const typename T::Element*>(call.weight) + int64_t{token} * call.weight_stride;
}

template <class T>
inline const typename T::Element* table_row(const PoolRows& call, int32_t item) {
  return static_cast<const typename T::Element*>(call.table) + int64_t{call.title_index[item]} * call.table_stride;
}

// The mean of one title's tokens, at `column`.
template <class T, class B>
inline void pool_item(const PoolRows& call, int32_t item, int64_t column, int64_t valid, B& mean) {
  if (call.table != nullptr) return mean.read(table_row<T>(call, item) + column, valid);
  const int32_t begin = call.offsets[item], end = call.offsets[item + 1];
  mean.read(weight_row<T>(call, call.token_ids[begin]) + column, valid);
  for (int32_t i = begin + 1; i < end; ++i) {
    B token;
    token.read(weight_row<T>(call, call.token_ids[i]) + column, valid);
    mean.add(token);
  }
  if (end - begin > 1) mean.divide(end - begin);
}

template <class T, class B, bool kStream>
inline void pool_block(const PoolRows& call, int32_t lo, int32_t hi, int64_t column, int64_t valid,
                       typename T::Element* out) {
  B mean;
  if (lo < 0) {
    mean.read(weight_row<T>(call, -1 - lo) + column, valid);
  } else {
    pool_item<T>(call, call.items[lo], column, valid, mean);
    for (int32_t i = lo + 1; i < hi; ++i) {
      B item;
      pool_item<T>(call, call.items[i], column, valid, item);
      mean.add(item);
    }
    if (hi - lo > 1) mean.divide(hi - lo);
  }
  if (call.scale != 1) mean.multiply(static_cast<typename T::Scalar>(call.scale));
  mean.template write<kStream>(out + column, valid);
}

// The row that an output row is a plain copy of, or null.
template <class T>
inline const typename T::Element* copied_row(const PoolRows& call, int32_t lo, int32_t hi) {
  if (call.scale != 1) return nullptr;
  if (lo < 0) return weight_row<T>(call, -1 - lo);
  return call.table != nullptr && hi - lo == 1 ? table_row<T>(call, call.items[lo]) : nullptr;
}

// The embeddings, or rows of the table, that an output row will read: what to prefetch while an earlier row is
// computed. Patches and separators alternate, so two rows ahead as much is asked for as is being used; one row ahead, a
// separator's copy would be over before the next patch has come.
constexpr int64_t kRowsAhead = 2;
constexpr int kMaxAhead = 32;

struct Ahead {
  int count = 0;
  const char* source[kMaxAhead];

  template <class T>
  void look_at(const PoolRows& call, int64_t row) {
    count = 0;
    const int32_t lo = call.lo[row], hi = call.hi[row];
    if (lo < 0) {
      source[count++] = reinterpret_cast<const char*>(weight_row<T>(call, -1 - lo));
      return;
    }
    for (int32_t i = lo; i < hi; ++i) {
      if (call.table != nullptr) {
        if (count == kMaxAhead) return;
        source[count++] = reinterpret_cast<const char*>(table_row<T>(call, call.items[i]));
        continue;
      }
      const int32_t end = call.offsets[call.items[i] + 1];
      for (int32_t t = call.offsets[call.items[i]]; t < end; ++t) {
        if (count == kMaxAhead) return;
        source[count++] = reinterpret_cast<const char*>(weight_row<T>(call, call.token_ids[t]));
      }
    }
  }

  void prefetch(int64_t byte, int64_t bytes) const {
    for (int i = 0; i < count; ++i) {
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(source[i] + byte + line, 0, 3);
    }
  }
};

template <class T, bool kStream>
void forward_rows(const PoolRows& call, int64_t row_begin, int64_t row_end) {
  using Element = typename T::Element;
  using Whole = WholeBlock<T>;
  using One = OneVector<T>;
  using Part = PartVector<T>;
  constexpr int64_t kWhole = Whole::columns(), kOne = One::columns();
  const int64_t dim = call.dim;
  Ahead ahead;
  for (int64_t row = row_begin; row < row_end; ++row) {
    Element* out = static_cast<Element*>(call.out) + row * call.out_stride;
    const int32_t lo = call.lo[row], hi = call.hi[row];
    ahead.count = 0;
    if (row + kRowsAhead < row_end) ahead.look_at<T>(call, row + kRowsAhead);
    int64_t column = 0;
    if (const Element* in = copied_row<T>(call, lo, hi)) {
      using Bytes = Words;
      for (; column + kWhole <= dim; column += kWhole) {
        ahead.prefetch(column * static_cast<int64_t>(sizeof(Element)), Whole::bytes());
        const char* from = reinterpret_cast<const char*>(in + column);
        char* to = reinterpret_cast<char*>(out + column);
        for (int64_t byte = 0; byte < Whole::bytes(); byte += kVectorBytes) {
          store<kStream>(to + byte, load<Bytes>(from + byte));
        }
      }
      __builtin_memcpy(out + column, in + column, static_cast<unsigned long>(dim - column) * sizeof(Element));
      continue;
    }
    for (; column + kWhole <= dim; column += kWhole) {
      ahead.prefetch(column * static_cast<int64_t>(sizeof(Element)), Whole::bytes());
      pool_block<T, Whole, kStream>(call, lo, hi, column, kWhole, out);
    }
    for (; column + kOne <= dim; column += kOne) pool_block<T, One, kStream>(call, lo, hi, column, kOne, out);
    if (column < dim) pool_block<T, Part, false>(call, lo, hi, column, dim - column, out);
  }
#if defined(__SSE2__)
  if (kStream) _mm_sfence();
#endif
}

template <class T>
void forward(const PoolRows& call, int64_t row_begin, int64_t row_end, bool stream) {
  if (stream) {
    forward_rows<T, true>(call, row_begin, row_end);
  } else {
    forward_rows<T, false>(call, row_begin, row_end);
  }
}

// Sums of long runs (a separator occurs thousands of times) are partial sums of this many contributions each, added in
// order: the error grows with the number of partial sums and not with the length of the run.
constexpr int32_t kPartialSum = 64;
constexpr int32_t kContributionsAhead = 8;

template <class T, class B>
inline void sum_block(const PoolRowsGrad& call, int32_t begin, int32_t end, int64_t column, int64_t valid,
                      typename T::Element* out) {
  using Element = typename T::Element;
  using Scalar = typename T::Scalar;
  const Element* grad = static_cast<const Element*>(call.grad_rows) + column;
  B total;
  total.zero();
  for (int32_t c = begin; c < end;) {
    const int32_t partial_end = end - c < kPartialSum ? end : c + kPartialSum;
    B partial;
    partial.zero();
    for (; c < partial_end; ++c) {
      const int32_t next = c + kContributionsAhead;
      if (next < end) {
        const char* address = reinterpret_cast<const char*>(grad + int64_t{call.rows[next]} * call.grad_stride);
        for (int64_t line = 0; line < B::bytes(); line += 64) __builtin_prefetch(address + line, 0, 3);
      }
      B row;
      row.read(grad + int64_t{call.rows[c]} * call.grad_stride, valid);
      partial.add(row, Scalar{1} / static_cast<Scalar>(call.divisors[c]));
    }
    total.add(partial);
  }
  if (call.scale != 1) total.multiply(static_cast<Scalar>(call.scale));
  if (call.accumulate) {
    B before;
    before.read(out + column, valid);
    total.add(before);
  }
  total.template write<false>(out + column, valid);
}

template <class T>
void backward(const PoolRowsGrad& call, int64_t token_begin, int64_t token_end, int64_t column_begin,
              int64_t column_end) {
  using Element = typename T::Element;
  using Whole = WholeBlock<T>;
  using One = OneVector<T>;
  using Part = PartVector<T>;
  for (int64_t token = token_begin; token < token_end; ++token) {
    const int64_t out_row = call.scatter ? int64_t{call.tokens[token]} : token;
    Element* out = static_cast<Element*>(call.out) + out_row * call.out_stride;
    const int32_t begin = call.offsets[token], end = call.offsets[token + 1];
    int64_t column = column_begin;
    for (; column + Whole::columns() <= column_end; column += Whole::columns()) {
      sum_block<T, Whole>(call, begin, end, column, Whole::columns(), out);
    }
    for (; column + One::columns() <= column_end; column += One::columns()) {
      sum_block<T, One>(call, begin, end, column, One::columns(), out);
    }
    if (column < column_end) sum_block<T, Part>(call, begin, end, column, column_end - column, out);
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    PK_STRING(PK_ISA),
    {forward<Float32>, forward<BFloat16>, forward<Float16>, forward<Float64>},
    {backward<Float32>, backward<BFloat16>, backward<Float16>, backward<Float64>},
};

}  // namespace PK_ISA
}  // namespace patchkern
