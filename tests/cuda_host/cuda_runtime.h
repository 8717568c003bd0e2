// SPDX-License-Identifier: Apache-2.0
//
// As much of CUDA as the kernels in csrc/ use, on the CPU: with this folder first among the includes, g++ compiles the
// .cu files as they are. Every CUDA thread is a fiber; runtime.cpp runs them, warp by warp.
//
// Stricter than a GPU: all 32 lanes of a warp must come to the same warp operation, all threads of a block to the same
// barrier, before any of them ends; vectors must be aligned; a launch outside the hardware's limits is refused.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

extern dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_host {

// Waits until every lane of the warp, or every thread of the block, has come to this place. A warp's lanes exchange a
// word each.
const uint32_t* meet_warp(const char* what, int line, uint32_t word);
void meet_block(int line);

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
[[noreturn]] void fail(const char* what, const void* address);

template <class To, class From>
To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
const T& checked(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T) != 0) fail("misaligned access", at);
  return *at;
}

}  // namespace cuda_host

// ------------------------------------------------------------------ device functions

#define __syncthreads() cuda_host::meet_block(__LINE__)
#define __syncwarp() cuda_host::meet_warp("__syncwarp", __LINE__, 0)

inline void full_mask(unsigned mask) {
  if (mask != 0xffffffffu) cuda_host::fail("warp operation without all lanes", nullptr);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  full_mask(mask);
  const uint32_t* words = cuda_host::meet_warp("__shfl_sync", line, cuda_host::bits_of<uint32_t>(value));
  return cuda_host::bits_of<T>(words[lane & 31]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int line = __builtin_LINE()) {
  full_mask(mask);
  const unsigned lane = threadIdx.x % 32;
  const uint32_t* words = cuda_host::meet_warp("__shfl_up_sync", line, cuda_host::bits_of<uint32_t>(value));
  return lane < step ? value : cuda_host::bits_of<T>(words[lane - step]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, int line = __builtin_LINE()) {
  full_mask(mask);
  const uint32_t* words = cuda_host::meet_warp("__ballot_sync", line, vote);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= words[lane] << lane;
  return votes;
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  full_mask(mask);
  const uint32_t* words = cuda_host::meet_warp("__reduce_or_sync", line, value);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= words[lane];
  return all;
}

template <class T>
T __ldg(const T* from) {
  return cuda_host::checked(from);
}
template <class T>
T __ldcs(const T* from) {
  return cuda_host::checked(from);
}
template <class T>
void __stcs(T* to, T value) {
  const_cast<T&>(cuda_host::checked(to)) = value;
}

inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline float __uint_as_float(uint32_t word) { return cuda_host::bits_of<float>(word); }
inline uint32_t __float_as_uint(float value) { return cuda_host::bits_of<uint32_t>(value); }

// ------------------------------------------------------------------ host functions

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_host::run(*config, [&] { kernel(arguments...); });
}

inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
