//! Types with one scale per 32 weights: the range decides.

use half::f16;

use super::Block;

/// `d = max|x| / 127`, rounded half away from zero.
pub(super) fn q8_0(x: &[f32], to: &mut Block<'_>) {
    let largest = x.iter().fold(0.0f32, |a, v| if v.abs() > a { v.abs() } else { a });
    let d = largest / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    *to.d = f16::from_f32(d);
    for (code, &v) in to.codes.iter_mut().zip(x) {
        *code = (v * inverse).round() as i8 as u8 ^ 128;
    }
}

/// q4_0 and q5_0: the weight that is largest in size becomes code 0, `d = extreme / −half`. The first of
/// equals counts. Codes are cut after adding a half.
pub(super) fn around_zero(x: &[f32], to: &mut Block<'_>, half: f32) {
    let mut extreme = 0.0f32;
    for &v in x {
        if v.abs() > extreme.abs() {
            extreme = v;
        }
    }
    let d = extreme / -half;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    *to.d = f16::from_f32(d);
    let top = 2.0f32.mul_add(half, -1.0) as i8;
    for (code, &v) in to.codes.iter_mut().zip(x) {
        *code = ((v * inverse + (half + 0.5)) as i8).min(top) as u8;
    }
}

/// q4_1 and q5_1: `d = (max − min) / top`, `dmin = min`. Codes come from the unrounded minimum.
pub(super) fn above_minimum(x: &[f32], to: &mut Block<'_>, top: u8) {
    let (mut low, mut high) = (f32::MAX, -f32::MAX);
    for &v in x {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
    }
    let d = (high - low) / f32::from(top);
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    *to.d = f16::from_f32(d);
    *to.dmin = f16::from_f32(low);
    for (code, &v) in to.codes.iter_mut().zip(x) {
        *code = (((v - low) * inverse + 0.5) as u8).min(top);
    }
}
