//! `out = beta * out + alpha · a · b` in f32. Names say which operand is transposed: `nt` is `a · bᵀ`, the
//! linear layer. Products of at least `THIN` rows run on register tiles (`microkernel`), thinner ones,
//! where packing does not pay, row by row (`thin`). Both run on the instruction set in use
//! ([`super::isa()`]), and neither lets it change a bit; where AMX is in use ([`super::level()`]), register tiles
//! are its own (`tiles`) and their bits are others.
//!
//! The bits of an element depend on the shape of the whole product only, so that the `par_` variants,
//! which hand out fixed blocks of rows, agree with the others on any number of threads.

#![allow(clippy::needless_pass_by_value, reason = "views are small and meant to be handed over")]

use ndarray::{ArrayBase, ArrayView2, ArrayViewMut2, CowArray, Data, Ix2};
use rayon::prelude::*;

use super::{
    microkernel::{
        Operand, Panels, Product, multiply, pack_panels, pack_panels_into, panels_at_most,
    },
    thin,
};
use crate::Mat;

/// Fewest rows of `out` for which operands are packed.
const THIN: usize = 8;
/// Rows of `out` per task of a `par_` product.
const ROWS_PER_TASK: usize = 256;

fn span(rows: usize, columns: usize, stride: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + columns }
}

/// The product on this thread; `thin` is decided by the shape of the whole product.
fn run(thin: bool, product: Product<'_>) {
    if thin { thin::multiply(product) } else { multiply(product) }
}

/// A row-major operand: `(elements, distance between rows)`.
pub type Rows<'a> = (&'a [f32], usize);

