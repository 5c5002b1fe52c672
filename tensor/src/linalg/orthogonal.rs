//! Seeded orthogonal matrices `Q [n, n]` that are cheap to apply: `Q = D (H ⊗ O)`.
//!
//! D are random signs, H is the normalised Walsh-Hadamard matrix of order `p`, a power of two, and O a random
//! orthogonal matrix of order `n / p` (1 for powers of two). Applying costs `n log₂ p + n² / p` products.
//! Randomised Hadamard matrices spread outliers as QuaRot uses them (Ashkboos et al. 2024, arXiv:2404.00456,
//! section 3). f64.

use faer::Mat;

use crate::rng::Rng;

/// An orthogonal matrix.
#[derive(Debug, Clone)]
pub struct Orthogonal {
    signs: Vec<f64>,
    /// Order of the Hadamard factor.
    power: usize,
    /// Row-major `[n / power, n / power]`.
    dense: Vec<f64>,
}

impl Orthogonal {
    /// The largest power of two that divides `n` as a Hadamard factor.
    pub fn hadamard(n: usize, seed: u64) -> Self {
        Self::with(n, 1 << n.trailing_zeros(), seed)
    }

    /// A dense random matrix: the Q of a QR decomposition of Gaussian numbers.
    pub fn dense(n: usize, seed: u64) -> Self {
        Self::with(n, 1, seed)
    }

    /// The matrix itself, row-major `[n, n]`, whose rows are orthonormal.
    ///
    /// # Panics
    /// When `rows` is not square.
    pub fn given(n: usize, rows: Vec<f64>) -> Self {
        assert_eq!(rows.len(), n * n, "a square matrix");
        Self { signs: vec![1.0; n], power: 1, dense: rows }
    }

    fn with(n: usize, power: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let signs = (0..n).map(|_| if rng.next_u64() >> 63 == 0 { 1.0 } else { -1.0 }).collect();
        let rest = n / power;
        let dense = if rest == 1 {
            vec![1.0]
        } else {
            let gauss = Mat::<f64>::from_fn(rest, rest, |_, _| f64::from(rng.normal()));
            let q = gauss.qr().compute_Q();
            (0..rest * rest).map(|i| q[(i / rest, i % rest)]).collect()
        };
        Self { signs, power, dense }
    }

    /// Order.
    pub fn order(&self) -> usize {
        self.signs.len()
    }

    /// `x ← x Q` for a row `x [n]`; `buffer` is working space.
    ///
    /// # Panics
    /// When `x` has another length.
    pub fn apply(&self, x: &mut [f64], buffer: &mut Vec<f64>) {
        assert_eq!(x.len(), self.signs.len(), "a row of the matrix's order");
        for (x, sign) in x.iter_mut().zip(&self.signs) {
            *x *= sign;
        }
        let rest = self.signs.len() / self.power;
        if rest > 1 {
            buffer.resize(rest, 0.0);
            for x in x.chunks_mut(rest) {
                buffer.fill(0.0);
                for (x, row) in x.iter().zip(self.dense.chunks(rest)) {
                    for (out, o) in buffer.iter_mut().zip(row) {
                        *out += x * o;
                    }
                }
                x.copy_from_slice(buffer);
            }
        }
        let mut half = 1;
        while half < self.power {
            for block in x.chunks_mut(2 * half * rest) {
                let (low, high) = block.split_at_mut(half * rest);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = 1.0 / (self.power as f64).sqrt();
        for x in x {
            *x *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_orthonormal_and_depend_on_the_seed() {
        for q in [
            Orthogonal::hadamard(64, 1),
            Orthogonal::hadamard(48, 2),
            Orthogonal::hadamard(15, 3),
            Orthogonal::dense(20, 4),
        ] {
            let n = q.order();
            let rows: Vec<Vec<f64>> = (0..n)
                .map(|i| {
                    let mut x = vec![0.0; n];
                    x[i] = 1.0;
                    q.apply(&mut x, &mut Vec::new());
                    x
                })
                .collect();
            for i in 0..n {
                for j in 0..=i {
                    let dot: f64 = rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                    let wanted = f64::from(u8::from(i == j));
                    assert!((dot - wanted).abs() < 1e-12, "{n} {i} {j} {dot}");
                }
            }
        }
        let (mut a, mut b) = (vec![1.0; 8], vec![1.0; 8]);
        Orthogonal::hadamard(8, 5).apply(&mut a, &mut Vec::new());
        Orthogonal::hadamard(8, 6).apply(&mut b, &mut Vec::new());
        assert!(a.iter().zip(&b).any(|(a, b)| (a - b).abs() > 1e-3));
    }
}
