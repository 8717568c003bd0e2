// SPDX-License-Identifier: Apache-2.0
//
// patchkern._cuda: device addresses, sizes and a stream in, a cudaError_t out. A module of its own, so that
// patchkern._native needs nothing of CUDA. The GIL is released throughout: a launch may wait for room in the queue.

#include <pybind11/pybind11.h>

#include "pool_rows_cuda.h"

namespace py = pybind11;
using namespace patchkern;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();

  module.attr("TILE_CONTRIBUTIONS") = cuda::kTileContributions;
  module.def("runtime_version", &cuda::runtime_version);
  module.def("driver_version", &cuda::driver_version, no_gil);
  module.def("error_string", &cuda::error_string);

  module.def(
      "pool_rows",
      [](int dtype, uintptr_t weight, int64_t dim, int64_t weight_stride, uintptr_t lo, uintptr_t hi, int64_t num_rows,
         uintptr_t items, uintptr_t token_ids, uintptr_t offsets, uintptr_t table, int64_t table_stride,
         uintptr_t title_index, float scale, uintptr_t out, int64_t out_stride, int device, uintptr_t stream) {
        const cuda::PoolRows call = {static_cast<DType>(dtype), at<const void>(weight), dim, weight_stride,
                                     at<const int32_t>(lo), at<const int32_t>(hi), num_rows, at<const int32_t>(items),
                                     at<const int32_t>(token_ids), at<const int32_t>(offsets), at<const void>(table),
                                     table_stride, at<const int32_t>(title_index), scale, at<void>(out), out_stride};
        return cuda::pool_rows(call, device, at<void>(stream));
      },
      no_gil);

  module.def(
      "pool_rows_grad",
      [](int dtype, uintptr_t grad_rows, int64_t dim, int64_t grad_stride, uintptr_t tokens, int64_t num_tokens,
         uintptr_t offsets, uintptr_t rows, uintptr_t divisors, int64_t num_contributions, float scale, bool scatter,
         bool accumulate, uintptr_t out, int64_t out_stride, uintptr_t partials, uintptr_t tails, int device,
         uintptr_t stream) {
        const cuda::PoolRowsGrad call = {static_cast<DType>(dtype), at<const void>(grad_rows), dim, grad_stride,
                                         at<const int32_t>(tokens), num_tokens, at<const int32_t>(offsets),
                                         at<const int32_t>(rows), at<const int32_t>(divisors), num_contributions, scale,
                                         scatter, accumulate, at<void>(out), out_stride, at<float>(partials),
                                         at<int32_t>(tails)};
        return cuda::pool_rows_grad(call, device, at<void>(stream));
      },
      no_gil);
}
