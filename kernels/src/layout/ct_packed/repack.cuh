// compressed-tensors: weight_packed [out][ceil(in * bits / 32)], a stream along the columns; weight_zero_point
// [ceil(out * bits / 32)][groups], a stream along the rows; weight_scale [out][groups].
struct CtPacked {
  template <int BITS>
  static __device__ __forceinline__ u32 code(const AttarRepack& p, int row, int column) {
    return stream_code<BITS>(p.codes + (long long)row * ((p.columns * BITS + 31) / 32), 1, column);
  }
  template <int BITS>
  static __device__ __forceinline__ u32 zero(const AttarRepack& p, int row, int group) {
    return stream_code<BITS>(p.zeros + group, p.groups, row);
  }
  static __device__ __forceinline__ long long scale_at(const AttarRepack& p, int row, int group) {
    return (long long)row * p.groups + group;
  }
};
