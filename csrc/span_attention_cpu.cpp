// SPDX-License-Identifier: Apache-2.0
//
// Span attention on the CPU: check every range, cut the rows into blocks, share them out among threads.
//
// A block holds rows of one span, or of several whose ranges begin at the same rows: branches of one trunk. So what a
// user's rows become depends on that user's spans alone, whoever else is in the batch.

#include "span_attention.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "threads.h"

namespace patchkern {

namespace baseline {
extern const SpanKernels span_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SpanKernels span_kernels;
}
namespace avx512 {
extern const SpanKernels span_kernels;
}
#endif

namespace {

// Multiplications of queries with keys below which a thread is not worth starting: about 100 us of them.
constexpr int64_t kPairsPerThread = 1 << 21;
// What a block spends on each key, to read and widen it, in multiplications with a lane.
constexpr int64_t kLanesPerKey = 24;
constexpr int64_t kVector = 16;  // lanes are computed in vectors of at most as many

const SpanKernels* choose_kernels(const char* isa) {
  const SpanKernels* chosen = nullptr;
  for (const Kernels* const* level = isa_levels(); *level != nullptr; ++level) {
    const char* const name = (*level)->isa;
    if (std::strcmp(isa, "auto") != 0 && std::strcmp(isa, name) != 0) continue;
    if (std::strcmp(name, baseline::span_kernels.isa) == 0) chosen = &baseline::span_kernels;
#if defined(__x86_64__)
    if (std::strcmp(name, avx2::span_kernels.isa) == 0) chosen = &avx2::span_kernels;
    if (std::strcmp(name, avx512::span_kernels.isa) == 0) chosen = &avx512::span_kernels;
#endif
  }
  return chosen;
}

Outcome check(const SpanAttention& call) {
  const int32_t* const offsets = call.cu_seqlens;
  if (offsets[0] != 0) return {Status::kSpanOffsets, 0};
  for (int64_t span = 0; span < call.num_spans; ++span) {
    if (offsets[span + 1] < offsets[span]) return {Status::kSpanOffsets, span + 1};
  }
  if (offsets[call.num_spans] != call.num_rows) return {Status::kSpanOffsets, call.num_spans};
  const auto overlap = [](const int32_t* one, const int32_t* other) {
    return std::max(one[0], other[0]) < std::min(one[1], other[1]);
  };
  for (int64_t span = 0; span < call.num_spans; ++span) {
    const int32_t* const ranges = call.prefix + 2 * span * call.num_ranges;
    for (int64_t i = 0; i < call.num_ranges; ++i) {
      const int32_t* const range = ranges + 2 * i;
      const int64_t position = span * call.num_ranges + i;
      if (range[0] < 0 || range[1] < range[0] || range[1] > call.num_stored) return {Status::kSpanPrefix, position};
      bool overlaps = !call.apart && overlap(range, offsets + span);
      for (int64_t earlier = 0; earlier < i; ++earlier) overlaps |= overlap(range, ranges + 2 * earlier);
      if (overlaps) return {Status::kSpanOverlap, position};
    }
  }
  return {};
}

int64_t columns_of(const SpanBlock& block, const SpanAttention& call) {
  int64_t columns = block.end - call.cu_seqlens[block.first_span];
  for (int64_t i = 0; i < call.num_ranges; ++i) columns += block.prefix[i].rows();
  return columns;
}

int64_t cost_of(const SpanBlock& block, const SpanAttention& call) {
  const int64_t lanes = block.rows() * (call.heads / call.key_heads);
  return ((lanes + kVector - 1) / kVector * kVector + kLanesPerKey) * columns_of(block, call);
}

// Whether spans with these ranges may share a block, and then its ranges: empty ones beside empty ones, and no others.
bool joined(const SpanRange* one, const SpanRange* other, int64_t count, SpanRange* both) {
  for (int64_t i = 0; i < count; ++i) {
    const bool empty = one[i].rows() == 0;
    if (empty != (other[i].rows() == 0) || (!empty && one[i].begin != other[i].begin)) return false;
    both[i] = one[i];
    if (empty) continue;
    both[i].end = std::max(one[i].end, other[i].end);
    both[i].shared = std::min(one[i].shared, other[i].shared);
  }
  return true;
}

struct Blocks {
  std::vector<SpanBlock> blocks;
  std::vector<SpanRange> ranges;  // num_ranges for each block, which points at them
};

// Neighbours with one trunk share a block where that is less work; a long span is cut evenly.
Blocks blocks_of(const SpanAttention& call) {
  const int64_t most = std::max<int64_t>(kSpanLanes / (call.heads / call.key_heads), 1);
  const auto count = static_cast<size_t>(call.num_ranges);
  Blocks made;
  std::vector<SpanRange> own(count), both(count);
  bool open = false;  // whether the last block may take more spans
  for (int64_t span = 0; span < call.num_spans; ++span) {
    const int64_t begin = call.cu_seqlens[span], end = call.cu_seqlens[span + 1], rows = end - begin;
    if (rows == 0) continue;
    for (size_t i = 0; i < count; ++i) {
      const int32_t* const range = call.prefix + 2 * (static_cast<size_t>(span) * count + i);
      own[i] = {range[0], range[1], range[1]};
    }
    const SpanBlock alone = {begin, end, span, span, own.data()};
    if (open && end - made.blocks.back().begin <= most) {
      SpanBlock last = made.blocks.back();
      SpanRange* const ranges = made.ranges.data() + made.ranges.size() - count;
      last.prefix = ranges;
      if (joined(ranges, own.data(), call.num_ranges, both.data())) {
        const SpanBlock together = {last.begin, end, last.first_span, span, both.data()};
        if (cost_of(together, call) <= cost_of(last, call) + cost_of(alone, call)) {
          made.blocks.back() = together;
          std::copy(both.begin(), both.end(), ranges);
          continue;
        }
      }
    }
    const int64_t pieces = (rows + most - 1) / most;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      made.blocks.push_back(alone);
      made.blocks.back().begin = begin + rows * piece / pieces;
      made.blocks.back().end = begin + rows * (piece + 1) / pieces;
      made.ranges.insert(made.ranges.end(), own.begin(), own.end());
    }
    open = pieces == 1 && columns_of(alone, call) > rows;
  }
  for (size_t i = 0; i < made.blocks.size(); ++i) made.blocks[i].prefix = made.ranges.data() + i * count;
  return made;
}

// Where the blocks can be parted so that no key is seen from two sides: first blocks of each part, and the end.
std::vector<size_t> parts_of(const std::vector<SpanBlock>& blocks, const SpanAttention& call) {
  const auto reach = [&](const SpanBlock& block) {  // of the keys that several blocks may see
    int64_t first = call.apart ? INT64_MAX : call.cu_seqlens[block.first_span], last = call.apart ? 0 : block.end;
    for (int64_t i = 0; i < call.num_ranges; ++i) {
      if (block.prefix[i].rows() == 0) continue;
      first = std::min(first, block.prefix[i].begin);
      last = std::max(last, block.prefix[i].end);
    }
    return std::make_pair(first, last);
  };
  std::vector<int64_t> first_later(blocks.size() + 1, INT64_MAX);  // of this block and all after it
  for (size_t i = blocks.size(); i-- > 0;) first_later[i] = std::min(first_later[i + 1], reach(blocks[i]).first);
  std::vector<size_t> parts{0};
  int64_t last_before = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    // pieces of one span share its rows, stored apart or not
    const bool same_span = i > 0 && blocks[i].first_span == blocks[i - 1].first_span;
    if (i > 0 && !same_span && first_later[i] >= last_before) parts.push_back(i);
    last_before = std::max(last_before, reach(blocks[i]).second);
  }
  parts.push_back(blocks.size());
  return parts;
}

