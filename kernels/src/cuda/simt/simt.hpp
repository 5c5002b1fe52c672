// Runs CUDA kernels on the CPU, for tests: one fiber per thread. Threads of a block run in an order that a seed chooses and
// give way only at barriers and warp collectives, so that a missing barrier shows as a wrong result in some order; threads
// that leave others waiting at a barrier abort. Shared memory starts as NaN; asynchronous copies poison their target when
// they start and land when their thread waits for them, no earlier. Buffers and shared memory have their exact sizes, for
// the address sanitizer. Here are also the twins of ../device/ptx.cuh. Not shown: bank conflicts, timing, the order of
// sums within one mma of real hardware.
#pragma once
#define ATTAR_SIMT

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
  std::fflush(stderr);
  std::_Exit(70);
}

enum class State { Ready, Barrier, Collective, Done };
struct Copy {
  void* to;
  const void* from;
};
struct Fiber {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  std::vector<char> stack;
  State state = State::Done;
  std::vector<Copy> open;                // copies of the group that is not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not landed
};
struct Mma {
  float* c;
  unsigned a[4], b[2];
};
struct Warp {
  int arrived = 0;
  const void* what = nullptr;
  Mma lanes[32];
};
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline int current = 0;
inline unsigned char* shared = nullptr;
inline const void* argument = nullptr;
inline void (*kernel)(const void*) = nullptr;
inline uint64_t random_state = 1;
inline uint64_t random() {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return random_state >> 33;
}

// A switch of stacks: registers that a call preserves go onto the old stack and come from the new one.
#if defined(__x86_64__)
inline void* scheduler_sp = nullptr;
extern "C" void attar_simt_switch(void** save, void* load);
asm(R"(.text
.globl attar_simt_switch
attar_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void to_scheduler() { attar_simt_switch(&fibers[current].sp, scheduler_sp); }
inline void to_fiber(int i) { attar_simt_switch(&scheduler_sp, fibers[i].sp); }
#else
inline ucontext_t scheduler;
inline void to_scheduler() { swapcontext(&fibers[current].context, &scheduler); }
inline void to_fiber(int i) { swapcontext(&scheduler, &fibers[i].context); }
#endif

inline void yield(State state) {
  const int me = current;
  fibers[me].state = state;
  to_scheduler();
  current = me;
  threadIdx.x = me;
}

inline void land(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.from)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
}

__attribute__((no_sanitize("address"))) inline void entry() {
  kernel(argument);
  Fiber& fiber = fibers[current];
  bool waiting = !fiber.open.empty();
  for (const auto& group : fiber.groups) waiting |= !group.empty();
  if (waiting) fail("a thread ends with copies that it never waited for");
  fiber.state = State::Done;
  to_scheduler();
  fail("a finished thread ran again");
}

const size_t STACK = 128 << 10;

inline void start(int i) {
  Fiber& fiber = fibers[i];
  if (fiber.stack.empty()) fiber.stack.resize(STACK);
  fiber.state = State::Ready;
  fiber.open.clear();
  fiber.groups.clear();
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.data() + STACK) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top) - 2;
  sp[0] = reinterpret_cast<void*>(entry);  // at a multiple of 16, as after a call
  sp[1] = nullptr;
  for (int k = 1; k <= 6; k++) sp[-k] = nullptr;
  fiber.sp = sp - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// Order 0: by number; 1: backwards; others: random, another one each round.
inline void run_block(int threads, uint64_t order) {
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; i++) {
    start(i);
    turn[i] = order == 1 ? threads - 1 - i : i;
  }
  for (;;) {
    bool ran = false;
    if (order > 1)
      for (int i = threads - 1; i > 0; i--) std::swap(turn[i], turn[random() % (i + 1)]);
    for (int i : turn) {
      if (fibers[i].state != State::Ready) continue;
      ran = true;
      current = i;
      threadIdx.x = i;
      to_fiber(i);
    }
    if (ran) continue;
    int barrier = 0, done = 0;
    for (const Fiber& fiber : fibers) {
      barrier += fiber.state == State::Barrier;
      done += fiber.state == State::Done;
    }
    if (done == threads) return;
    if (barrier + done < threads) fail("lanes of a warp wait for others in a collective");
    if (done > 0) fail("threads ended while others wait at a barrier");
    for (Fiber& fiber : fibers) fiber.state = State::Ready;
  }
}

inline void launch(void (*f)(const void*), const void* arg, Dim3 grid, int threads, size_t shared_bytes, uint64_t order) {
  kernel = f;
  argument = arg;
  gridDim = grid;
  blockDim = {(unsigned)threads, 1, 1};
  random_state = order;
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  std::vector<uint64_t> turn(blocks);
  for (uint64_t i = 0; i < blocks; i++) turn[i] = order == 1 ? blocks - 1 - i : i;
  if (order > 1)
    for (uint64_t i = blocks - 1; i > 0; i--) std::swap(turn[i], turn[random() % (i + 1)]);
  for (uint64_t i : turn) {
    blockIdx = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes ? shared_bytes : 1)) fail("no memory");
    std::memset(memory, 0xff, shared_bytes);
    shared = static_cast<unsigned char*>(memory);
    run_block(threads, order);
    std::free(memory);
  }
}

struct Entry {
  void (*run)(const void*);
  size_t argument;
};
inline std::map<std::string, Entry>& kernels() {
  static std::map<std::string, Entry> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)(const void*), size_t argument) { kernels()[name] = {run, argument}; }
};

