//! Weights that were never quantized (the output head, most often) in the type of their file: bf16, f16 or
//! f32, row after row, multiplied by f32 activations.
//!
//! Few tokens read each row once at the speed of memory; many are handed to the matrix product of
//! `attar_tensor::linalg`, a panel of rows at a time.

use attar_tensor::linalg::{Packing, isa as isa_in_use};
use attar_tensor::{DType, TensorView};
use half::{bf16, f16};
use rayon::prelude::*;

use super::buffer::Buffer;
use super::isa::Isa;
use super::{Output, PANEL_BYTES, PANEL_TOKENS, TASK_BYTES};
use crate::spec::{Prepared, check_sizes};

/// Weights of one cache line in 16-bit types: what is read at once.
const STEP: usize = 32;

/// How far ahead memory is asked for.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const AHEAD: usize = 2048;
/// Types of weights, as constants of vector code.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const BF16: u8 = 0;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const F16: u8 = 1;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const F32: u8 = 2;

/// A dense linear.
#[derive(Debug)]
pub struct Dense {
    out_features: usize,
    in_features: usize,
    dtype: DType,
    data: Buffer,
    isa: Isa,
}

impl Dense {
    /// Copies `weight [out_features, in_features]`; `None` when it is not a matrix of bf16, f16 or f32.
    pub fn new(weight: &TensorView<'_>) -> Option<Self> {
        let &[out_features, in_features] = weight.shape() else { return None };
        if !matches!(weight.dtype(), DType::BF16 | DType::F16 | DType::F32) {
            return None;
        }
        let mut data = Buffer::new(weight.bytes().len());
        data.copy_from_slice(weight.bytes());
        let isa = isa_in_use();
        Some(Self { out_features, in_features, dtype: weight.dtype(), data, isa })
    }

