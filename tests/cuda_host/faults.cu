// SPDX-License-Identifier: Apache-2.0
//
// Kernels that are wrong, each in its own way: the host runtime must say so.

#include <cuda_runtime.h>

namespace {

__global__ void lanes_at_different_operations(int*) {
  if (threadIdx.x % 32 < 5) {
    __ballot_sync(0xffffffffu, true);
  } else {
    __shfl_sync(0xffffffffu, 1, 0);
  }
}

__global__ void lane_ends_early(int*) {
  if (threadIdx.x == 40) return;
  __shfl_up_sync(0xffffffffu, 1, 1);
}

__global__ void warps_at_different_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void warp_ends_before_the_barrier(int*) {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

// Right: every thread passes its number to its neighbour, through shared memory and through the warp.
__global__ void neighbours(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  out[thread] = shared[(thread + 1) % 64] + 100 * __shfl_up_sync(0xffffffffu, thread, 1);
}

void (*const kernels[])(int*) = {lanes_at_different_operations, lane_ends_early, warps_at_different_barriers,
                                 warp_ends_before_the_barrier, neighbours};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* launch(int kernel, unsigned threads, int* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  return cudaGetErrorString(cudaLaunchKernelEx(&config, kernels[kernel], out));
}
