// GPTQ: qweight [in * bits / 32][out], a stream along the columns; qzeros [groups][out * bits / 32], a stream along the rows;
// scales [groups][out].
struct Gptq {
  template <int BITS>
  static __device__ __forceinline__ u32 code(const AttarRepack& p, int row, int column) {
    return stream_code<BITS>(p.codes + row, p.rows, column);
  }
  template <int BITS>
  static __device__ __forceinline__ u32 zero(const AttarRepack& p, int row, int group) {
    return stream_code<BITS>(p.zeros + (long long)group * (p.rows * BITS / 32), 1, row);
  }
  static __device__ __forceinline__ long long scale_at(const AttarRepack& p, int row, int group) {
    return (long long)group * p.rows + row;
  }
};
