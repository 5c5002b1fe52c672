//! The k-quants: each sub-block finds a scale (and a minimum) of its own by trying ranges, the block rounds
//! these to integers times `d` (`dmin`), and the codes are rounded once more on what was stored.

use half::f16;

use super::{Block, nearest};

/// Below this a sub-block counts as zero.
const TINY: f32 = 1e-15;

/// q2_k: 16 sub-blocks of 16, weighed by |x|, absolute errors.
pub(super) fn q2_k(x: &[f32], to: &mut Block<'_>) {
    let (mut scales, mut mins) = ([0.0f32; 16], [0.0f32; 16]);
    let spans = x.chunks_exact(16).zip(to.codes.chunks_exact_mut(16));
    for ((x, codes), (scale, min)) in spans.zip(scales.iter_mut().zip(&mut mins)) {
        let weights: [f32; 16] = std::array::from_fn(|l| x[l].abs());
        (*scale, *min) = affine_fit(x, &weights, codes, 3, (-0.5, 15), f32::abs);
    }
    let (d, dmin) = (round_to_grid(&scales, 15), round_to_grid(&mins, 15));
    *to.d = d.0;
    *to.dmin = dmin.0;
    for s in 0..16 {
        to.sub_scales[s] = d.1[s] as i8;
        to.sub_mins[s] = dmin.1[s];
    }
    finish_affine(x, to, 16, 3);
}

/// q4_k and q5_k: 8 sub-blocks of 32, weighed by the root mean square plus |x|, squared errors.
pub(super) fn q45_k(x: &[f32], to: &mut Block<'_>, top: u8, range: (f32, u8)) {
    let (mut scales, mut mins) = ([0.0f32; 8], [0.0f32; 8]);
    let spans = x.chunks_exact(32).zip(to.codes.chunks_exact_mut(32));
    for ((x, codes), (scale, min)) in spans.zip(scales.iter_mut().zip(&mut mins)) {
        let mean = (x.iter().fold(0.0f32, |sum, v| sum + v * v) / 32.0).sqrt();
        let weights: [f32; 32] = std::array::from_fn(|l| mean + x[l].abs());
        (*scale, *min) = affine_fit(x, &weights, codes, top, range, |e| e * e);
    }
    let (d, dmin) = (round_to_grid(&scales, 63), round_to_grid(&mins, 63));
    *to.d = d.0;
    *to.dmin = dmin.0;
    for s in 0..8 {
        to.sub_scales[s] = d.1[s] as i8;
        to.sub_mins[s] = dmin.1[s];
    }
    finish_affine(x, to, 32, top);
}

/// q3_k: 16 sub-blocks of 16, codes improved one by one.
pub(super) fn q3_k(x: &[f32], to: &mut Block<'_>) {
    let mut scales = [0.0f32; 16];
    let spans = x.chunks_exact(16).zip(to.codes.chunks_exact_mut(16));
    for ((x, codes), scale) in spans.zip(&mut scales) {
        *scale = refined_fit(x, codes, 4);
    }
    let extreme = extreme(&scales);
    if extreme == 0.0 {
        *to.d = f16::ZERO;
        to.sub_scales.fill(-32);
    } else {
        let inverse = -32.0 / extreme;
        for (to, scale) in to.sub_scales.iter_mut().zip(scales) {
            *to = (nearest(inverse * scale) as i8).clamp(-32, 31);
        }
        *to.d = f16::from_f32(1.0 / inverse);
    }
    finish_symmetric(x, to, 4);
}

