// Runs CUDA C++ on the host: one fiber per CUDA thread, one block after the other, on one OS
// thread.
//
// Compiled in front of a .cu file (g++ -x c++ -include emulation.h), it stands for the CUDA
// headers. What it checks, beyond the results:
// - Threads of a block run in one of four orders (set_order). A result that depends on it is wrong.
// - Shared memory is filled with NaN before every block; its end is the end of an allocation.
// - A barrier that some threads of the block never reach, or reach at another line, is an error; so
//   is a shuffle or vote that its lanes don't reach together, or a shuffle that reads a lane
//   outside its mask.
// - Under ThreadSanitizer every pair of accesses that no barrier orders is a data race, in two
//   blocks too. Shuffles and votes order nothing, __syncwarp does.
// - An argument above 4 KB needs a driver of CUDA 12.1: CA3D_EMULATED_DRIVER=12000 is an older one.
// - Under AddressSanitizer fibers have stacks of their own, and switches are announced.
#pragma once

#define CA3D_CUDA_EMULATION 1
// Of the toolkit, as its headers have it.
#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#include "common/dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
// The emulation's own variables are shared by fibers without any order that the sanitizer knows.
#define CA3D_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define CA3D_UNSEEN
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

// ---- fibers ----

constexpr size_t kStackBytes = 64 << 10;

#if defined(__x86_64__)

// Saves the registers that a function must keep on the stack of the caller, and takes up another.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  __asm__(
      "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
}

struct Context {
  void* stack_pointer = nullptr;

  // The first switch returns into `entry`, whose own return address would be the zero above it.
  CA3D_UNSEEN void prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  CA3D_UNSEEN void switch_to(Context& other) { switch_stack(&stack_pointer, other.stack_pointer); }
};

#else

struct Context {
  ucontext_t context;

  CA3D_UNSEEN void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  CA3D_UNSEEN void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

// ---- the block that runs ----

struct Thread {
  Context context;
  char* stack = nullptr;
  void* sanitizer_fiber = nullptr;  // of ThreadSanitizer; of AddressSanitizer the saved fake stack
  const uint64_t* waits_for = nullptr;  // a generation; the thread runs when it isn't `seen`
  uint64_t seen = 0;
  bool done = false;
};

// Where threads meet. Two tags in turn, because the first thread may be at the next meeting before
// the last one has left this one.
struct Meeting {
  uint64_t generation = 0;
  unsigned arrived = 0;
  int line = 0;
  char tag[2] = {};
};

struct Warp {
  Meeting meeting;
  uint32_t mask = 0, present = 0;
  uint64_t value[2][32] = {};
};

enum Order { kForward, kReverse, kRandom, kRotating, kOrders };

struct State {
  int order = kForward;
  dim3 grid{1, 1, 1}, block{1, 1, 1};
  unsigned block_index = 0, thread_index = 0;
  // Not vectors: code of the standard library is seen by ThreadSanitizer.
  Thread* threads = nullptr;
  Warp* warps = nullptr;
  Meeting barrier;
  unsigned live = 0;
  unsigned atomics = 0;
  unsigned char* shared = nullptr;
  std::function<void()> body;
  Context main;
  void* main_fiber = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  char end_tag = 0;
};
inline State state;

CA3D_UNSEEN inline unsigned thread_index() {
  return state.thread_index;
}
CA3D_UNSEEN inline unsigned block_index() {
  return state.block_index;
}
CA3D_UNSEEN inline unsigned block_size() {
  return state.block.x;
}
CA3D_UNSEEN inline unsigned grid_size() {
  return state.grid.x;
}
CA3D_UNSEEN inline unsigned char* shared_memory() {
  return state.shared;
}

CA3D_UNSEEN inline void resume(unsigned index) {
  Thread& thread = state.threads[index];
  state.thread_index = index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.main_fiber, thread.stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(thread.sanitizer_fiber, 1);  // 1: the switch orders nothing
#endif
  state.main.switch_to(thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state.main_fiber, nullptr, nullptr);
#endif
}

CA3D_UNSEEN inline void leave() {
  Thread& thread = state.threads[state.thread_index];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread.done ? nullptr : &thread.sanitizer_fiber, state.main_stack,
                                 state.main_stack_size);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(state.main_fiber, 1);
#endif
  thread.context.switch_to(state.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.sanitizer_fiber, &state.main_stack,
                                  &state.main_stack_size);
#endif
}

CA3D_UNSEEN inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.main_stack, &state.main_stack_size);
#endif
  state.body();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&state.end_tag);
#endif
  state.threads[state.thread_index].done = true;
  --state.live;
  leave();
  fail("a finished thread was resumed");
}

