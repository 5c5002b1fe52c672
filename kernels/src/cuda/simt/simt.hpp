// Runs CUDA kernels on the CPU, for tests: one fiber per thread. Threads of a block run in an order that a seed chooses and
// give way only at barriers and warp collectives, so that a missing barrier shows as a wrong result in some order; threads
// that leave others waiting at a barrier abort. Shared memory starts as NaN; asynchronous copies poison their target when
// they start and land when their thread waits for them, no earlier; those that tell a barrier land one by one, in random order,
// when no thread can go on without them. Products of a warpgroup are made when they are waited for, and their sums are NaN until
// then. Registers that warps give and take are counted. The blocks of a cluster run at the same time. Buffers and shared
// memory have their exact sizes, for the address sanitizer. Here are also the twins of ../device/ptx.cuh and hopper_ptx.cuh. Not
// shown: bank conflicts, timing, the order of sums within one mma of real hardware, missing fences between proxies.
#pragma once
#define ATTAR_SIMT
#ifndef ATTAR_SIMT_AMPERE
#define ATTAR_HOPPER
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
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
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
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

enum class State { Ready, Barrier, Collective, Polling, Cluster, Done };
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
  std::unique_ptr<char[]> stack;
  State state = State::Done;
  int registers = 0;
  int committed = 0;  // groups of products
  std::vector<Copy> open;                // copies of the group that is not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, not landed
};
struct Mma {
  float* c;
  unsigned a[4], b[2];
  const unsigned char* row;
};
struct Warp {
  int arrived = 0;
  const void* what = nullptr;
  Mma lanes[32];
};
// A product of a warpgroup that was started.
struct Product {
  const struct Format* type;
  int tokens, group;
  bool add;
  uint64_t b;
  float* c[128];
  unsigned a[128][4];
  std::vector<float> saved;  // sums before the first product on its way
};
struct Warpgroup {
  int arrived = 0;
  Product next;
  std::deque<Product> open;
};
// Something on its way that tells a barrier in shared memory.
struct Flight {
  std::vector<Copy> copies;
  size_t bytes;  // of one copy in bulk; 0: single units, and an arrival
  uint32_t barrier;
};
struct Barrier {
  int count = 0, pending = 0;
  long long bytes = 0;
  uint32_t phase = 0;
};
struct Block {
  unsigned char* shared = nullptr;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Flight> flights;
  std::vector<int> named;
};
inline std::vector<Fiber> fibers;  // of all blocks of a cluster, one after the other
inline std::vector<Warp> warps;
inline std::vector<Warpgroup> warpgroups;
inline std::vector<Block> blocks;
inline int current = 0, block_threads = 0, first_y = 0;
inline long long register_pool = 0;
inline bool moved = false;  // something happened that a polling thread may wait for
inline unsigned char* shared = nullptr;
inline const void* argument = nullptr;
inline void (*kernel)(const void*) = nullptr;
inline Block& block() { return blocks[current / block_threads]; }
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

// Makes a fiber the running thread.
inline void become(int fiber) {
  current = fiber;
  threadIdx.x = fiber % block_threads;
  blockIdx.y = first_y + fiber / block_threads;
  shared = blocks[fiber / block_threads].shared;
}

inline void yield(State state) {
  const int me = current;
  fibers[me].state = state;
  to_scheduler();
  become(me);
}

// Until a condition holds that other threads or copies bring about.
template <class F>
inline void poll(const F& holds) {
  while (!holds()) yield(State::Polling);
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
  if (!fiber.stack) fiber.stack.reset(new char[STACK]);
  fiber.state = State::Ready;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.committed = 0;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top) - 2;
  sp[0] = reinterpret_cast<void*>(entry);  // at a multiple of 16, as after a call
  sp[1] = nullptr;
  for (int k = 1; k <= 6; k++) sp[-k] = nullptr;
  fiber.sp = sp - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// One copy lands, and its barrier is told.
inline void arrive(Block& block, uint32_t address, int arrivals, long long bytes) {
  Barrier& barrier = block.barriers.at(address);
  barrier.pending -= arrivals;
  barrier.bytes -= bytes;
  if (barrier.pending < 0) fail("more arrivals at a barrier than it was begun with");
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    moved = true;
  }
}

