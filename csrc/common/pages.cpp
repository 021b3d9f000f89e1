#include "common/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ca3d {

void advise_huge_pages(void* address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(address);
  const std::uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (first + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  // Advice: where it can't be followed (an old kernel, locked memory), nothing is lost.
  if (begin < end)
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

}  // namespace ca3d