// Scratch for some threads, each piece aligned to a cache line.
class ScratchPerThread {
 public:
  ScratchPerThread(int64_t bytes, int64_t threads)
      : bytes_(bytes), memory_(static_cast<char*>(::operator new(bytes * threads, kAlignment))) {}
  ScratchPerThread(const ScratchPerThread&) = delete;
  ScratchPerThread& operator=(const ScratchPerThread&) = delete;
  ~ScratchPerThread() { ::operator delete(memory_, kAlignment); }
  void* of(int64_t worker) const { return memory_ + worker * bytes_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  const int64_t bytes_;
  char* const memory_;
};

// What both directions need: the kernels, the blocks, and how many threads are worth their while.
struct Plan {
  Outcome outcome;
  const SpanKernels* kernels;
  Blocks cut;
  int64_t lanes = 0, threads = 1;

  Plan(const SpanAttention& call, int num_threads, const char* isa) : kernels(choose_kernels(isa)) {
    if (kernels == nullptr) {
      outcome = {Status::kUnknownIsa, 0};
      return;
    }
    outcome = check(call);
    if (outcome.status != Status::kOk || call.heads == 0) return;
    cut = blocks_of(call);
    int64_t pairs = 0;
    for (const SpanBlock& block : cut.blocks) {
      lanes = std::max(lanes, block.rows() * (call.heads / call.key_heads));
      pairs += block.rows() * columns_of(block, call) * call.heads * (call.width + call.value_width);
    }
    threads = std::clamp<int64_t>(pairs / kPairsPerThread, 1, std::max(num_threads, 1));
  }
};

}  // namespace

Outcome span_attention(const SpanAttention& call, int num_threads, const char* isa) {
  const Plan plan(call, num_threads, isa);
  if (plan.cut.blocks.empty()) return plan.outcome;
  const auto forward = plan.kernels->forward[static_cast<int>(call.activation)][static_cast<int>(call.dtype)];
  const ScratchPerThread scratch(plan.kernels->scratch(call, plan.lanes, false), plan.threads);
  const auto blocks = static_cast<int64_t>(plan.cut.blocks.size());
  share_out(blocks * call.key_heads, plan.threads, [&](int64_t tile, int64_t worker) {
    forward(call, tile / blocks, plan.cut.blocks[static_cast<size_t>(tile % blocks)], scratch.of(worker));
  });
  return {};
}

Outcome span_attention_grad(const SpanAttentionGrad& call, int num_threads, const char* isa) {
  const SpanAttention& of = call.attention;
  const Plan plan(of, num_threads, isa);
  if (plan.cut.blocks.empty()) return plan.outcome;
  const auto backward = plan.kernels->backward[static_cast<int>(of.activation)][static_cast<int>(of.dtype)];
  const ScratchPerThread scratch(plan.kernels->scratch(of, plan.lanes, true), plan.threads);
  // a key's gradient is summed by one thread, block after block
  const std::vector<size_t> parts = parts_of(plan.cut.blocks, of);
  const auto num_parts = static_cast<int64_t>(parts.size()) - 1;
  share_out(num_parts * of.key_heads, plan.threads, [&](int64_t tile, int64_t worker) {
    const auto part = static_cast<size_t>(tile % num_parts);
    for (size_t i = parts[part]; i < parts[part + 1]; ++i) {
      backward(call, tile / num_parts, plan.cut.blocks[i], scratch.of(worker));
    }
  });
  return {};
}

}  // namespace patchkern