/// q6_k: 16 sub-blocks of 16, weighed by x².
pub(super) fn q6_k(x: &[f32], to: &mut Block<'_>) {
    let mut scales = [0.0f32; 16];
    let spans = x.chunks_exact(16).zip(to.codes.chunks_exact_mut(16));
    for ((x, codes), scale) in spans.zip(&mut scales) {
        *scale = symmetric_fit(x, codes, 32);
    }
    let extreme = extreme(&scales);
    if extreme.abs() < TINY {
        to.codes.fill(0);
        to.sub_scales.fill(0);
        *to.d = f16::ZERO;
        return;
    }
    let inverse = -128.0 / extreme;
    *to.d = f16::from_f32(1.0 / inverse);
    for (to, scale) in to.sub_scales.iter_mut().zip(scales) {
        *to = nearest(inverse * scale).min(127) as i8;
    }
    finish_symmetric(x, to, 32);
}

/// The value of largest size, the first of equals.
fn extreme(x: &[f32]) -> f32 {
    let mut found = 0.0f32;
    for &v in x {
        if v.abs() > found.abs() {
            found = v;
        }
    }
    found
}

/// Non-negative scales as integers times a half: the largest becomes `top`.
fn round_to_grid(scales: &[f32], top: u8) -> (f16, [u8; 16]) {
    let largest = scales.iter().fold(0.0f32, |a, &s| if s > a { s } else { a });
    let mut integers = [0u8; 16];
    if largest > 0.0 {
        let inverse = f32::from(top) / largest;
        for (to, scale) in integers.iter_mut().zip(scales) {
            *to = nearest(inverse * scale).clamp(0, i32::from(top)) as u8;
        }
    }
    (f16::from_f32(largest / f32::from(top)), integers)
}

/// Codes of each sub-block on the stored scale and minimum. Where the stored scale is 0 the codes stay.
fn finish_affine(x: &[f32], to: &mut Block<'_>, sub: usize, top: u8) {
    let (d, dmin) = (to.d.to_f32(), to.dmin.to_f32());
    let spans = x.chunks_exact(sub).zip(to.codes.chunks_exact_mut(sub));
    for (s, (x, codes)) in spans.enumerate() {
        let scale = d * f32::from(to.sub_scales[s]);
        if scale == 0.0 {
            continue;
        }
        let min = dmin * f32::from(to.sub_mins[s]);
        for (code, v) in codes.iter_mut().zip(x) {
            *code = nearest((v + min) / scale).clamp(0, i32::from(top)) as u8;
        }
    }
}

/// The same around a zero of `half`, for sub-blocks of 16.
fn finish_symmetric(x: &[f32], to: &mut Block<'_>, half: i32) {
    let d = to.d.to_f32();
    let spans = x.chunks_exact(16).zip(to.codes.chunks_exact_mut(16));
    for (s, (x, codes)) in spans.enumerate() {
        let scale = d * f32::from(to.sub_scales[s]);
        if scale == 0.0 {
            continue;
        }
        for (code, v) in codes.iter_mut().zip(x) {
            *code = (nearest(v / scale).clamp(-half, half - 1) + half) as u8;
        }
    }
}

