// A kernel's refusal of an input that is valid, but beyond its limits.
#pragma once

#include <stdexcept>

namespace ca3d {

class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace ca3d