// Numbers of `bits` fraction bits and smallest normal exponent `low`.
struct Format {
  int bits, low;
  std::vector<float> value;  // of each bit pattern
  Format(int bits, int low) : bits(bits), low(low), value(65536) {
    const int infinity = ((1 << (15 - bits)) - 1) << bits;
    for (int x = 0; x < 65536; x++) {
      const int fraction = x & ((1 << bits) - 1), exponent = (x & 0x7fff) >> bits;
      double v = exponent ? std::ldexp(fraction + std::ldexp(1.0, bits), exponent - 1 + low - bits) : std::ldexp(fraction, low - bits);
      if ((x & 0x7fff) >= infinity) v = fraction ? NAN : INFINITY;
      value[x] = (float)(x & 0x8000 ? -v : v);
    }
  }
  // To nearest, ties to even.
  uint16_t encode(double v) const {
    uint64_t u;
    std::memcpy(&u, &v, 8);
    const uint16_t sign = u >> 63 << 15;
    const int infinity = ((1 << (15 - bits)) - 1) << bits, e = (int)(u >> 52 & 2047) - 1023;
    if (e == 1024) return u << 12 ? 0x7fff : sign | infinity;
    if (e < low - bits - 1) return sign;
    const int shift = 52 - bits + (e < low ? low - e : 0);
    const uint64_t m = (u & ((1ull << 52) - 1)) | 1ull << 52, half = 1ull << (shift - 1), rest = m & (2 * half - 1);
    uint64_t q = m >> shift;
    q += rest > half || (rest == half && (q & 1));
    // A carry out of the fraction raises the exponent, as it should.
    const uint64_t magnitude = e < low ? q : q + ((uint64_t)(e - low) << bits);
    return sign | (uint16_t)(magnitude < (uint64_t)infinity ? magnitude : infinity);
  }
  double decode(uint16_t x) const { return value[x]; }
  // a * b + c, rounded once: the sum is rounded to odd first, which a second rounding to fewer bits does not see.
  uint16_t fma(uint16_t a, uint16_t b, uint16_t c) const {
    const double p = decode(a) * decode(b), q = decode(c);
    double s = p + q;
    if (std::isfinite(s)) {
      const double pp = s - q, error = (p - pp) + (q - (s - pp));
      uint64_t u;
      std::memcpy(&u, &s, 8);
      if (error != 0 && !(u & 1)) s = std::nextafter(s, error > 0 ? INFINITY : -INFINITY);
    }
    return encode(s);
  }
  uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) const {
    return fma(a, b, c) | (uint32_t)fma(a >> 16, b >> 16, c >> 16) << 16;
  }
};
inline const Format F16(10, -14), BF16(7, -126);

// The last lane to arrive multiplies for all.
inline void mma(const Format& type, float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  Warp& warp = warps[current / 32];
  if (warp.arrived && warp.what != &type) fail("lanes of a warp are in different collectives");
  warp.what = &type;
  warp.lanes[current % 32] = {c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  if (++warp.arrived < 32) return yield(State::Collective);
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    const Mma& from = warp.lanes[lane];
    for (int e = 0; e < 2; e++) {
      for (int i = 0; i < 4; i++) A[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + e] = type.value[(from.a[i] >> (16 * e)) & 0xffff];
      for (int i = 0; i < 2; i++) B[2 * t + 8 * i + e][g] = type.value[(from.b[i] >> (16 * e)) & 0xffff];
    }
  }
  float C[16][8] = {};
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) warp.lanes[lane].c[i] += C[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)];
  warp.arrived = 0;
  for (int lane = 0; lane < 32; lane++) fibers[current / 32 * 32 + lane].state = State::Ready;
}

}  // namespace simt

// Vocabulary of CUDA and the twins.
#define ATTAR_SHARED(name) unsigned char* name = simt::shared
inline void __syncthreads() { simt::yield(simt::State::Barrier); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  const unsigned before = *p;
  *p += v;
  return before;
}
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }
inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15;
    if (s > 7) simt::fail("prmt with sign replication is not emulated");
    d |= (unsigned)(bytes >> (8 * s) & 255) << (8 * i);
  }
  return d;
}
inline unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) { return simt::F16.fma2(a, b, c); }
inline unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) { return simt::BF16.fma2(a, b, c); }
inline float float_of_f16(unsigned short a) { return (float)simt::F16.decode(a); }
inline unsigned short f16_of_float(float a) { return simt::F16.encode(a); }
inline unsigned short bf16_of_float(float a) { return simt::BF16.encode(a); }
inline unsigned bf16x2_of_floats(float low, float high) {
  return simt::BF16.encode(low) | (unsigned)simt::BF16.encode(high) << 16;
}
inline void mma_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  simt::mma(simt::F16, c, a, b0, b1);
}
inline void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  simt::mma(simt::BF16, c, a, b0, b1);
}
inline uint4 load_once(const uint4* p) { return *p; }
inline uint2 load_once(const uint2* p) { return *p; }
inline float load_shared_sum(const float* p) { return *p; }
inline void copy_async(void* shared, const void* global, bool valid) {
  if ((uintptr_t)shared % 16 || (uintptr_t)global % 16) simt::fail("cp.async is not aligned to 16 bytes");
  std::memset(shared, 0xff, 16);
  simt::fibers[simt::current].open.push_back({shared, valid ? global : nullptr});
}
inline void copies_commit() {
  simt::Fiber& fiber = simt::fibers[simt::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N>
inline void copies_wait() {
  auto& groups = simt::fibers[simt::current].groups;
  for (; groups.size() > N; groups.pop_front()) simt::land(groups.front());
}

#define ATTAR_KERNEL(name, Argument, threads, blocks)                                                                    \
  void name(const Argument& p);                                                                                          \
  static simt::Register register_##name(#name, [](const void* a) { name(*static_cast<const Argument*>(a)); }, sizeof(Argument)); \
  void name(const Argument& p)
