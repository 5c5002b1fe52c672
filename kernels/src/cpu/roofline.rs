//! What this machine can do at most, measured: bytes read from memory and products per second. Kernels are
//! reported as fractions of it.

use std::time::Instant;

use attar_tensor::linalg::isa as isa_in_use;
use rayon::prelude::*;
use serde::Serialize;

use super::buffer::Buffer;
use super::isa::{self, Isa};
use crate::spec::Activations;

/// Ceilings of rayon's current pool with the instruction set in use.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Roofline {
    /// Bytes per second that are read from memory, in 10^9.
    pub read_gb_per_s: f64,
    /// f32 additions and multiplications per second, in 10^9.
    pub f32_gflop_per_s: f64,
    /// Additions and multiplications of bytes per second, in 10^9.
    pub int8_gop_per_s: f64,
}

/// Repetitions; the fastest counts.
const REPEAT: usize = 5;
/// Steps of an arithmetic loop.
const STEPS: usize = if cfg!(test) { 50_000 } else { 2_000_000 };

/// Measures with a stream of `bytes`, which should exceed every cache.
pub fn measure(bytes: usize) -> Roofline {
    let mut buffer = Buffer::new(bytes);
    buffer.par_chunks_mut(1 << 20).for_each(|part| part.fill(1));
    let threads = rayon::current_num_threads();
    let part = (bytes / threads).next_multiple_of(4096).max(4096);
    let mut read = f64::MAX;
    for ask in [None, Some((2048, 1)), Some((2048, 4)), Some((4096, 4))] {
        for _ in 0..REPEAT {
            let started = Instant::now();
            let parts = buffer.par_chunks(part).map(|part| sum(part, ask));
            // The words are whatever they are; their sum wraps.
            let sum = parts.reduce(|| 0, u64::wrapping_add);
            read = read.min(started.elapsed().as_secs_f64());
            std::hint::black_box(sum);
        }
    }
    let rate = |each: fn() -> u64| {
        let mut best = f64::MAX;
        let mut operations = 0;
        for _ in 0..REPEAT {
            let started = Instant::now();
            operations = rayon::broadcast(|_| each()).iter().sum::<u64>();
            best = best.min(started.elapsed().as_secs_f64());
        }
        operations as f64 / best / 1e9
    };
    Roofline {
        read_gb_per_s: bytes as f64 / read / 1e9,
        f32_gflop_per_s: rate(products_f32),
        int8_gop_per_s: rate(products_int8),
    }
}

/// Sums a stream, asking for memory so many bytes ahead of it: for every line into the second-level cache, or for one in
/// four into the first (the processor asks for the others itself).
fn sum(part: &[u8], ask: Option<(usize, usize)>) -> u64 {
    match isa_in_use() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is in use, so this machine has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { x86::sum(part, ask) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: the instruction set is in use, so this machine has it.
        Isa::Neon => unsafe { neon::sum(part, ask) },
        _ => {
            let _ = ask;
            let words = part.as_chunks::<8>().0.iter();
            words.fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
        }
    }
}

fn products_f32() -> u64 {
    match isa_in_use() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is in use, so this machine has it.
        Isa::Avx512 => unsafe { x86::fma_avx512(STEPS) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::fma_avx2(STEPS) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { neon::fma(STEPS) },
        _ => plain(),
    }
}

fn products_int8() -> u64 {
    match isa_in_use() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if isa::supported(Isa::Avx512, Activations::Int8) => {
            // SAFETY: the condition.
            unsafe { x86::dot_avx512(STEPS) }
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction set is in use, so this machine has it.
        Isa::Avx2 | Isa::Avx512 => unsafe { x86::dot_avx2(STEPS) },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon if isa::supported(Isa::Neon, Activations::Int8) => {
            // SAFETY: the condition.
            unsafe { neon::dot(STEPS) }
        }
        _ => plain(),
    }
}

