//! Element-wise functions, vectorised for the CPU found at run time through `pulp`'s safe dispatch.
//! The order of every reduction is fixed, so the bits do not depend on threads.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use pulp::{Simd, WithSimd};

use super::isa::arch;

/// Carries a closure into `pulp`'s dispatch. pulp takes closures as `FnOnce`, and the shim through which
/// a closure that only borrows is called that way is not inlined, so that the body would be compiled
/// without vector instructions; `FnMut` has no shim.
struct Body<F>(F);

impl<R, F: FnMut() -> R> WithSimd for Body<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}

/// Runs `body` compiled for the instruction set in use ([`super::isa`]: AVX-512, AVX2 + FMA or the baseline).
/// The closure and all it calls must be `#[inline(always)]`.
#[inline(always)]
pub fn vectorize<R>(body: impl FnMut() -> R) -> R {
    arch().dispatch(Body(body))
}

/// Partial results of a reduction: two AVX-512 registers.
const LANES: usize = 32;

/// Folds lanes of equal position, then the tail into the first lanes, then halves of the lanes.
#[inline(always)]
fn reduce(
    x: &[f32],
    init: f32,
    f: impl Fn(f32, f32) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [init; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = f(lanes[i], chunk[i]);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane = f(*lane, v);
    }
    fold(lanes, join)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger of two numbers, as one instruction (`f32::max` spends three on NaN).
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// `e^x` with a relative error under 1e-6; 0 below -87, saturates above 88.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Cody-Waite reduction x = k ln 2 + r, then the Taylor polynomial of degree 6 on |r| <= 0.347.
    const HI: f32 = 0.693_359_4;
    const LO: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum: no conversion is needed,
    // and the loop around this stays a vector loop.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = if x > 88.0 { 88.0 } else { x };
    let clamped = if clamped < -87.0 { -87.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = (clamped - k * HI) - k * LO;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let y = p * power;
    if x < -87.0 { 0.0 } else { y }
}

/// Replaces every element by its exponential (relative error under 1e-6).
pub fn exp_in_place(x: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for v in x.iter_mut() {
                *v = exp(*v);
            }
        },
    );
}

/// Dot product, f32 in 32 lanes.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || dot_inline(a, b),
    )
}

/// The body of [`dot`], for loops that are vectorised as a whole.
#[inline(always)]
pub(super) fn dot_inline(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let len = a.len().min(b.len());
    let ((a, tail_a), (b, tail_b)) = (a[..len].as_chunks::<LANES>(), b[..len].as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let tail: f32 = tail_a.iter().zip(tail_b).map(|(a, b)| a * b).sum();
    fold(lanes, |a, b| a + b) + tail
}

/// Largest absolute value; 0 for an empty slice.
pub fn abs_max(x: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || reduce(x, 0.0, |a, b| larger(a, b.abs()), larger),
    )
}

/// [`dot_inline`] of `a` with four rows of its length; each sum has the bits that `dot_inline` gives.
#[inline(always)]
pub(super) fn dots_inline(a: &[f32], rows: [&[f32]; 4]) -> [f32; 4] {
    let (a, tail_a) = a.as_chunks::<LANES>();
    let split = rows.map(|row| row.as_chunks::<LANES>());
    let mut lanes = [[0.0f32; LANES]; 4];
    let [r0, r1, r2, r3] = split.map(|(chunks, _)| chunks);
    for ((((a, r0), r1), r2), r3) in a.iter().zip(r0).zip(r1).zip(r2).zip(r3) {
        for i in 0..LANES {
            lanes[0][i] += a[i] * r0[i];
            lanes[1][i] += a[i] * r1[i];
            lanes[2][i] += a[i] * r2[i];
            lanes[3][i] += a[i] * r3[i];
        }
    }
    let mut sums = lanes.map(|lanes| fold(lanes, |a, b| a + b));
    for (sum, (_, tail)) in sums.iter_mut().zip(split) {
        *sum += tail_a.iter().zip(tail).map(|(a, b)| a * b).sum::<f32>();
    }
    sums
}

/// Sum of squares, f32 in 32 lanes; 0 for an empty slice.
pub fn sum_sq(x: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || reduce(x, 0.0, |a, b| a + b * b, |a, b| a + b),
    )
}

/// `y += alpha * x`.
pub fn axpy(alpha: f32, x: &[f32], y: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += alpha * x;
            }
        },
    );
}