    /// Name of its kernel in reports.
    pub fn name(&self) -> &'static str {
        match (self.isa, self.dtype) {
            (Isa::Scalar, _) => "cpu-scalar-dense",
            (Isa::Neon, _) => "cpu-neon-dense",
            (Isa::Avx2, _) => "cpu-avx2-dense",
            (Isa::Avx512, _) => "cpu-avx512-dense",
        }
    }

    fn row(&self, row: usize) -> &[u8] {
        let bytes = self.in_features * self.dtype.size();
        &self.data[row * bytes..(row + 1) * bytes]
    }

    /// Row `row` as f32.
    fn widen(&self, row: usize, to: &mut [f32]) {
        let from = self.row(row);
        match self.dtype {
            DType::BF16 => {
                for (to, from) in to.iter_mut().zip(from.as_chunks::<2>().0) {
                    *to = bf16::from_le_bytes(*from).to_f32();
                }
            }
            DType::F16 => {
                for (to, from) in to.iter_mut().zip(from.as_chunks::<2>().0) {
                    *to = f16::from_le_bytes(*from).to_f32();
                }
            }
            _ => {
                for (to, from) in to.iter_mut().zip(from.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*from);
                }
            }
        }
    }

    /// Row `row` times the whole steps of `x`, which is in the order of [`arrange`].
    fn dot(&self, row: usize, x: &[f32], scratch: &mut Vec<f32>) -> f32 {
        let from = self.row(row);
        match (self.isa, self.dtype) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set is in use, so this machine has it.
            (Isa::Avx512, DType::BF16) => unsafe { x86::dot_avx512::<BF16>(from, x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx512, DType::F16) => unsafe { x86::dot_avx512::<F16>(from, x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx512, _) => unsafe { x86::dot_avx512::<F32>(from, x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx2, DType::BF16) => unsafe { x86::dot_avx2::<BF16>(from, x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx2, DType::F16) => unsafe { x86::dot_avx2::<F16>(from, x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx2, _) => unsafe { x86::dot_avx2::<F32>(from, x) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            (Isa::Neon, DType::BF16) => unsafe { neon::dot::<BF16>(from, x) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            (Isa::Neon, DType::F16) => unsafe { neon::dot::<F16>(from, x) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            (Isa::Neon, _) => unsafe { neon::dot::<F32>(from, x) },
            _ => {
                scratch.resize(self.in_features, 0.0);
                self.widen(row, scratch);
                scratch.iter().zip(x).map(|(w, x)| w * x).sum()
            }
        }
    }

    /// Whether activations are taken apart for [`Dense::dot`]: a 32-bit lane holds two bf16, so that
    /// even and odd columns come out of it apart.
    fn deinterleaves(&self) -> bool {
        matches!(self.isa, Isa::Avx2 | Isa::Avx512) && self.dtype == DType::BF16
    }
}

/// Puts the even columns of each whole step before its odd ones.
fn arrange(x: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    let (steps, rest) = x.as_chunks::<STEP>();
    for step in steps {
        out.extend(step.iter().step_by(2));
        out.extend(step.iter().skip(1).step_by(2));
    }
    out.extend(rest);
    out
}

impl Prepared for Dense {
    fn out_features(&self) -> usize {
        self.out_features
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn resident_bytes(&self) -> usize {
        self.data.len()
    }

    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        check_sizes(self, x, m, out);
        let (rows, columns) = (self.out_features, self.in_features);
        if m == 0 || out.is_empty() {
            return;
        }
        if columns == 0 {
            out.fill(0.0);
            return;
        }
        let least = TASK_BYTES.div_ceil(columns * self.dtype.size());
        if m >= PANEL_TOKENS {
            let panel_rows = (PANEL_BYTES / (4 * columns)).clamp(1, rows);
            let mut panel = vec![0.0f32; panel_rows * columns];
            let mut packing = Packing::default();
            for first in (0..rows).step_by(panel_rows) {
                let count = panel_rows.min(rows - first);
                let panel = &mut panel[..count * columns];
                let each = panel.par_chunks_mut(columns).enumerate().with_min_len(least);
                each.for_each(|(row, to)| self.widen(first + row, to));
                let out = (&mut out[first..], rows);
                packing.nt((m, count, columns), (x, columns), (panel, columns), false, out);
            }
            return;
        }
        let order = if self.deinterleaves() { arrange } else { <[f32]>::to_vec };
        let arranged: Vec<Vec<f32>> = x.chunks_exact(columns).map(order).collect();
        let output = Output { start: out.as_mut_ptr(), rows };
        (0..rows).into_par_iter().with_min_len(least).for_each_init(Vec::new, |scratch, row| {
            for (token, x) in arranged.iter().enumerate() {
                let value = self.dot(row, x, scratch);
                // SAFETY: `out` is `[m, rows]`, and each row is one task's.
                unsafe { *output.at(token * rows + row) = value };
            }
        });
    }
}

/// What is left behind the whole steps.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn tail<const TYPE: u8>(from: &[u8], x: &[f32]) -> f32 {
    let at = |i: usize| match TYPE {
        BF16 => bf16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32(),
        F16 => f16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32(),
        _ => f32::from_le_bytes(from[4 * i..4 * i + 4].try_into().expect("four bytes")),
    };
    x.iter().enumerate().map(|(i, x)| x * at(i)).sum()
}

#[cfg(target_arch = "aarch64")]
mod neon;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_add_ps,
        _mm256_and_si256, _mm256_castsi256_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
        _mm256_loadu_si256, _mm256_set1_epi32, _mm256_setzero_ps, _mm256_slli_epi32,
        _mm256_storeu_ps, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtph_ps,
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_reduce_add_ps,
        _mm512_set1_epi32, _mm512_setzero_ps, _mm512_slli_epi32,
    };

    use super::{AHEAD, BF16, F16, F32, STEP, tail};

    /// A row of bf16, f16 or f32 times activations.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn dot_avx512<const TYPE: u8>(from: &[u8], x: &[f32]) -> f32 {
        let size = if TYPE == F32 { 4 } else { 2 };
        assert_eq!(from.len(), x.len() * size);
        let (steps, mut sums) = (x.len() / STEP, [_mm512_setzero_ps(); 4]);
        let high = _mm512_set1_epi32(-65536);
        let mut step = 0;
        while step < steps {
            // SAFETY: a step is 32 weights of a row and as many activations, by the assertion.
            unsafe {
                let (w, x) = (from.as_ptr().add(step * STEP * size), x.as_ptr().add(step * STEP));
                _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(AHEAD).cast());
                if TYPE == F32 {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(AHEAD + 64).cast());
                }
                let (a, b): (__m512, __m512) = match TYPE {
                    BF16 => {
                        let v = _mm512_loadu_si512(w.cast());
                        (
                            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)),
                            _mm512_castsi512_ps(_mm512_and_si512(v, high)),
                        )
                    }
                    F16 => (
                        _mm512_cvtph_ps(_mm256_loadu_si256(w.cast())),
                        _mm512_cvtph_ps(_mm256_loadu_si256(w.add(32).cast())),
                    ),
                    _ => (_mm512_loadu_ps(w.cast()), _mm512_loadu_ps(w.add(64).cast())),
                };
                let (x0, x1) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16)));
                if step % 2 == 0 {
                    sums[0] = _mm512_fmadd_ps(a, x0, sums[0]);
                    sums[1] = _mm512_fmadd_ps(b, x1, sums[1]);
                } else {
                    sums[2] = _mm512_fmadd_ps(a, x0, sums[2]);
                    sums[3] = _mm512_fmadd_ps(b, x1, sums[3]);
                }
            }
            step += 1;
        }
        let [a, b, c, d] = sums;
        let sum = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
        let done = steps * STEP;
        _mm512_reduce_add_ps(sum) + tail::<TYPE>(&from[done * size..], &x[done..])
    }

    /// As [`dot_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_avx2<const TYPE: u8>(from: &[u8], x: &[f32]) -> f32 {
        let size = if TYPE == F32 { 4 } else { 2 };
        assert_eq!(from.len(), x.len() * size);
        let (steps, mut sums) = (x.len() / STEP, [_mm256_setzero_ps(); 4]);
        let high = _mm256_set1_epi32(-65536);
        let mut step = 0;
        while step < steps {
            // SAFETY: a step is 32 weights of a row and as many activations, by the assertion.
            unsafe {
                let (w, x) = (from.as_ptr().add(step * STEP * size), x.as_ptr().add(step * STEP));
                _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(AHEAD).cast());
                if TYPE == F32 {
                    _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(AHEAD + 64).cast());
                }
                // In the order of the activations: evens 0 to 7, 8 to 15, odds likewise.
                let [a, b, c, d]: [__m256; 4] = match TYPE {
                    BF16 => {
                        let v = _mm256_loadu_si256(w.cast());
                        let u = _mm256_loadu_si256(w.add(32).cast());
                        [
                            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)),
                            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(u)),
                            _mm256_castsi256_ps(_mm256_and_si256(v, high)),
                            _mm256_castsi256_ps(_mm256_and_si256(u, high)),
                        ]
                    }
                    F16 => [
                        _mm256_cvtph_ps(_mm_loadu_si128(w.cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(w.add(16).cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(w.add(32).cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(w.add(48).cast())),
                    ],
                    _ => [
                        _mm256_loadu_ps(w.cast()),
                        _mm256_loadu_ps(w.add(32).cast()),
                        _mm256_loadu_ps(w.add(64).cast()),
                        _mm256_loadu_ps(w.add(96).cast()),
                    ],
                };
                sums[0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x), sums[0]);
                sums[1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x.add(8)), sums[1]);
                sums[2] = _mm256_fmadd_ps(c, _mm256_loadu_ps(x.add(16)), sums[2]);
                sums[3] = _mm256_fmadd_ps(d, _mm256_loadu_ps(x.add(24)), sums[3]);
            }
            step += 1;
        }
        let [a, b, c, d] = sums;
        let mut lanes = [0.0f32; 8];
        let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
        // SAFETY: the store writes eight floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        let done = steps * STEP;
        lanes.iter().sum::<f32>() + tail::<TYPE>(&from[done * size..], &x[done..])
    }
}

