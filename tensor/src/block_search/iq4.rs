//! iq4_nl and iq4_xs: 4-bit codes into a codebook.

use half::f16;

use super::{Block, nearest};
use crate::blocks::IQ4_VALUES;

/// Below this a sub-block counts as zero.
const TINY: f32 = 1e-15;
/// Values that the largest weight is tried on, to both sides of the codebook's first.
const TRIES: i8 = 7;

/// Each sub-block of 32 finds its least-squares scale, weighed by x²; a block of several rounds these to
/// integers times `d`.
pub(super) fn iq4(x: &[f32], to: &mut Block<'_>) {
    let mut scales = [0.0f32; 8];
    let mut extreme = 0.0f32;
    for (x, scale) in x.chunks_exact(32).zip(&mut scales) {
        *scale = scale_of(x);
        if scale.abs() > extreme.abs() {
            extreme = *scale;
        }
    }
    if to.sub_scales.is_empty() {
        *to.d = f16::from_f32(scales[0]);
        codes(x, to.codes, if scales[0] == 0.0 { 0.0 } else { 1.0 / scales[0] });
        return;
    }
    // Codes are rounded on the unrounded d.
    let d = -extreme / 32.0;
    *to.d = f16::from_f32(d);
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    let spans = x.chunks_exact(32).zip(to.codes.chunks_exact_mut(32));
    for ((x, into), (sub, scale)) in spans.zip(to.sub_scales.iter_mut().zip(scales)) {
        let l = nearest(inverse * scale).clamp(-32, 31);
        *sub = l as i8;
        let scale = d * l as f32;
        codes(x, into, if scale == 0.0 { 0.0 } else { 1.0 / scale });
    }
}

fn codes(x: &[f32], codes: &mut [u8], inverse: f32) {
    for (code, v) in codes.iter_mut().zip(x) {
        *code = code_of(inverse * v);
    }
}

/// The nearest entry of the codebook; of two equally near the larger.
fn code_of(x: f32) -> u8 {
    let value = |code: usize| f32::from(IQ4_VALUES[code]);
    if x <= value(0) {
        return 0;
    }
    if x >= value(15) {
        return 15;
    }
    let above = (1..15).find(|&code| x < value(code)).unwrap_or(15);
    (if x - value(above - 1) < value(above) - x { above - 1 } else { above }) as u8
}

fn scale_of(x: &[f32]) -> f32 {
    let mut extreme = 0.0f32;
    for &v in x {
        if v.abs() > extreme.abs() {
            extreme = v;
        }
    }
    if extreme.abs() < TINY {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut sum_qx, mut sum_q2) = (0.0f32, 0.0f32);
        for &v in x {
            let q = f32::from(IQ4_VALUES[usize::from(code_of(inverse * v))]);
            let w = v * v;
            sum_qx += w * q * v;
            sum_q2 += w * q * q;
        }
        (sum_qx, sum_q2)
    };
    let first = f32::from(IQ4_VALUES[0]);
    let (sum_qx, sum_q2) = sums(1.0 / (-extreme / first));
    let mut d = if sum_q2 > 0.0 { sum_qx / sum_q2 } else { 0.0 };
    let mut best = d * sum_qx;
    for step in -TRIES..=TRIES {
        let (sum_qx, sum_q2) = sums((f32::from(step) + first) / extreme);
        if sum_q2 > 0.0 && sum_qx * sum_qx > best * sum_q2 {
            d = sum_qx / sum_q2;
            best = d * sum_qx;
        }
    }
    d
}