/// Index of the first NaN or infinity.
pub fn first_non_finite(x: &[f32]) -> Option<usize> {
    /// Searched without an early exit, so that the search is a vector loop.
    const CHUNK: usize = 4096;
    const INFINITE: u32 = f32::INFINITY.to_bits();
    let largest_exponent = |largest: u32, v: &f32| largest.max(v.abs().to_bits());
    let chunk = vectorize(
        #[inline(always)]
        || x.chunks(CHUNK).position(|chunk| chunk.iter().fold(0, largest_exponent) >= INFINITE),
    )?;
    let start = chunk * CHUNK;
    x[start..].iter().position(|v| !v.is_finite()).map(|at| start + at)
}

/// Softmax of one row in place; rows of `-inf` only are not allowed.
pub fn softmax_row_in_place(x: &mut [f32]) {
    softmax_row_log_sum(x);
}

/// As [`softmax_row_in_place`]; returns `ln Σ e^x`.
pub fn softmax_row_log_sum(x: &mut [f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            let max = reduce(x, f32::NEG_INFINITY, larger, larger);
            for v in x.iter_mut() {
                *v = exp(*v - max);
            }
            let sum = reduce(x, 0.0, |a, b| a + b, |a, b| a + b);
            let inverse = 1.0 / sum;
            for v in x.iter_mut() {
                *v *= inverse;
            }
            max + sum.ln()
        },
    )
}

/// `gate = silu(gate) * up`, `silu(v) = v / (1 + e^-v)`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (g, &u) in gate.iter_mut().zip(up) {
                *g = *g / (1.0 + exp(-*g)) * u;
            }
        },
    );
}

/// `out = x / sqrt(mean(x²) + eps) * weight`, one row.
pub fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            let square = reduce(x, 0.0, |a, b| a + b * b, |a, b| a + b);
            let scale = 1.0 / (square / x.len() as f32 + eps).sqrt();
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        },
    );
}

/// Backward of [`softmax_row_in_place`] for its result `p`: `d = p ⊙ (d - Σ p d)`, in place.
pub fn softmax_row_backward(p: &[f32], d: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            let mean = dot_inline(p, d);
            for (d, &p) in d.iter_mut().zip(p) {
                *d = p * (*d - mean);
            }
        },
    );
}

/// Backward of [`silu_mul`] for `d` on its result: `gate` and `up` become their own gradients and `d` becomes the
/// result `silu(gate) · up` itself, which the gradient of the linear behind it needs.
pub fn silu_mul_backward(gate: &mut [f32], up: &mut [f32], d: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for ((g, u), d) in gate.iter_mut().zip(up.iter_mut()).zip(d.iter_mut()) {
                let below = 1.0 + exp(-*g);
                // As in `silu_mul`, to the bit.
                let (sigmoid, silu) = (1.0 / below, *g / below);
                let (d_up, d_silu, made) = (*d * silu, *d * *u, silu * *u);
                *g = d_silu * (sigmoid + silu * (1.0 - sigmoid));
                *u = d_up;
                *d = made;
            }
        },
    );
}

/// Backward of [`rms_norm_row`] for `d_out` on its result: adds to `d_x`, and to `d_weight` when it is wanted. With
/// `s = 1 / sqrt(mean(x²) + eps)`: `d_x += s w d_out - x s³ Σ(w d_out x) / n`, `d_weight += s x d_out`.
pub fn rms_norm_row_backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    d_out: &[f32],
    d_x: &mut [f32],
    d_weight: Option<&mut [f32]>,
) {
    let mut d_weight = d_weight;
    vectorize(
        #[inline(always)]
        || {
            let n = x.len();
            let (weight, d_out, d_x) = (&weight[..n], &d_out[..n], &mut d_x[..n]);
            let square = reduce(x, 0.0, |a, b| a + b * b, |a, b| a + b);
            let scale = 1.0 / (square / n as f32 + eps).sqrt();
            let mut lanes = [0.0f32; LANES];
            let (xs, x_tail) = x.as_chunks::<LANES>();
            let (ws, w_tail) = weight.as_chunks::<LANES>();
            let (ds, d_tail) = d_out.as_chunks::<LANES>();
            for ((x, w), d) in xs.iter().zip(ws).zip(ds) {
                for i in 0..LANES {
                    lanes[i] += x[i] * w[i] * d[i];
                }
            }
            let tail: f32 =
                x_tail.iter().zip(w_tail).zip(d_tail).map(|((x, w), d)| x * w * d).sum();
            let along = (fold(lanes, |a, b| a + b) + tail) * scale * scale * scale / n as f32;
            for ((d_x, &x), (&w, &d)) in d_x.iter_mut().zip(x).zip(weight.iter().zip(d_out)) {
                *d_x += scale * w * d - x * along;
            }
            if let Some(d_weight) = d_weight.as_deref_mut() {
                for ((d_w, &x), &d) in d_weight.iter_mut().zip(x).zip(d_out) {
                    *d_w += scale * x * d;
                }
            }
        },
    );
}