/// Scale and (negated) minimum of one sub-block: of `range.1 + 1` stretched ranges, each with its least-squares
/// line through the codes, the one with the least weighted error. A minimum above zero becomes zero.
fn affine_fit(
    x: &[f32],
    weights: &[f32],
    codes: &mut [u8],
    top: u8,
    range: (f32, u8),
    loss: impl Fn(f32) -> f32,
) -> (f32, f32) {
    let (mut low, mut high) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for (&v, &w) in x.iter().zip(weights).skip(1) {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    low = if low > 0.0 { 0.0 } else { low };
    if high <= low {
        codes.fill(0);
        return (0.0, -low);
    }
    let top_f = f32::from(top);
    let code_of =
        |inverse: f32, v: f32, low: f32| nearest(inverse * (v - low)).clamp(0, i32::from(top));
    let error = |scale: f32, min: f32, codes: &[u8]| {
        let terms = codes.iter().zip(x).zip(weights);
        terms.fold(0.0f32, |sum, ((&code, v), w)| sum + w * loss(scale * f32::from(code) + min - v))
    };
    let inverse = top_f / (high - low);
    let (mut scale, mut min) = (1.0 / inverse, low);
    for (code, &v) in codes.iter_mut().zip(x) {
        *code = code_of(inverse, v, low) as u8;
    }
    let mut least = error(scale, min, codes);
    let mut tried = [0u8; 32];
    let tried = &mut tried[..x.len()];
    for step in 0..=range.1 {
        // From the best minimum so far to the largest weight, stretched.
        let inverse = (range.0 + 0.1 * f32::from(step) + top_f) / (high - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((to, &v), &w) in tried.iter_mut().zip(x).zip(weights) {
            let code = code_of(inverse, v, min);
            *to = code as u8;
            let l = code as f32;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * v;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if new_min > 0.0 {
                new_min = 0.0;
                new_scale = sum_xl / sum_l2;
            }
            let found = error(new_scale, new_min, tried);
            if found < least {
                codes.copy_from_slice(tried);
                (least, scale, min) = (found, new_scale, new_min);
            }
        }
    }
    (scale, -min)
}

/// Scale of one sub-block around zero: of 19 stretched ranges, each with its least-squares scale weighed by
/// x², the best. The weight of largest size is code 0 of the first range.
fn symmetric_fit(x: &[f32], codes: &mut [u8], half: i32) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    let level = |inverse: f32, v: f32| nearest(inverse * v).clamp(-half, half - 1);
    let sums = |inverse: f32| {
        let (mut sum_xl, mut sum_l2) = (0.0f32, 0.0f32);
        for &v in x {
            let l = level(inverse, v) as f32;
            let w = v * v;
            sum_xl += w * v * l;
            sum_l2 += w * l * l;
        }
        (sum_xl, sum_l2)
    };
    let mut store = |inverse: f32| {
        for (code, &v) in codes.iter_mut().zip(x) {
            *code = (level(inverse, v) + half) as u8;
        }
    };
    let first = -(half as f32) / extreme;
    store(first);
    let (sum_xl, sum_l2) = sums(first);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_xl / sum_l2 };
    let mut best = scale * sum_xl;
    for step in (-9i8..=9).filter(|&step| step != 0) {
        let inverse = -(half as f32 + 0.1 * f32::from(step)) / extreme;
        let (sum_xl, sum_l2) = sums(inverse);
        if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
            store(inverse);
            scale = sum_xl / sum_l2;
            best = scale * sum_xl;
        }
    }
    scale
}

/// Scale of one sub-block around zero, weighed by x²: codes of the full range, then up to five rounds in which
/// each code moves where the least-squares fit of the others puts it, if that is better.
fn refined_fit(x: &[f32], codes: &mut [u8], half: i32) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -(half as f32) / extreme;
    let mut levels = [0i32; 16];
    let (mut sum_xl, mut sum_l2) = (0.0f32, 0.0f32);
    for (level, &v) in levels.iter_mut().zip(x) {
        *level = nearest(inverse * v).clamp(-half, half - 1);
        let (l, w) = (*level as f32, v * v);
        sum_xl += w * v * l;
        sum_l2 += w * l * l;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (level, &v) in levels.iter_mut().zip(x) {
            let (l, w) = (*level as f32, v * v);
            let mut others_xl = sum_xl - w * v * l;
            if others_xl <= 0.0 {
                continue;
            }
            let mut others_l2 = sum_l2 - w * l * l;
            let new = nearest(v * others_l2 / others_xl).clamp(-half, half - 1);
            if new == *level {
                continue;
            }
            let l = new as f32;
            others_xl += w * v * l;
            others_l2 += w * l * l;
            if others_l2 > 0.0 && others_xl * others_xl * sum_l2 > sum_xl * sum_xl * others_l2 {
                (*level, sum_xl, sum_l2, moved) = (new, others_xl, others_l2, true);
            }
        }
        if !moved {
            break;
        }
    }
    for (code, level) in codes.iter_mut().zip(levels) {
        *code = (level + half) as u8;
    }
    if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }
}
