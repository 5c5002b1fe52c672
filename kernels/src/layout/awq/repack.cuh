// AWQ: qweight [in][out / 8] and qzeros [groups][out / 8]; of eight rows the even ones stand in the low half word, the odd ones in
// the high one; scales [groups][out].
struct Awq {
  template <int BITS>
  static __device__ __forceinline__ u32 nibble(const u32* words, const AttarRepack& p, int row, int line) {
    const int within = (row & 1) * 4 + (row & 7) / 2;
    return words[(long long)line * (p.rows / 8) + row / 8] >> (4 * within) & 15;
  }
  template <int BITS>
  static __device__ __forceinline__ u32 code(const AttarRepack& p, int row, int column) {
    return nibble<BITS>(p.codes, p, row, column);
  }
  template <int BITS>
  static __device__ __forceinline__ u32 zero(const AttarRepack& p, int row, int group) {
    return nibble<BITS>(p.zeros, p, row, group);
  }
  static __device__ __forceinline__ long long scale_at(const AttarRepack& p, int row, int group) {
    return (long long)group * p.rows + row;
  }
};
