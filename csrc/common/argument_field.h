// What lies where in the argument of a kernel, for whoever launches its PTX without this library.
#pragma once

#include <cstddef>
#include <string>

namespace ca3d {

struct ArgumentField {
  std::string name;
  size_t offset;
  std::string type;  // as in C; a pointer is a device address
  std::string meaning;
};

}  // namespace ca3d
