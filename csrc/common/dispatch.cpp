#include "common/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ca3d {
namespace {

bool runs_here(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
#endif
#if defined(__aarch64__)
    case Isa::kNeon:
      return true;  // part of the aarch64 base
#endif
    case Isa::kBaseline:
      return true;
    default:
      return false;
  }
}

std::vector<Isa> usable() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon, Isa::kBaseline}) {
    if (runs_here(isa)) found.push_back(isa);
  }
  return found;
}

Isa parse(const std::string& name) {
  for (Isa isa : usable()) {
    if (name == isa_name(isa)) return isa;
  }
  std::string allowed;
  for (const std::string& one : supported_isas()) allowed += (allowed.empty() ? "" : ", ") + one;
  throw std::invalid_argument("isa '" + name + "' can't run on this CPU; allowed: " + allowed);
}

Isa initial() {
  const char* wanted = std::getenv("CA3D_ISA");
  return wanted && *wanted ? parse(wanted) : usable().front();
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kNeon:
      return "neon";
    default:
      return "baseline";
  }
}

Isa current_isa() {
  return selected().load(std::memory_order_relaxed);
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (Isa isa : usable()) names.emplace_back(isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  selected().store(parse(name), std::memory_order_relaxed);
}

}  // namespace ca3d