inline bool land_one() {
  size_t all = 0;
  for (const Block& block : blocks) all += block.flights.size();
  if (all == 0) return false;
  size_t pick = random() % all;
  for (Block& block : blocks) {
    if (pick >= block.flights.size()) {
      pick -= block.flights.size();
      continue;
    }
    Flight flight = std::move(block.flights[pick]);
    block.flights.erase(block.flights.begin() + pick);
    if (flight.bytes)
      std::memcpy(flight.copies[0].to, flight.copies[0].from, flight.bytes);
    else
      land(flight.copies);
    arrive(block, flight.barrier, flight.bytes ? 0 : 1, flight.bytes);
    return true;
  }
  return false;
}

// Order 0: by number; 1: backwards; others: random, another one each round.
inline void run_blocks(int threads, uint64_t order, int registers) {
  const int all = threads * (int)blocks.size();
  block_threads = threads;
  if ((int)fibers.size() < all) fibers.resize(all);
  warps.assign((all + 31) / 32, Warp());
  warpgroups.assign((all + 127) / 128, Warpgroup());
  register_pool = 0;
  std::vector<int> turn(all);
  for (int i = 0; i < all; i++) {
    start(i);
    fibers[i].registers = registers;
    turn[i] = order == 1 ? all - 1 - i : i;
  }
  for (;;) {
    bool ran = false;
    moved = false;
    if (order > 1)
      for (int i = all - 1; i > 0; i--) std::swap(turn[i], turn[random() % (i + 1)]);
    for (int i : turn) {
      const bool polls = fibers[i].state == State::Polling;
      if (fibers[i].state != State::Ready && !polls) continue;
      become(i);
      to_fiber(i);
      ran |= !polls || fibers[i].state != State::Polling;
    }
    if (ran || moved) continue;
    int barrier = 0, cluster = 0, done = 0, polling = 0;
    for (int i = 0; i < all; i++) {
      barrier += fibers[i].state == State::Barrier;
      cluster += fibers[i].state == State::Cluster;
      polling += fibers[i].state == State::Polling;
      done += fibers[i].state == State::Done;
    }
    if (done == all) break;
    // Blocks whose threads are all at the barrier go on, however others fare.
    bool freed = false;
    for (size_t b = 0; b < blocks.size() && barrier; b++) {
      int here = 0;
      for (int i = 0; i < threads; i++) here += fibers[b * threads + i].state == State::Barrier;
      if (here < threads) continue;
      for (int i = 0; i < threads; i++) fibers[b * threads + i].state = State::Ready;
      freed = true;
    }
    if (freed) continue;
    if (cluster == all) {
      for (int i = 0; i < all; i++) fibers[i].state = State::Ready;
      continue;
    }
    if (polling && land_one()) continue;
    if (polling) fail("threads wait for copies, arrivals or registers that never come");
    if (barrier + cluster + done < all) fail("lanes of a warp wait for others in a collective");
    fail("threads ended while others wait at a barrier");
  }
  for (const Block& block : blocks)
    if (!block.flights.empty()) fail("a block ends with copies that it never waited for");
}

inline void launch(void (*f)(const void*), const void* arg, Dim3 grid, int threads, size_t shared_bytes, uint64_t order, int cluster,
                   int registers) {
  kernel = f;
  argument = arg;
  gridDim = grid;
  blockDim = {(unsigned)threads, 1, 1};
  random_state = order;
  if (grid.y % cluster) fail("the grid is no multiple of the cluster");
  const uint64_t clusters = (uint64_t)grid.x * (grid.y / cluster) * grid.z;
  std::vector<uint64_t> turn(clusters);
  for (uint64_t i = 0; i < clusters; i++) turn[i] = order == 1 ? clusters - 1 - i : i;
  if (order > 1)
    for (uint64_t i = clusters - 1; i > 0; i--) std::swap(turn[i], turn[random() % (i + 1)]);
  for (uint64_t i : turn) {
    first_y = (int)(i / grid.x % (grid.y / cluster)) * cluster;
    blockIdx = {(unsigned)(i % grid.x), (unsigned)first_y, (unsigned)(i / grid.x / (grid.y / cluster))};
    blocks.clear();
    blocks.resize(cluster);
    for (Block& block : blocks) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 16, shared_bytes ? shared_bytes : 1)) fail("no memory");
      std::memset(memory, 0xff, shared_bytes);
      block.shared = static_cast<unsigned char*>(memory);
    }
    run_blocks(threads, order, registers);
    for (Block& block : blocks) std::free(block.shared);
  }
}

