// The fault catalogue: kernels that are wrong in one way each, beside sound twins (simt/faults.cu).
#pragma once

#include <string>
#include <vector>

namespace fastdit::simt {

std::vector<std::string> fault_names();
void run_fault(const std::string& name);

}  // namespace fastdit::simt