fn along_depth((data, stride): Rows<'_>) -> Operand<'_> {
    Operand { data, stride, depth_contiguous: true }
}

fn across_depth((data, stride): Rows<'_>) -> Operand<'_> {
    Operand { data, stride, depth_contiguous: false }
}

/// `out [m, n] (+)= alpha · a [m, k] · (b [n, k])ᵀ`, all row-major with a row stride; added to `out`
/// when `add` is set.
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_nt(
    shape: (usize, usize, usize),
    alpha: f32,
    a: Rows<'_>,
    b: Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    let (a, b) = (along_depth(a), along_depth(b));
    run(shape.0 < THIN, Product { shape, alpha, a, b, add, out, ldo, panels: None, below: None });
}

/// The rows of `b [n, k]` packed once for many products `a · bᵀ`, in place of the rows themselves.
#[derive(Debug, Clone)]
pub struct PackedRows {
    n: usize,
    k: usize,
    data: Vec<f32>,
    start: usize,
    planes: usize,
}

impl PackedRows {
    /// Bytes of `b [n, k]` packed, at most.
    pub const fn bytes(n: usize, k: usize) -> usize {
        4 * panels_at_most(n, k)
    }

    /// Packs `b [n, k]`.
    pub fn new(b: Rows<'_>, n: usize, k: usize) -> Self {
        let (data, start, planes) = pack_panels(along_depth(b), n, k);
        Self { n, k, data, start, planes }
    }

    /// `out [m, n] = a [m, k] · bᵀ`.
    pub fn gemm_nt(&self, m: usize, a: Rows<'_>, (out, ldo): (&mut [f32], usize)) {
        let a = along_depth(a);
        multiply(Product {
            shape: (m, self.n, self.k),
            alpha: 1.0,
            a,
            b: a,
            add: false,
            out,
            ldo,
            panels: Some(Panels {
                data: &self.data[self.start..],
                roomy: false,
                planes: self.planes,
            }),
            below: None,
        });
    }
}

/// `out [m, n] (+)= alpha · a [m, k] · b [k, n]`; see [`gemm_nt`].
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_nn(
    shape: (usize, usize, usize),
    alpha: f32,
    a: Rows<'_>,
    b: Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    let (a, b) = (along_depth(a), across_depth(b));
    run(shape.0 < THIN, Product { shape, alpha, a, b, add, out, ldo, panels: None, below: None });
}

/// `out [m, n] (+)= alpha · (a [k, m])ᵀ · b [k, n]`; see [`gemm_nt`].
///
/// # Panics
/// When a slice is too short for its shape.
pub fn gemm_tn(
    shape: (usize, usize, usize),
    alpha: f32,
    a: Rows<'_>,
    b: Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    let (a, b) = (across_depth(a), across_depth(b));
    run(shape.0 < THIN, Product { shape, alpha, a, b, add, out, ldo, panels: None, below: None });
}

/// [`gemm_nt`] with blocks of rows of `out` spread over rayon's current pool; the same bits.
///
/// # Panics
/// When a slice is too short for its shape.
pub fn par_gemm_nt(
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    (a, lda): Rows<'_>,
    b: Rows<'_>,
    add: bool,
    (out, ldo): (&mut [f32], usize),
) {
    let b = along_depth(b);
    let end = span(m, n, ldo);
    out[..end].par_chunks_mut((ROWS_PER_TASK * ldo).max(1)).enumerate().for_each(|(task, out)| {
        let first = task * ROWS_PER_TASK;
        let shape = (ROWS_PER_TASK.min(m - first), n, k);
        let a = along_depth((&a[first * lda..], lda));
        run(m < THIN, Product { shape, alpha, a, b, add, out, ldo, panels: None, below: None });
    });
}

/// Memory in which one operand of a large product is packed, used again from product to product. Products
/// spread over rayon's current pool, the operand being packed once for all threads; an element's bits are those
/// of the products without `Packing`, except that thin ones run on register tiles too.
#[derive(Debug, Default)]
pub struct Packing(Vec<f32>);

impl Packing {
    /// Bytes held at most for an operand `[n, k]`, whose rows are padded to whole vectors.
    pub const fn bytes(n: usize, k: usize) -> usize {
        4 * panels_at_most(n, k)
    }

    /// As [`gemm_nt`].
    ///
    /// # Panics
    /// When a slice is too short for its shape.
    pub fn nt(
        &mut self,
        shape: (usize, usize, usize),
        (a, lda): Rows<'_>,
        b: Rows<'_>,
        add: bool,
        out: (&mut [f32], usize),
    ) {
        self.run(shape, |first| along_depth((&a[first * lda..], lda)), along_depth(b), add, out);
    }

    /// As [`gemm_nn`].
    ///
    /// # Panics
    /// When a slice is too short for its shape.
    pub fn nn(
        &mut self,
        shape: (usize, usize, usize),
        (a, lda): Rows<'_>,
        b: Rows<'_>,
        add: bool,
        out: (&mut [f32], usize),
    ) {
        self.run(shape, |first| along_depth((&a[first * lda..], lda)), across_depth(b), add, out);
    }

    /// As [`gemm_tn`].
    ///
    /// # Panics
    /// When a slice is too short for its shape.
    pub fn tn(
        &mut self,
        shape: (usize, usize, usize),
        (a, lda): Rows<'_>,
        b: Rows<'_>,
        add: bool,
        out: (&mut [f32], usize),
    ) {
        self.run(shape, |first| across_depth((&a[first..], lda)), across_depth(b), add, out);
    }

    fn run<'a>(
        &mut self,
        (m, n, k): (usize, usize, usize),
        rows_from: impl Fn(usize) -> Operand<'a> + Sync,
        b: Operand<'_>,
        add: bool,
        (out, ldo): (&mut [f32], usize),
    ) {
        if m == 0 || n == 0 {
            return;
        }
        let (start, planes) = pack_panels_into(&mut self.0, b, n, k);
        let panels = Panels { data: &self.0[start..], roomy: false, planes };
        let end = span(m, n, ldo);
        // By `m` alone: enough tasks for many threads, whole register tiles.
        let rows = (m / 8).next_multiple_of(32).clamp(32, ROWS_PER_TASK);
        out[..end].par_chunks_mut(rows * ldo).enumerate().for_each(|(task, out)| {
            let first = task * rows;
            let a = rows_from(first);
            multiply(Product {
                shape: (rows.min(m - first), n, k),
                alpha: 1.0,
                a,
                b: a,
                add,
                out,
                ldo,
                panels: Some(panels),
                below: None,
            });
        });
    }
}

/// A matrix whose rows or columns are contiguous, copied if neither are.
struct Lines<'a> {
    data: CowArray<'a, f32, Ix2>,
    transposed: bool,
}

impl<'a> Lines<'a> {
    fn new(x: ArrayView2<'a, f32>) -> Self {
        if x.as_slice().is_some() {
            Self { data: x.into(), transposed: false }
        } else if x.t().as_slice().is_some() {
            Self { data: x.reversed_axes().into(), transposed: true }
        } else {
            Self { data: x.as_standard_layout().into_owned().into(), transposed: false }
        }
    }

    /// The operand whose summed index runs along the axis of columns (or of rows, with `flip`).
    fn operand(&self, flip: bool) -> Operand<'_> {
        Operand {
            data: self.data.as_slice().expect("lines are contiguous"),
            stride: self.data.ncols(),
            depth_contiguous: self.transposed == flip,
        }
    }
}

