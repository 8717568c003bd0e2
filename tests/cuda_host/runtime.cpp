// SPDX-License-Identifier: Apache-2.0
//
// Runs a grid on one CPU thread. Each thread of a block is a fiber that runs until it meets the others; after every
// round the lanes of a warp must have come to the same place.

#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 1 << 15;
constexpr int kMaxThreads = 1024;

// What a fiber waits for.
struct Place {
  enum Kind { kStart, kWarp, kBlock, kEnd } kind = kStart;
  const char* what = "its start";
  int line = 0;

  bool operator==(const Place& other) const { return kind == other.kind && line == other.line; }
};

struct Fiber {
  void* context[5];  // of __builtin_setjmp
  std::unique_ptr<char[]> stack;
  Place place;
};

struct Warp {
  uint32_t words[2][32];  // a lane may be one meeting ahead of the others
  int meeting = 0;
};

std::vector<Fiber> fibers;
Fiber scheduler;
int running;  // the fiber's number
std::vector<Warp> warps;
const std::function<void()>* body;
unsigned order_seed = 0;
std::string message;
const void* main_stack;
size_t main_stack_bytes;

// The two halves of a switch must be functions of their own, see __builtin_longjmp.
__attribute__((noinline)) void jump(Fiber& to) { __builtin_longjmp(to.context, 1); }

__attribute__((noinline)) void switch_fiber(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
  const bool home = &to == &scheduler;
  const void* stack = home ? main_stack : to.stack.get();
  __sanitizer_start_switch_fiber(&fake_stack, stack, home ? main_stack_bytes : kStackBytes);
  if (__builtin_setjmp(from.context) == 0) jump(to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void wait_at(const Place& place) {
  Fiber& self = fibers[running];
  self.place = place;
  switch_fiber(self, scheduler);
}

// A fiber lives as long as the process: it runs its thread of one block after the other.
void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
  for (;;) {
    wait_at({Place::kEnd, "its end", 0});
    (*body)();
  }
}

// Makes the fibers and lets each run to its first wait.
void make_fibers(int count) {
  static ucontext_t home, start;  // static: a fiber's first switch leaves them behind
  while (static_cast<int>(fibers.size()) < count) {
    fibers.emplace_back();
    Fiber& fiber = fibers.back();
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    running = static_cast<int>(fibers.size()) - 1;
    getcontext(&start);
    start.uc_stack.ss_sp = fiber.stack.get();
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, fiber_main, 0);
    void* fake_stack = nullptr;
    if (__builtin_setjmp(scheduler.context) == 0) {
      __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
      swapcontext(&home, &start);
    }
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
}

std::string describe(int thread) {
  const Place& place = fibers[thread].place;
  return "thread " + std::to_string(thread) + " at " + place.what +
         (place.line != 0 ? ", line " + std::to_string(place.line) : "");
}

// Runs the warp until all its lanes wait for the block or have ended.
Place run_warp(int number) {
  for (;;) {
    for (int lane = 0; lane < 32; ++lane) {
      running = number * 32 + lane;
      threadIdx = dim3(static_cast<unsigned>(running), 0, 0);
      switch_fiber(scheduler, fibers[running]);
    }
    const Place& place = fibers[number * 32].place;
    for (int thread = number * 32; thread < number * 32 + 32; ++thread) {
      if (!(fibers[thread].place == place)) {
        throw std::runtime_error("divergent warp: " + describe(number * 32) + ", " + describe(thread));
      }
    }
    if (place.kind != Place::kWarp) return place;
  }
}

void run_block(const std::vector<int>& warp_order) {
  for (;;) {
    Place first;
    for (const int number : warp_order) {
      const Place place = run_warp(number);
      if (number == warp_order[0]) first = place;
      if (!(place == first)) {
        throw std::runtime_error("divergent block: " + describe(warp_order[0] * 32) + ", " + describe(number * 32));
      }
    }
    if (first.kind == Place::kEnd) return;
  }
}

template <class T>
std::vector<T> ordered(T count) {
  std::vector<T> numbers(count);
  std::iota(numbers.begin(), numbers.end(), T{0});
  if (order_seed != 0) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(order_seed));
  return numbers;
}

}  // namespace

const uint32_t* meet_warp(const char* what, int line, uint32_t word) {
  const int thread = running;
  Warp& own = warps[thread / 32];
  uint32_t* words = own.words[own.meeting];
  words[thread % 32] = word;
  wait_at({Place::kWarp, what, line});
  if (thread % 32 == 0) own.meeting ^= 1;
  return words;
}

void meet_block(int line) { wait_at({Place::kBlock, "__syncthreads", line}); }

void fail(const char* what, const void* address) {
  std::fprintf(stderr, "%s: %p, thread %u of block (%u, %u, %u)\n", what, address, threadIdx.x, blockIdx.x,
               blockIdx.y, blockIdx.z);
  std::abort();
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const bool fits = grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536 &&
                    block.x > 0 && block.x <= kMaxThreads && block.x % 32 == 0 && block.y == 1 && block.z == 1;
  if (!fits) return cudaErrorInvalidConfiguration;
  fibers.reserve(kMaxThreads);  // a running fiber never moves
  make_fibers(static_cast<int>(block.x));
  warps.assign(block.x / 32, Warp{});
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  const std::vector<int> warp_order = ordered(static_cast<int>(block.x / 32));
  try {
    for (const int64_t number : ordered(int64_t{grid.x} * grid.y * grid.z)) {
      blockIdx = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y));
      run_block(warp_order);
    }
  } catch (const std::runtime_error& error) {
    message = error.what();
    fibers.clear();  // they wait in the middle of a block
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace cuda_host

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return cuda_host::message.c_str();
  }
}

// The order in which the blocks of a grid and the warps of a block run: 0 for their own, else a seed.
extern "C" __attribute__((visibility("default"))) void cuda_host_order(unsigned seed) { cuda_host::order_seed = seed; }
