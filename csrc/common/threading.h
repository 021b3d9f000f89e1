// Threads for the CPU kernels.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ca3d {

// Calls `run(thread, begin, end)` on at most `threads` threads; the ranges are contiguous, of
// nearly equal length and cover [0, count). `run` must not throw.
template <class Run>
void parallel_ranges(int64_t count, int threads, const Run& run) {
#ifdef _OPENMP
  const int team = static_cast<int>(count < threads ? count : threads);
  if (team > 1) {
#pragma omp parallel num_threads(team)
    {
      // The runtime may grant fewer threads than were asked for.
      const int64_t thread = omp_get_thread_num(), granted = omp_get_num_threads();
      run(static_cast<int>(thread), count * thread / granted, count * (thread + 1) / granted);
    }
    return;
  }
#else
  static_cast<void>(threads);
#endif
  run(0, int64_t{0}, count);
}

}  // namespace ca3d