/// `y += x`.
pub fn add_in_place(x: &[f32], y: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += x;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0.0f64;
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            let mut got = [x];
            exp_in_place(&mut got);
            worst = worst.max((f64::from(got[0]) - want).abs() / want);
        }
        assert!(worst < 1e-6, "{worst}");
        let mut edge = [f32::NEG_INFINITY, -1e30, 1e30, f32::NAN];
        exp_in_place(&mut edge);
        assert!(edge[0].abs() + edge[1].abs() < f32::MIN_POSITIVE);
        assert!(edge[2].is_finite() && edge[3].is_nan());
    }

    #[test]
    fn rows_follow_their_formulas() {
        let x = Rng::new(1).normals(37);
        let mut p = x.clone();
        softmax_row_in_place(&mut p);
        let total: f64 = x.iter().map(|&v| f64::from(v).exp()).sum();
        assert!((f64::from(softmax_row_log_sum(&mut x.clone())) - total.ln()).abs() < 1e-6);
        for (p, x) in p.iter().zip(&x) {
            assert!((f64::from(*p) - f64::from(*x).exp() / total).abs() < 1e-6);
        }
        let mut g = x.clone();
        silu_mul(&mut g, &x);
        for (g, x) in g.iter().zip(&x) {
            assert!((g - x / (1.0 + (-x).exp()) * x).abs() < 1e-5);
        }
        assert!((sum_sq(&x) - dot(&x, &x)).abs() < 1e-4);
        let mut y = x.clone();
        axpy(-0.5, &x, &mut y);
        assert!(y.iter().zip(&x).all(|(y, x)| (y - 0.5 * x).abs() < 1e-6));
        let mut n = vec![0.0; 37];
        rms_norm_row(&x, &[2.0; 37], 1e-6, &mut n);
        let mean: f32 = n.iter().map(|v| v * v).sum::<f32>() / 37.0;
        assert!((mean - 4.0).abs() < 1e-3);
        assert!((abs_max(&x) - x.iter().fold(0.0f32, |a, b| a.max(b.abs()))).abs() < f32::EPSILON);
        assert!((dot(&x, &x) - x.iter().map(|v| v * v).sum::<f32>()).abs() < 1e-3);
    }

    #[test]
    fn backwards_agree_with_central_differences_in_f64() {
        let mut rng = Rng::new(7);
        let n = 37;
        let (x, w, u, d) = (rng.normals(n), rng.normals(n), rng.normals(n), rng.normals(n));
        let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let (x64, w64, u64s, d64) = (wide(&x), wide(&w), wide(&u), wide(&d));
        let loss = |out: &[f64]| out.iter().zip(&d64).map(|(a, b)| a * b).sum::<f64>();
        let slope = |at: &[f64], f: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            (0..at.len())
                .map(|i| {
                    let moved = |by: f64| {
                        let mut at = at.to_vec();
                        at[i] += by;
                        f(&at)
                    };
                    (moved(1e-5) - moved(-1e-5)) / 2e-5
                })
                .collect()
        };
        let agree = |got: &[f32], want: &[f64]| {
            for (got, want) in got.iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < 3e-6 * (1.0 + want.abs()), "{got} {want}");
            }
        };
        let norm = |x: &[f64], w: &[f64]| -> f64 {
            let s = (x.iter().map(|v| v * v).sum::<f64>() / n as f64 + 1e-3).sqrt();
            loss(&x.iter().zip(w).map(|(x, w)| x / s * w).collect::<Vec<_>>())
        };
        let (mut dx, mut dw) = (vec![0.0; n], vec![0.0; n]);
        rms_norm_row_backward(&x, &w, 1e-3, &d, &mut dx, Some(&mut dw));
        agree(&dx, &slope(&x64, &|x| norm(x, &w64)));
        agree(&dw, &slope(&w64, &|w| norm(&x64, w)));
        let soft = |x: &[f64]| {
            let sum: f64 = x.iter().map(|v| v.exp()).sum();
            loss(&x.iter().map(|v| v.exp() / sum).collect::<Vec<_>>())
        };
        let (mut p, mut ds) = (x.clone(), d.clone());
        softmax_row_in_place(&mut p);
        softmax_row_backward(&p, &mut ds);
        agree(&ds, &slope(&x64, &soft));
        let gated = |g: &[f64], u: &[f64]| {
            loss(&g.iter().zip(u).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>())
        };
        let (mut dg, mut du, mut made) = (x.clone(), u.clone(), d.clone());
        silu_mul_backward(&mut dg, &mut du, &mut made);
        agree(&dg, &slope(&x64, &|g| gated(g, &u64s)));
        agree(&du, &slope(&u64s, &|u| gated(&x64, u)));
        let mut forward = x.clone();
        silu_mul(&mut forward, &u);
        assert_eq!(made, forward);
    }
}
