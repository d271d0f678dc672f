#include "cuda/cuda.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastdit CUDA kernels: pointers, sizes, strides and streams as ints; knows nothing of torch.";
  fastdit::cuda::bind_families(m);
}