/// Multiplies and adds without vectors of its own.
fn plain() -> u64 {
    let mut sums = [1.0f32; 16];
    let (a, b) = (std::hint::black_box(0.999f32), std::hint::black_box(0.001f32));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = *sum * a + b;
        }
    }
    std::hint::black_box(sums);
    32 * STEPS as u64
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::{
        vaddq_u64, vaddvq_u64, vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vdupq_n_u64, vfmaq_f32,
        vld1q_u8, vreinterpretq_u64_u8,
    };
    use std::hint::black_box;

    use super::super::neon::{dot as dot_bytes, prefetch};

    #[target_feature(enable = "neon")]
    pub(super) fn sum(part: &[u8], ask: Option<(usize, usize)>) -> u64 {
        let mut sums = [vdupq_n_u64(0); 16];
        for chunk in part.as_chunks::<256>().0 {
            if let Some((ahead, lines)) = ask {
                for line in 0..lines {
                    prefetch(chunk.as_ptr().wrapping_add(ahead + 64 * line));
                }
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: sixteen loads of 16 bytes are the chunk.
                let v = unsafe { vld1q_u8(chunk.as_ptr().add(16 * i)) };
                *sum = vaddq_u64(*sum, vreinterpretq_u64_u8(v));
            }
        }
        sums.into_iter().fold(0, |total, sum| total.wrapping_add(vaddvq_u64(sum)))
    }

    /// Sixteen chains, of latency four on four pipes.
    #[target_feature(enable = "neon")]
    pub(super) fn fma(steps: usize) -> u64 {
        let (a, b) = (vdupq_n_f32(black_box(0.999)), vdupq_n_f32(black_box(0.001)));
        let mut sums = [vdupq_n_f32(1.0); 16];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, a, b);
            }
        }
        black_box(sums);
        16 * 8 * steps as u64
    }

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn dot(steps: usize) -> u64 {
        let (a, b) = (vdupq_n_s8(black_box(3)), vdupq_n_s8(black_box(-5)));
        let mut sums = [vdupq_n_s32(0); 16];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = dot_bytes(*sum, a, b);
            }
        }
        black_box(sums);
        16 * 32 * steps as u64
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm256_add_epi16, _mm256_add_epi64,
        _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_maddubs_epi16, _mm256_set1_epi8,
        _mm256_set1_ps, _mm256_setzero_si256, _mm256_storeu_si256, _mm512_dpbusd_epi32,
        _mm512_fmadd_ps, _mm512_set1_epi8, _mm512_set1_ps, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    #[target_feature(enable = "avx2")]
    pub(super) fn sum(part: &[u8], ask: Option<(usize, usize)>) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        for chunk in part.as_chunks::<256>().0 {
            match ask {
                None => {}
                Some((ahead, 1)) => {
                    _mm_prefetch::<_MM_HINT_T0>(chunk.as_ptr().wrapping_add(ahead).cast());
                }
                Some((ahead, lines)) => {
                    for line in 0..lines {
                        let at = chunk.as_ptr().wrapping_add(ahead + 64 * line);
                        _mm_prefetch::<_MM_HINT_T1>(at.cast());
                    }
                }
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight loads of 32 bytes are the chunk.
                let v = unsafe { _mm256_loadu_si256(chunk.as_ptr().add(32 * i).cast()) };
                *sum = _mm256_add_epi64(*sum, v);
            }
        }
        let mut total = 0u64;
        for sum in sums {
            let mut lanes = [0u64; 4];
            // SAFETY: the store writes 32 bytes.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
            total = lanes.iter().fold(total, |a, &b| a.wrapping_add(b));
        }
        total
    }

    /// Ten chains, more than latency times throughput.
    macro_rules! chains {
        ($steps:expr, $start:expr, $operation:expr, $lanes:expr) => {{
            let mut sums = [$start; 10];
            for _ in 0..$steps {
                for sum in &mut sums {
                    *sum = $operation(*sum);
                }
            }
            black_box(sums);
            10 * $lanes * $steps as u64
        }};
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma_avx512(steps: usize) -> u64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        chains!(steps, _mm512_set1_ps(1.0), |sum| _mm512_fmadd_ps(sum, a, b), 32)
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma_avx2(steps: usize) -> u64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        chains!(steps, _mm256_set1_ps(1.0), |sum| _mm256_fmadd_ps(sum, a, b), 16)
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot_avx512(steps: usize) -> u64 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        chains!(steps, _mm512_setzero_si512(), |sum| _mm512_dpbusd_epi32(sum, a, b), 128)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn dot_avx2(steps: usize) -> u64 {
        let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
        let step = |sum| _mm256_add_epi16(sum, _mm256_maddubs_epi16(black_box(a), b));
        chains!(steps / 4, _mm256_setzero_si256(), step, 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ceiling_is_a_number() {
        let found = measure(4 << 20);
        for value in [found.read_gb_per_s, found.f32_gflop_per_s, found.int8_gop_per_s] {
            assert!(value.is_finite() && value > 0.0, "{found:?}");
        }
    }
}
