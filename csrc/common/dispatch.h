// Choice of the instruction set whose kernels run, made once at run time.
#pragma once

#include <string>
#include <vector>

namespace ca3d {

enum class Isa { kBaseline, kAvx2, kAvx512, kNeon };

// The instruction set in use: CA3D_ISA if set and supported, else the best this CPU has.
Isa current_isa();

// Names of the compiled sets that this CPU can run, best first.
std::vector<std::string> supported_isas();

// Uses the named set from now on; throws std::invalid_argument for one that can't run here.
void set_isa(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace ca3d