struct Entry {
  void (*run)(const void*);
  size_t argument;
  int registers;  // that a thread has when it starts
};
inline std::map<std::string, Entry>& kernels() {
  static std::map<std::string, Entry> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)(const void*), size_t argument, int threads, int blocks) {
    const int registers = 65536 / (threads * blocks) / 8 * 8;
    kernels()[name] = {run, argument, registers < 255 ? registers : 255};
  }
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
  warp.lanes[current % 32] = {c, {a[0], a[1], a[2], a[3]}, {b0, b1}, nullptr};
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

// All lanes of a warp wait for each other; the last one works for all before they go on.
template <class F>
inline void collective(const void* what, const Mma& mine, const F& work) {
  Warp& warp = warps[current / 32];
  if (warp.arrived && warp.what != what) fail("lanes of a warp are in different collectives");
  warp.what = what;
  warp.lanes[current % 32] = mine;
  if (++warp.arrived < 32) return yield(State::Collective);
  work(warp.lanes);
  warp.arrived = 0;
  for (int lane = 0; lane < 32; lane++) fibers[current / 32 * 32 + lane].state = State::Ready;
}

// Shared memory as 32-bit addresses, which begin somewhere that is aligned to 16 and to no more.
const uint32_t SHARED_BASE = 1040;
inline unsigned char* at(uint32_t address) { return shared + (address - SHARED_BASE); }

// The last thread of a warpgroup to arrive puts the product on its way.
inline void product(const Format& type, int tokens, float* c, const unsigned (&a)[4], uint64_t b, bool add) {
  Warpgroup& group = warpgroups[current / 128];
  const int lane = current % 128;
  Product& next = group.next;
  if (group.arrived == 0) next = Product{&type, tokens, fibers[current].committed, add, b, {}, {}, {}};
  if (next.type != &type || next.tokens != tokens || next.b != b || next.add != add || next.group != fibers[current].committed)
    fail("threads of a warpgroup start different products");
  next.c[lane] = c;
  for (int i = 0; i < 4; i++) next.a[lane][i] = a[i];
  if (++group.arrived < 128) return yield(State::Collective);
  group.arrived = 0;
  bool pending = false;
  for (const Product& before : group.open) pending |= before.c[0] == next.c[0];
  if (!pending) {
    for (int i = 0; i < 128; i++)
      for (int k = 0; k < tokens / 2; k++) {
        next.saved.push_back(next.c[i][k]);
        next.c[i][k] = NAN;
      }
  }
  group.open.push_back(next);
  for (int i = 0; i < 128; i++) fibers[current / 128 * 128 + i].state = State::Ready;
}

inline void make(const Product& product) {
  const int tokens = product.tokens;
  if (!product.saved.empty())
    for (int i = 0; i < 128; i++)
      for (int k = 0; k < tokens / 2; k++) product.c[i][k] = product.saved[i * (tokens / 2) + k];
  // The descriptor: K-major, swizzle of 128 bytes.
  if (product.b >> 62 != 1 || (product.b >> 49 & 7) != 0) fail("an operand's descriptor of another form than is emulated");
  const uint32_t start = (uint32_t)(product.b & 0x3fff) << 4, eights = (uint32_t)(product.b >> 32 & 0x3fff) << 4;
  std::vector<float> A(64 * 16), B(16 * tokens);
  for (int n = 0; n < tokens; n++)
    for (int k = 0; k < 16; k++) {
      uint32_t address = start + n / 8 * eights + n % 8 * 128 + 2 * k;
      address ^= (address >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, at(address), 2);
      B[k * tokens + n] = product.type->value[bits];
    }
  for (int i = 0; i < 128; i++)
    for (int j = 0; j < 4; j++)
      for (int e = 0; e < 2; e++)
        A[(i / 32 * 16 + i % 32 / 4 + 8 * (j & 1)) * 16 + i % 4 * 2 + 8 * (j >> 1) + e] =
            product.type->value[(product.a[i][j] >> (16 * e)) & 0xffff];
  for (int i = 0; i < 128; i++)
    for (int k = 0; k < tokens / 2; k++) {
      const int row = i / 32 * 16 + i % 32 / 4 + 8 * (k >> 1 & 1), token = k / 4 * 8 + i % 4 * 2 + (k & 1);
      float sum = 0;
      for (int j = 0; j < 16; j++) sum += A[row * 16 + j] * B[j * tokens + token];
      product.c[i][k] = product.add ? product.c[i][k] + sum : sum;
    }
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

inline void load_matrices(unsigned (&d)[4], const void* row) {
  static const char what = 0;
  simt::Mma mine{reinterpret_cast<float*>(d), {}, {}, static_cast<const unsigned char*>(row)};
  simt::collective(&what, mine, [](simt::Mma* lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) std::memcpy(reinterpret_cast<unsigned*>(lanes[lane].c) + i, lanes[8 * i + lane / 4].row + lane % 4 * 4, 4);
  });
}
inline void __syncwarp() {
  static const char what = 0;
  simt::collective(&what, simt::Mma{}, [](simt::Mma*) {});
}