// Waits until `count` threads have arrived, all from the same line.
CA3D_UNSEEN inline void meet(Meeting& meeting, unsigned count, int line, bool orders_memory) {
  const uint64_t generation = meeting.generation;
#if defined(__SANITIZE_THREAD__)
  if (orders_memory) __tsan_release(&meeting.tag[generation & 1]);
#else
  static_cast<void>(orders_memory);
#endif
  if (meeting.arrived > 0 && meeting.line != line) {
    std::fprintf(stderr, "emulation: threads meet at lines %d and %d\n", meeting.line, line);
    fail("threads of one block or warp are at different barriers");
  }
  meeting.line = line;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    Thread& thread = state.threads[state.thread_index];
    thread.waits_for = &meeting.generation;
    thread.seen = generation;
    leave();
  }
#if defined(__SANITIZE_THREAD__)
  if (orders_memory) __tsan_acquire(&meeting.tag[generation & 1]);
#endif
}

CA3D_UNSEEN inline void block_barrier(int line) {
  meet(state.barrier, state.block.x, line, true);
}

// All lanes of a mask hand in a value; returns what each lane did.
CA3D_UNSEEN inline const uint64_t* exchange(uint32_t mask, uint64_t value, int line,
                                            bool orders_memory) {
  Warp& warp = state.warps[state.thread_index / 32];
  const unsigned lane = state.thread_index % 32;
  if (!(mask >> lane & 1)) fail("a lane is not in its own mask");
  if (warp.meeting.arrived == 0) warp.mask = mask;
  if (warp.mask != mask) fail("lanes meet with different masks");
  const unsigned turn = warp.meeting.generation & 1;
  warp.value[turn][lane] = value;
  meet(warp.meeting, static_cast<unsigned>(__builtin_popcount(mask)), line, orders_memory);
  return warp.value[turn];
}

template <class T>
CA3D_UNSEEN T shuffle(uint32_t mask, T x, unsigned from, int line) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "a number");
  if (!(mask >> from & 1)) fail("a shuffle reads a lane outside its mask");
  union {
    T x;
    uint64_t bits;
  } in{}, out{};
  in.x = x;
  out.bits = exchange(mask, in.bits, line, false)[from];
  return out.x;
}

// Whether any lane of a mask hands in true.
CA3D_UNSEEN inline bool any(uint32_t mask, bool x, int line) {
  const uint64_t* const all = exchange(mask, x, line, false);
  bool found = false;
  for (unsigned lane = 0; lane < 32; ++lane) found = found || (mask >> lane & 1 && all[lane]);
  return found;
}

CA3D_UNSEEN inline void count_atomic() {
  ++state.atomics;
}
// Atomic operations of the last launch.
inline unsigned atomics() {
  return state.atomics;
}

// ---- launches ----

inline void run_block(std::mt19937& random) {
  const unsigned count = state.block.x;
  state.live = count;
  state.barrier = Meeting();
  std::fill(state.warps, state.warps + count / 32, Warp());
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = state.threads[i];
    thread.waits_for = nullptr;
    thread.done = false;
    thread.context.prepare(thread.stack, run_thread);
#if defined(__SANITIZE_THREAD__)
    thread.sanitizer_fiber = __tsan_create_fiber(0);
#endif
  }
  std::vector<unsigned> turns(count);
  for (unsigned i = 0; i < count; ++i) turns[i] = state.order == kReverse ? count - 1 - i : i;
  while (state.live > 0) {
    if (state.order == kRandom) std::shuffle(turns.begin(), turns.end(), random);
    if (state.order == kRotating)
      std::rotate(turns.begin(), turns.begin() + 7 % count, turns.end());
    bool any = false;
    for (const unsigned i : turns) {
      const Thread& thread = state.threads[i];
      if (thread.done || (thread.waits_for && *thread.waits_for == thread.seen)) continue;
      resume(i);
      any = true;
    }
    if (!any) fail("deadlock: some threads wait for others that are elsewhere or have finished");
  }
}

// Memory of one launch. ThreadSanitizer gets fresh addresses for every block, so that the reuse of
// an address doesn't look like a race, and fibers that live until the end.
class LaunchMemory {
 public:
  ~LaunchMemory() {
    for (const auto& [memory, bytes] : mapped_) munmap(memory, bytes);
    for (void* memory : allocated_) std::free(memory);
#if defined(__SANITIZE_THREAD__)
    for (void* fiber : fibers_) __tsan_destroy_fiber(fiber);
#endif
  }

