// SPDX-License-Identifier: Apache-2.0
//
// Threads live for one call: nothing survives a fork() into a DataLoader worker. They take tiles from a counter.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace patchkern {

// Calls work(tile, worker) for tile in [0, num_tiles), the calling thread, worker 0, among num_threads.
template <class Work>
void share_out(int64_t num_tiles, int64_t num_threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t worker) {
    for (int64_t tile = next++; tile < num_tiles; tile = next++) work(tile, worker);
  };
  std::vector<std::thread> team;
  const int64_t helpers = std::min(num_threads, num_tiles) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) team.emplace_back(run, i + 1);
  } catch (const std::system_error&) {
    // the system has no more threads to give: those that started, and this one, do the work
  }
  run(0);
  for (std::thread& thread : team) thread.join();
}

}  // namespace patchkern
