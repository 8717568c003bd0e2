// SPDX-License-Identifier: Apache-2.0
//
// patchkern._cuda: device addresses, sizes and a stream in, a cudaError_t out. A module of its own, so that
// patchkern._native needs nothing of CUDA. Launches too run without the GIL: one may wait for room in the queue.

#include "bind.h"
#include "pool_rows_cuda.h"

using namespace patchkern;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int pool_rows_py(int dtype, uintptr_t weight, int64_t dim, int64_t weight_stride, uintptr_t lo, uintptr_t hi,
                 int64_t num_rows, uintptr_t items, uintptr_t token_ids, uintptr_t offsets, uintptr_t table,
                 int64_t table_stride, uintptr_t title_index, float scale, uintptr_t out, int64_t out_stride,
                 int device, uintptr_t stream) {
  const cuda::PoolRows call = {static_cast<DType>(dtype), at<const void>(weight), dim, weight_stride,
                               at<const int32_t>(lo), at<const int32_t>(hi), num_rows, at<const int32_t>(items),
                               at<const int32_t>(token_ids), at<const int32_t>(offsets), at<const void>(table),
                               table_stride, at<const int32_t>(title_index), scale, at<void>(out), out_stride};
  return cuda::pool_rows(call, device, at<void>(stream));
}

int pool_rows_grad_py(int dtype, uintptr_t grad_rows, int64_t dim, int64_t grad_stride, uintptr_t tokens,
                      int64_t num_tokens, uintptr_t offsets, uintptr_t rows, uintptr_t divisors,
                      int64_t num_contributions, float scale, bool scatter, bool accumulate, uintptr_t out,
                      int64_t out_stride, uintptr_t partials, uintptr_t tails, int device, uintptr_t stream) {
  const cuda::PoolRowsGrad call = {static_cast<DType>(dtype), at<const void>(grad_rows), dim, grad_stride,
                                   at<const int32_t>(tokens), num_tokens, at<const int32_t>(offsets),
                                   at<const int32_t>(rows), at<const int32_t>(divisors), num_contributions, scale,
                                   scatter, accumulate, at<void>(out), out_stride, at<float>(partials),
                                   at<int32_t>(tails)};
  return cuda::pool_rows_grad(call, device, at<void>(stream));
}

PyMethodDef functions[] = {
    bind::function<cuda::runtime_version>("runtime_version"),
    bind::function<cuda::driver_version>("driver_version"),
    bind::function<cuda::error_string>("error_string"),
    bind::function<pool_rows_py>("pool_rows"),
    bind::function<pool_rows_grad_py>("pool_rows_grad"),
    {},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, 0, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* const module = PyModule_Create(&definition);
  if (module != nullptr) PyModule_AddIntConstant(module, "TILE_CONTRIBUTIONS", cuda::kTileContributions);
  return module;
}
