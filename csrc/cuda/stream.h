// Where a call runs. The stream is torch's, as an int; the device is its index.
#pragma once

namespace fastdit::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

}  // namespace fastdit::cuda
