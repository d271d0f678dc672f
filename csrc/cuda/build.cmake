# fastdit._cuda (nvcc) and fastdit._cuda_sim (g++ and the block simulator), from the same kernel files.
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB cuda_bindings CONFIGURE_DEPENDS csrc/bindings/cuda/*.cpp)

# ---- the simulator: for tests, never in a wheel -------------------------------------------------------------
# Kernels carry the calls of -fsanitize=thread, which the simulator answers; the sanitizer's library is not linked.
# FASTDIT_SIM=ON or OFF says whether; else editable installs have it. Not a cached answer: a wheel may be built in the
# folder of an editable install.
set(sim OFF)
if(SKBUILD_STATE STREQUAL "editable" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(sim ON)
endif()
if(DEFINED FASTDIT_SIM)
  set(sim ${FASTDIT_SIM})
endif()
if(sim)
  file(GLOB simulator CONFIGURE_DEPENDS csrc/cuda/simt/*.cpp)
  set(instrumented ${cuda_kernels} csrc/cuda/simt/faults.cu csrc/cuda/simt/tiles.cu)
  add_library(cuda_sim_kernels OBJECT ${instrumented})
  set_source_files_properties(${instrumented} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  target_compile_options(cuda_sim_kernels PRIVATE -O1 -fsanitize=thread "SHELL:--param tsan-instrument-func-entry-exit=0")
  pybind11_add_module(_cuda_sim NO_EXTRAS csrc/bindings/cuda_sim.cpp ${cuda_bindings} ${simulator}
                      $<TARGET_OBJECTS:cuda_sim_kernels>)
  foreach(target cuda_sim_kernels _cuda_sim)
    target_include_directories(${target} PRIVATE csrc/include)
    target_compile_definitions(${target} PRIVATE FASTDIT_SM_90A)
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized)
    if(FASTDIT_WERROR)
      target_compile_options(${target} PRIVATE -Werror)
    endif()
  endforeach()
  install(TARGETS _cuda_sim LIBRARY DESTINATION fastdit)
endif()

# ---- the card -----------------------------------------------------------------------------------------------
# AUTO: where nvcc and an NVIDIA GPU are.
set(FASTDIT_CUDA AUTO CACHE STRING "Build fastdit._cuda: AUTO, ON or OFF")
# 80: its machine code, and from the same pass its PTX, which no kernel would have otherwise for compute_90.
set(FASTDIT_CUDA_ARCHS "80;90a-real" CACHE STRING "Machine code, and PTX for newer cards")
set(card ${FASTDIT_CUDA})
if(card STREQUAL "AUTO")
  find_program(FASTDIT_NVCC nvcc HINTS /usr/local/cuda/bin)
  set(card OFF)
  if(FASTDIT_NVCC AND EXISTS /proc/driver/nvidia/version)
    set(card ON)
  endif()
  message(STATUS "FASTDIT_CUDA=AUTO: ${card} (nvcc: ${FASTDIT_NVCC})")
endif()
if(card)
  set(CMAKE_CUDA_ARCHITECTURES ${FASTDIT_CUDA_ARCHS})
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # torch's own is another version; without a driver the module still imports
  pybind11_add_module(_cuda NO_EXTRAS csrc/bindings/cuda.cpp ${cuda_bindings} ${cuda_kernels})
  target_include_directories(_cuda PRIVATE csrc/include ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  if(FASTDIT_CUDA_ARCHS MATCHES "90a-real|90a(;|$)")  # not as PTX alone: it has no kernels of sm_90a
    target_compile_definitions(_cuda PRIVATE FASTDIT_SM_90A)
  endif()
  # spills and local arrays fail the build
  target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills,-warn-lmem-usage,-Werror>)
  install(TARGETS _cuda LIBRARY DESTINATION fastdit)
endif()
