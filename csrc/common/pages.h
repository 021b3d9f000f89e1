// What the operating system is told about memory.
#pragma once

#include <cstdint>

namespace ca3d {

// Asks for huge pages under [address, address + bytes), as far as whole ones fit into it. Memory
// that was never touched then costs one page fault for 2 MB and not one for 4 KB; contents don't
// change. Does nothing where the system knows no such advice.
void advise_huge_pages(void* address, int64_t bytes);

}  // namespace ca3d