  void prepare_block(size_t shared_bytes) {
#if defined(__SANITIZE_THREAD__)
    const bool fresh = true;
    if (!mapped_.empty()) keep_fibers();
#else
    const bool fresh = mapped_.empty();
#endif
    if (fresh) {
      const size_t bytes = size_t{state.block.x} * kStackBytes;
      void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stacks == MAP_FAILED) fail("no memory for stacks");
      mapped_.emplace_back(stacks, bytes);
      for (size_t i = 0; i < state.block.x; ++i) {
        state.threads[i].stack = static_cast<char*>(stacks) + i * kStackBytes;
      }
      void* shared = nullptr;
      if (posix_memalign(&shared, 16, shared_bytes + !shared_bytes)) fail("no shared memory");
      allocated_.push_back(shared);
      state.shared = static_cast<unsigned char*>(shared);
    }
    std::memset(state.shared, 0xff, shared_bytes);
  }

  void keep_fibers() {
    for (unsigned i = 0; i < state.block.x; ++i) {
      fibers_.push_back(state.threads[i].sanitizer_fiber);
    }
  }

 private:
  std::vector<std::pair<void*, size_t>> mapped_;
  std::vector<void*> allocated_, fibers_;
};

inline void run(unsigned grid, unsigned block, size_t shared_bytes, std::function<void()> body) {
  if (block == 0 || block > 1024 || block % 32 != 0) fail("a block of a wrong size");
  if (grid == 0 || grid > 0x7fffffffu) fail("an empty grid");
  state.grid = {grid, 1, 1};
  state.atomics = 0;
  if (shared_bytes > (48 << 10)) fail("more than 48 KB of shared memory");
  state.block = {block, 1, 1};
  std::vector<Thread> threads(block);
  std::vector<Warp> warps(block / 32);
  state.threads = threads.data();
  state.warps = warps.data();
  state.body = std::move(body);
#if defined(__SANITIZE_THREAD__)
  state.main_fiber = __tsan_get_current_fiber();
#endif
  LaunchMemory memory;
  std::mt19937 random(1);
  std::vector<unsigned> blocks(grid);
  for (unsigned i = 0; i < grid; ++i) blocks[i] = state.order == kReverse ? grid - 1 - i : i;
  if (state.order == kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned index : blocks) {
    state.block_index = index;
    memory.prepare_block(shared_bytes);
    run_block(random);
  }
#if defined(__SANITIZE_THREAD__)
  memory.keep_fibers();
  __tsan_acquire(&state.end_tag);
#endif
  state.body = nullptr;
}

// The order in which threads and blocks run from now on, of Order.
inline void set_order(int order) {
  state.order = order;
}

}  // namespace emulation

#define threadIdx (uint3{::emulation::thread_index(), 0, 0})
#define blockIdx (uint3{::emulation::block_index(), 0, 0})
#define blockDim (dim3{::emulation::block_size(), 1, 1})
#define gridDim (dim3{::emulation::grid_size(), 1, 1})
#define CA3D_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::shared_memory()
#define __syncthreads() ::emulation::block_barrier(__LINE__)
#define __syncwarp() ((void)::emulation::exchange(0xffffffffu, 0, __LINE__, true))
#define __any_sync(mask, x) ::emulation::any(mask, x, __LINE__)
#define __shfl_xor_sync(mask, x, step) \
  ::emulation::shuffle(mask, x, (::emulation::thread_index() % 32) ^ (step), __LINE__)

// Each rounded on its own: compile with -ffp-contract=off.
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fadd_rn(float x, float y) {
  return x + y;
}
inline double __dmul_rn(double x, double y) {
  return x * y;
}
inline double __dadd_rn(double x, double y) {
  return x + y;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

using std::isfinite;
using std::max;
using std::min;

inline float atomicExch(float* at, float x) {
  emulation::count_atomic();
  float before;
  __atomic_exchange(at, &x, &before, __ATOMIC_RELAXED);
  return before;
}

// ---- the parts of the CUDA runtime that the sources use ----

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDevice = 101 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  const char* const chosen = std::getenv("CA3D_EMULATED_DRIVER");
  *version = chosen ? std::atoi(chosen) : CUDART_VERSION;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "invalid device ordinal";
}

namespace ca3d {

// binary16 and bfloat16 by the compiler and by integer arithmetic: not NVIDIA's headers, so that
// the tests run where there is no CUDA.
inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(Half x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}
inline Half to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  Half result;
  std::memcpy(&result.bits, &half, sizeof half);
  return result;
}
inline BFloat16 to_bfloat16(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class Argument>
cudaError_t launch(void (*kernel)(Argument), unsigned grid, unsigned block, size_t shared,
                   cudaStream_t, Argument argument) {
  int driver = 0;
  (void)cudaDriverGetVersion(&driver);
  if (sizeof argument > 4096 && driver < 12010) {
    emulation::fail("an argument above 4 KB, which this driver does not take");
  }
  // A kernel gets its argument by reference to constant memory, not a copy per thread.
  emulation::run(grid, block, shared, [&] { kernel(argument); });
  return cudaSuccess;
}

}  // namespace ca3d
