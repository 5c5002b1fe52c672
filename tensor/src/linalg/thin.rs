//! Products of a few rows, where packing B does not pay: B is read once, in the order in which it lies.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use super::{
    microkernel::Product,
    simd::{dot_inline, dots_inline, vectorize},
};

/// Rows of B that go to the output together when they lie across the depth.
const DEPTHS: usize = 4;
/// Rows of B that are multiplied together when they lie along the depth: as many streams of memory.
const ROWS: usize = 4;

/// As [`super::microkernel::multiply`], for a few rows of A; `below` and `panels` are not looked at.
pub(super) fn multiply(product: Product<'_>) {
    let Product { shape: (m, n, k), alpha, a, b, add, out, ldo, .. } = product;
    if m == 0 || n == 0 {
        return;
    }
    // The rows of A, contiguous.
    let mut copy = Vec::new();
    let (a, lda) = if a.depth_contiguous {
        (a.data, a.stride)
    } else {
        copy.reserve_exact(m * k);
        for i in 0..m {
            copy.extend((0..k).map(|l| a.data[l * a.stride + i]));
        }
        (copy.as_slice(), k)
    };
    if b.depth_contiguous {
        vectorize(
            #[inline(always)]
            || {
                let row = |j: usize| &b.data[j * b.stride..][..k];
                let mut put = |at: usize, sum: f32| {
                    out[at] = if add { out[at] + alpha * sum } else { alpha * sum };
                };
                let together = n / ROWS * ROWS;
                for j in (0..together).step_by(ROWS) {
                    let rows = [row(j), row(j + 1), row(j + 2), row(j + 3)];
                    for i in 0..m {
                        let sums = dots_inline(&a[i * lda..][..k], rows);
                        for (r, sum) in sums.into_iter().enumerate() {
                            put(i * ldo + j + r, sum);
                        }
                    }
                }
                for j in together..n {
                    for i in 0..m {
                        put(i * ldo + j, dot_inline(&a[i * lda..][..k], row(j)));
                    }
                }
            },
        );
        return;
    }
    if !add {
        for row in out.chunks_mut(ldo.max(1)).take(m) {
            row[..n].fill(0.0);
        }
    }
    vectorize(
        #[inline(always)]
        || {
            for l in (0..k).step_by(DEPTHS) {
                let depths = DEPTHS.min(k - l);
                for i in 0..m {
                    let to = &mut out[i * ldo..][..n];
                    let factor = |d: usize| alpha * a[i * lda + l + d];
                    let row = |d: usize| &b.data[(l + d) * b.stride..][..n];
                    if depths == DEPTHS {
                        let f = [factor(0), factor(1), factor(2), factor(3)];
                        let r = [row(0), row(1), row(2), row(3)];
                        for (c, to) in to.iter_mut().enumerate() {
                            *to += (f[0] * r[0][c] + f[1] * r[1][c])
                                + (f[2] * r[2][c] + f[3] * r[3][c]);
                        }
                    } else {
                        for d in 0..depths {
                            let (factor, row) = (factor(d), row(d));
                            for (to, &x) in to.iter_mut().zip(row) {
                                *to += factor * x;
                            }
                        }
                    }
                }
            }
        },
    );
}