fn into(
    (a, flip_a): (ArrayView2<'_, f32>, bool),
    (b, flip_b): (ArrayView2<'_, f32>, bool),
    mut out: ArrayViewMut2<'_, f32>,
    alpha: f32,
    beta: f32,
) {
    let axis =
        |x: &ArrayView2<'_, f32>, flip: bool| if flip { (x.ncols(), x.nrows()) } else { x.dim() };
    let ((m, k), (n, k2)) = (axis(&a, flip_a), axis(&b, flip_b));
    assert_eq!(k, k2, "inner dimensions agree");
    assert_eq!(out.dim(), (m, n), "output has the product's shape");
    let (a, b) = (Lines::new(a), Lines::new(b));
    let (a, b) = (a.operand(flip_a), b.operand(flip_b));
    let add = beta != 0.0;
    if add && (beta - 1.0).abs() > 0.0 {
        out.mapv_inplace(|v| v * beta);
    }
    let shape = (m, n, k);
    if let Some(to) = out.as_slice_mut() {
        run(
            m < THIN,
            Product { shape, alpha, a, b, add, out: to, ldo: n, panels: None, below: None },
        );
    } else {
        let mut product = Mat::zeros((m, n));
        let to = product.as_slice_mut().expect("fresh matrices are contiguous");
        run(
            m < THIN,
            Product { shape, alpha, a, b, add: false, out: to, ldo: n, panels: None, below: None },
        );
        if add { out += &product } else { out.assign(&product) }
    }
}

/// `out = beta · out + alpha · x [m, k] · (w [n, k])ᵀ` for matrices and views of any strides; views
/// whose rows or columns are contiguous as a whole are not copied. `out` is not read when `beta` is 0.
///
/// # Panics
/// When the shapes disagree.
pub fn matmul_nt_into(
    x: ArrayView2<'_, f32>,
    w: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
    alpha: f32,
    beta: f32,
) {
    into((x, false), (w, false), out, alpha, beta);
}

/// `out = beta · out + alpha · a [m, k] · b [k, n]`; see [`matmul_nt_into`].
///
/// # Panics
/// When the shapes disagree.
pub fn matmul_nn_into(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
    alpha: f32,
    beta: f32,
) {
    into((a, false), (b, true), out, alpha, beta);
}

/// `out = beta · out + alpha · (a [k, m])ᵀ · b [k, n]`; see [`matmul_nt_into`].
///
/// # Panics
/// When the shapes disagree.
pub fn matmul_tn_into(
    a: ArrayView2<'_, f32>,
    b: ArrayView2<'_, f32>,
    out: ArrayViewMut2<'_, f32>,
    alpha: f32,
    beta: f32,
) {
    into((a, true), (b, true), out, alpha, beta);
}

/// `x [m, k] · (w [n, k])ᵀ`.
///
/// # Panics
/// When the inner dimensions differ.
pub fn matmul_nt<A, B>(x: &ArrayBase<A, Ix2>, w: &ArrayBase<B, Ix2>) -> Mat
where
    A: Data<Elem = f32>,
    B: Data<Elem = f32>,
{
    let mut out = Mat::zeros((x.nrows(), w.nrows()));
    matmul_nt_into(x.view(), w.view(), out.view_mut(), 1.0, 0.0);
    out
}

/// `a [m, k] · b [k, n]`.
///
/// # Panics
/// When the inner dimensions differ.
pub fn matmul_nn<A, B>(a: &ArrayBase<A, Ix2>, b: &ArrayBase<B, Ix2>) -> Mat
where
    A: Data<Elem = f32>,
    B: Data<Elem = f32>,
{
    let mut out = Mat::zeros((a.nrows(), b.ncols()));
    matmul_nn_into(a.view(), b.view(), out.view_mut(), 1.0, 0.0);
    out
}

/// `(a [k, m])ᵀ · b [k, n]`.
///
/// # Panics
/// When the inner dimensions differ.
pub fn matmul_tn<A, B>(a: &ArrayBase<A, Ix2>, b: &ArrayBase<B, Ix2>) -> Mat
where
    A: Data<Elem = f32>,
    B: Data<Elem = f32>,
{
    let mut out = Mat::zeros((a.ncols(), b.ncols()));
    matmul_tn_into(a.view(), b.view(), out.view_mut(), 1.0, 0.0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{compare::distance, rng::Rng};

    #[test]
    fn products_agree_with_f64_for_odd_shapes_and_strides() {
        let mut rng = Rng::new(3);
        for (m, n, k) in [
            (1, 1, 1),
            (3, 5, 7),
            (5, 10, 70),
            (8, 48, 8),
            (17, 33, 65),
            (64, 100, 48),
            (9, 130, 1030),
            (600, 33, 20),
        ] {
            let (lda, ldb, ldo) = (k + 3, k + 1, n + 2);
            let (a, b) = (rng.normals(m * lda), rng.normals(n * ldb));
            let mut want = vec![0.0f32; m * n];
            for i in 0..m {
                for j in 0..n {
                    want[i * n + j] = (0..k)
                        .map(|l| f64::from(a[i * lda + l]) * f64::from(b[j * ldb + l]))
                        .sum::<f64>() as f32;
                }
            }
            let mut out = vec![1.0; m * ldo];
            gemm_nt((m, n, k), 1.0, (&a, lda), (&b, ldb), true, (&mut out, ldo));
            let got: Vec<f32> =
                (0..m).flat_map(|i| out[i * ldo..i * ldo + n].iter().map(|v| v - 1.0)).collect();
            assert!(distance(&got, &want).nmse < 1e-10, "{m} {n} {k}");
            if m > 1 {
                assert!((out[n] - 1.0).abs() < f32::EPSILON, "padding is left alone");
            }
            let mut packed = vec![1.0; m * ldo];
            PackedRows::new((&b, ldb), n, k).gemm_nt(m, (&a, lda), (&mut packed, ldo));
            let got: Vec<f32> =
                (0..m).flat_map(|i| packed[i * ldo..i * ldo + n].to_vec()).collect();
            assert!(distance(&got, &want).nmse < 1e-10, "packed {m} {n} {k}");
            let bt = Mat::from_shape_fn((k, n), |(l, j)| b[j * ldb + l]);
            let am = Mat::from_shape_fn((m, k), |(i, l)| a[i * lda + l]);
            assert!(distance(matmul_nn(&am, &bt).as_slice().unwrap(), &want).nmse < 1e-10);
            let at = Mat::from_shape_fn((k, m), |(l, i)| a[i * lda + l]);
            let mut tn = vec![0.0; m * n];
            let (at, bt) = (at.as_slice().unwrap(), bt.as_slice().unwrap());
            gemm_tn((m, n, k), 1.0, (at, m), (bt, n), false, (&mut tn, n));
            assert!(distance(&tn, &want).nmse < 1e-10);
            let mut packing = Packing::default();
            for threads in [1, 2] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut all = [vec![0.0; m * n], vec![0.0; m * n], vec![0.0; m * n]];
                pool.install(|| {
                    let [nt, nn, t] = &mut all;
                    packing.nt((m, n, k), (&a, lda), (&b, ldb), false, (nt, n));
                    packing.nn((m, n, k), (&a, lda), (bt, n), false, (nn, n));
                    packing.tn((m, n, k), (at, m), (bt, n), false, (t, n));
                });
                for got in &all {
                    assert!(distance(got, &want).nmse < 1e-10, "packing {m} {n} {k}");
                    assert_eq!(got, &all[0], "the operands' order in memory is no matter");
                }
                if m >= THIN {
                    assert_eq!(tn, all[0], "as without packing");
                }
            }
        }
    }

    #[test]
    fn views_of_any_strides_multiply_alike() {
        let mut rng = Rng::new(4);
        let mut random = |m: usize, n: usize| {
            Mat::from_shape_vec((m, n), rng.normals(m * n)).expect("the shape fits")
        };
        let (x, w) = (random(20, 60), random(30, 60));
        let head = ndarray::s![.., 16..48];
        let want = matmul_nt(&x.slice(head).to_owned(), &w.slice(head).to_owned());
        assert_eq!(matmul_nt(&x.slice(head), &w.slice(head)), want);
        let (xt, wt) = (x.slice(head).reversed_axes(), w.slice(head).reversed_axes());
        assert_eq!(matmul_nn(&x.slice(head), &wt), want);
        assert_eq!(matmul_tn(&xt.as_standard_layout(), &wt.as_standard_layout()), want);
        let mut out = Mat::ones((60, 20));
        let to = out.slice_mut(ndarray::s![0..30, ..]).reversed_axes();
        matmul_nt_into(x.slice(head), w.slice(head), to, 2.0, 0.5);
        for i in 0..20 {
            for j in 0..30 {
                assert!((out[[j, i]] - (2.0 * want[[i, j]] + 0.5)).abs() < 1e-5);
            }
        }
        assert!((out[[30, 0]] - 1.0).abs() < f32::EPSILON);
    }

    #[test]
    fn threads_do_not_change_bits() {
        let (m, n, k) = (515, 50, 40);
        let mut rng = Rng::new(9);
        let (a, b) = (rng.normals(m * k), rng.normals(n * k));
        let mut want = vec![0.0; m * n];
        gemm_nt((m, n, k), 1.0, (&a, k), (&b, k), false, (&mut want, n));
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; m * n];
            pool.install(|| par_gemm_nt((m, n, k), 1.0, (&a, k), (&b, k), false, (&mut out, n)));
            assert_eq!(out, want);
        }
    }
}