// Twins of hopper_ptx.cuh.
inline unsigned shared_address(const void* p) {
  return (unsigned)(static_cast<const unsigned char*>(p) - simt::shared) + simt::SHARED_BASE;
}
inline void load_matrices(unsigned (&d)[4], unsigned row) { load_matrices(d, static_cast<const void*>(simt::at(row))); }
inline void products_fence() {}
inline void products_commit() { simt::fibers[simt::current].committed++; }
template <int N>
inline void products_wait() {
  auto& open = simt::warpgroups[simt::current / 128].open;
  for (; !open.empty() && open.front().group < simt::fibers[simt::current].committed - N; open.pop_front()) simt::make(open.front());
}
inline void products_done(float&) {}
inline void copies_to_tensor_cores() {}
template <int N>
inline void wgmma_f16(float (&c)[N][4], const unsigned (&a)[4], unsigned long long b, int add) {
  simt::product(simt::F16, 8 * N, &c[0][0], a, b, add);
}
template <int N>
inline void wgmma_bf16(float (&c)[N][4], const unsigned (&a)[4], unsigned long long b, int add) {
  simt::product(simt::BF16, 8 * N, &c[0][0], a, b, add);
}
inline void cluster_barrier() { simt::yield(simt::State::Cluster); }
inline float4 load_of_block(const float4* p, int block) {
  const size_t offset = reinterpret_cast<const unsigned char*>(p) - simt::shared;
  return *reinterpret_cast<const float4*>(simt::blocks.at(block).shared + offset);
}
inline void barrier_begin(unsigned barrier, int count) {
  std::memset(simt::at(barrier), 0, 8);
  simt::Barrier begun;
  begun.count = begun.pending = count;
  simt::block().barriers[barrier] = begun;
}
inline void barriers_ready() {}
inline void barrier_arrive(unsigned barrier) { simt::arrive(simt::block(), barrier, 1, 0); }
inline void barrier_expect(unsigned barrier, unsigned bytes) { simt::block().barriers.at(barrier).bytes += bytes; }
inline void barrier_announce(unsigned barrier, unsigned bytes) {
  barrier_expect(barrier, bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(unsigned barrier, unsigned parity) {
  simt::poll([&] { return simt::block().barriers.at(barrier).phase != parity; });
}
inline bool elected() { return simt::current % 32 == 0; }
inline void barrier_arrive_with_copies(unsigned barrier) {
  simt::Fiber& fiber = simt::fibers[simt::current];
  simt::Flight flight{std::move(fiber.open), 0, barrier};
  fiber.open.clear();
  simt::block().flights.push_back(std::move(flight));
}
inline void copy_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
  if (shared % 16 || (uintptr_t)global % 16 || bytes % 16 || bytes == 0) simt::fail("a copy in bulk is not aligned to 16 bytes");
  std::memset(simt::at(shared), 0xff, bytes);
  simt::block().flights.push_back({{{simt::at(shared), global}}, bytes, barrier});
}
template <int N>
inline void consumers_barrier() {
  simt::Block& block = simt::block();
  block.named.push_back(simt::current);
  if ((int)block.named.size() < N) return simt::yield(simt::State::Collective);
  for (int fiber : block.named) simt::fibers[fiber].state = simt::State::Ready;
  block.named.clear();
}
// What a thread gives back goes to its block; more than that is never granted.
template <int N>
inline void fewer_registers() {
  simt::register_pool += simt::fibers[simt::current].registers - N;
  simt::fibers[simt::current].registers = N;
  simt::moved = true;
}
template <int N>
inline void more_registers() {
  const int more = N - simt::fibers[simt::current].registers;
  simt::poll([&] { return simt::register_pool >= more; });
  simt::register_pool -= more;
  simt::fibers[simt::current].registers = N;
}

#define ATTAR_KERNEL(name, Argument, threads, blocks)                                                                    \
  void name(const Argument& p);                                                                                          \
  static simt::Register register_##name(#name, [](const void* a) { name(*static_cast<const Argument*>(a)); }, sizeof(Argument), threads, \
                                        blocks);                                                                         \
  void name(const Argument& p)
