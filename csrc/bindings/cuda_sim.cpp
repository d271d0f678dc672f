#include <pybind11/stl.h>

#include <vector>

#include "../cuda/simt/faults.h"
#include "../cuda/simt/memory.h"
#include "../cuda/simt/tiles.h"
#include "cuda/cuda.h"

using fastdit::simt::Schedule;

PYBIND11_MODULE(_cuda_sim, m) {
  m.doc() = "The CUDA kernels in the block simulator, on CPU memory, every access checked; for tests only.";
  fastdit::cuda::bind_families(m);
  m.def(
      "allow",
      [](uintptr_t address, int itemsize, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
         bool filled,
         bool writable) { fastdit::simt::memory().allow(address, itemsize, sizes, strides, filled, writable); },
      "Kernels may touch the elements of this tensor; strides in elements. Everything else is out of bounds.");
  m.def("forget", [] { fastdit::simt::memory().forget(); }, "No global memory is allowed any more.");
  m.def(
      "schedule",
      [](const std::string& name, uint64_t seed) {
        if (name != "eager" && name != "lazy" && name != "random")
          throw py::value_error("schedule: got '" + name + "', expected eager, lazy or random");
        fastdit::simt::machine().set_schedule(name == "eager"  ? Schedule::eager
                                              : name == "lazy" ? Schedule::lazy
                                                               : Schedule::random,
                                              seed);
      },
      py::arg("name"), py::arg("seed") = 1, "The order of threads, blocks and asynchronous copies.");
  m.def("faults", &fastdit::simt::fault_names, "The kernels of the fault catalogue, sound ones included.");
  m.def("run_fault", &fastdit::simt::run_fault, "Runs one of them; raises what the simulator found.");
  m.def("run_gemm", &fastdit::simt::run_gemm, "A test of the matrix instructions; see simt/tiles.h.");
  m.def("run_tile", &fastdit::simt::run_tile, "A test of the tensor copies; see simt/tiles.h.");
}