#[cfg(test)]
mod tests {
    use attar_tensor::Tensor;
    use attar_tensor::compare::distance;
    use attar_tensor::rng::Rng;

    use super::*;

    #[test]
    fn dense_weights_multiply_in_their_own_type_on_every_instruction_set() {
        let mut rng = Rng::new(1);
        for (rows, columns) in [(37, 64), (5, 77), (40, 1000), (1, 3)] {
            for dtype in [DType::BF16, DType::F16, DType::F32] {
                let values: Vec<f32> = (rng.normals(rows * columns).iter())
                    .map(|&v| bf16::from_f32(v.clamp(-3.0, 3.0)).to_f32())
                    .map(|v| if v.abs() < 1e-3 { 0.0 } else { v })
                    .collect();
                let weight = Tensor::from_f32(dtype, vec![rows, columns], &values).unwrap();
                let x = rng.normals(33 * columns);
                for &isa in Isa::ALL.iter().filter(|isa| isa.supported()) {
                    let mut dense = Dense::new(&weight.view()).unwrap();
                    dense.isa = isa;
                    for m in [1, 3, 33] {
                        let x = &x[..m * columns];
                        let mut want = vec![0.0f32; m * rows];
                        for (want, x) in want.chunks_mut(rows).zip(x.chunks(columns)) {
                            for (want, w) in want.iter_mut().zip(values.chunks(columns)) {
                                let products = w.iter().zip(x);
                                let sum: f64 =
                                    products.map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                                *want = sum as f32;
                            }
                        }
                        let mut got = vec![0.0f32; m * rows];
                        dense.matmul(x, m, &mut got);
                        let found = distance(&got, &want);
                        assert!(found.nmse < 1e-11, "{rows} {columns} {dtype} {isa} {m} {found:?}");
                    }
                }
            }
        }
        assert!(
            Dense::new(&Tensor::from_f32(DType::F32, vec![2], &[1.0, 2.0]).unwrap().view())
                .is_none()
        );
    }
}
