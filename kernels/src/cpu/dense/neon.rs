//! Rows of dense weights on NEON.

use std::arch::aarch64::{
    float32x4_t, vaddq_f32, vaddvq_f32, vcvt_f32_f16, vdupq_n_f32, vfmaq_f32, vget_high_u16,
    vget_low_u16, vld1q_f32, vld1q_u16, vreinterpret_f16_u16, vreinterpretq_f32_u32, vshll_n_u16,
};

use super::super::neon::prefetch;
use super::{AHEAD, BF16, F16, F32, STEP, tail};

/// A row of bf16, f16 or f32 times activations.
#[target_feature(enable = "neon")]
pub(super) fn dot<const TYPE: u8>(from: &[u8], x: &[f32]) -> f32 {
    let size = if TYPE == F32 { 4 } else { 2 };
    assert_eq!(from.len(), x.len() * size);
    let (steps, mut sums) = (x.len() / STEP, [vdupq_n_f32(0.0); 8]);
    for step in 0..steps {
        // SAFETY: a step is 32 weights of a row and as many activations, by the assertion.
        unsafe {
            let (w, x) = (from.as_ptr().add(step * STEP * size), x.as_ptr().add(step * STEP));
            prefetch(w.wrapping_add(AHEAD));
            if TYPE == F32 {
                prefetch(w.wrapping_add(AHEAD + 64));
            }
            for (i, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let (a, b): (float32x4_t, float32x4_t) = if TYPE == F32 {
                    let w = w.add(32 * i).cast();
                    (vld1q_f32(w), vld1q_f32(w.add(4)))
                } else {
                    let w = vld1q_u16(w.add(16 * i).cast());
                    let (low, high) = (vget_low_u16(w), vget_high_u16(w));
                    if TYPE == F16 {
                        let wide = |half| vcvt_f32_f16(vreinterpret_f16_u16(half));
                        (wide(low), wide(high))
                    } else {
                        const { assert!(TYPE == F32 || TYPE == F16 || TYPE == BF16) };
                        let wide = |half| vreinterpretq_f32_u32(vshll_n_u16::<16>(half));
                        (wide(low), wide(high))
                    }
                };
                sums[0] = vfmaq_f32(sums[0], a, vld1q_f32(x.add(8 * i)));
                sums[1] = vfmaq_f32(sums[1], b, vld1q_f32(x.add(8 * i + 4)));
            }
        }
    }
    let [a, b, c, d, e, f, g, h] = sums;
    let low = vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d));
    let high = vaddq_f32(vaddq_f32(e, f), vaddq_f32(g, h));
    let done = steps * STEP;
    vaddvq_f32(vaddq_f32(low, high)) + tail::<TYPE>(&from[done * size..], &x[done..])
}
