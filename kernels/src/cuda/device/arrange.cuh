// Activations in the order of places: columns sorted by group, padding zero. One gather per product, whatever the weights do.
//
// grid (ceil(places / 256), min(m, 65535)), 256 threads.

struct AttarArrange {
  const u16* x;      // [m][x_stride]
  const int* order;  // [places], column or -1
  u16* out;          // [m][out_stride]
  int m, places;
  long long x_stride, out_stride;
};

__device__ __forceinline__ void arrange(const AttarArrange& p) {
  const int place = blockIdx.x * 256 + threadIdx.x;
  if (place >= p.places) return;
  const int column = p.order[place];
  for (long long token = blockIdx.y; token < p.m; token += gridDim.y)
    p.out[token * p.out_stride + place] = column < 0 ? (u16)0 : p.x[token * p.x_stride + column];
}

// A copy, 16 bytes at a time, four under way per thread: the ceiling of everything that streams.
//
// grid (ceil(units / 1024)), 256 threads.

struct AttarCopy {
  const uint4* from;
  uint4* to;
  long long units;  // of 16 bytes
};

__device__ __forceinline__ void copy_bytes(const AttarCopy& p) {
  const long long first = (long long)blockIdx.x * 1024 + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (first + 256 * i < p.units) v[i] = p.from[first + 256 * i];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (first + 256 * i < p.units) p.to[first + 256 * i] = v[i];
}
