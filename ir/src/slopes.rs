//! Slopes of the loss: how much the loss of some text changes when everything that belongs to one index of a
//! dimension (a channel's rows and columns, a head's) is scaled. With `w` the coupled weights of an index and `g` the
//! gradient on them, the slope of a window is `Σ w g`; removal costs `-Σ w g` to first order.

use std::collections::BTreeMap;

use attar_tensor::linalg::Packing;

use crate::{Block, Dim, DimName, Member, ModelGraph};

/// What becomes of the products `w g` of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlopeBy {
    /// Root of the mean over windows of `(Σ w g)²`, g being a window's own gradient (Molchanov et al. 2019,
    /// arXiv:1906.10771, on groups).
    Groups,
    /// `Σ |w g|`, g being the mean gradient of all windows (LLM-Pruner's first-order element-wise importance, Ma et al. 2023,
    /// arXiv:2305.11627).
    Elements,
}

/// Which slopes a pass on the whole model asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlopeQuery {
    /// Dimensions of the coupling table.
    pub dims: Vec<DimName>,
    /// How products become a number.
    pub by: SlopeBy,
}

/// A number for each index, by dimension.
pub type Slopes = BTreeMap<DimName, Vec<f64>>;

impl SlopeQuery {
    /// Rows of logits that exist at once.
    pub const LOGIT_ROWS: usize = 128;

    /// Streams of activations that exist at once: what enters each block, and what leaves the last or the gradient on it.
    pub const fn streams(graph: &ModelGraph) -> usize {
        graph.blocks.len() + 1
    }

    /// FLOPs on `tokens` tokens in windows of `context`: two forwards and a backward of every block, one of each of the
    /// head.
    pub fn flops(graph: &ModelGraph, tokens: usize, context: usize) -> f64 {
        let blocks = graph.blocks.iter().map(|block| block.forward_flops(tokens, context));
        4.0 * blocks.sum::<f64>() + 3.0 * graph.epilogue.forward_flops(tokens, context)
    }
}

/// Bytes that a forward of `tokens` tokens of a decoder block leaves for its backward: queries, keys, values, what
/// attention puts out, the stream between attention and MLP, gate and up.
pub fn tape_bytes(block: &Block, tokens: usize) -> usize {
    let out = |site: usize| block.sites[site].out_features;
    4 * tokens * (2 * out(0) + out(1) + out(2) + out(3) + out(4) + out(5))
}

/// Bytes that forward and backward of `tokens` tokens of a decoder block work in.
pub fn space_bytes(block: &Block, tokens: usize) -> usize {
    let out = |site: usize| block.sites[site].out_features;
    let (hidden, wide) = (out(3), out(4));
    let packed = |n: usize, k: usize| Packing::bytes(n, k);
    // The operand packed is a weight, or the inputs of a linear.
    let packing = packed(wide, hidden.max(tokens)).max(packed(hidden, wide));
    packing + 4 * tokens * (2 * hidden + wide + 2 * out(0) + 2 * out(1) + out(2))
}

impl Dim {
    /// Adds the products of `values` and `gradient`, a vector or rows of `columns` numbers of the tensor of `member`, to
    /// the sums of the indices; `absolute` adds their absolute values. Sums are f64.
    ///
    /// # Panics
    /// When shapes disagree.
    pub fn add_products(
        &self,
        member: &Member,
        columns: usize,
        (values, gradient): (&[f32], &[f32]),
        absolute: bool,
        sums: &mut [f64],
    ) {
        assert_eq!(values.len(), gradient.len(), "one gradient for each value");
        let sign = |product: f64| if absolute { product.abs() } else { product };
        let products = |row: usize| {
            let of = row * columns..(row + 1) * columns;
            let pairs = values[of.clone()].iter().zip(&gradient[of]);
            pairs.map(move |(&w, &g)| sign(f64::from(w) * f64::from(g)))
        };
        let rows = values.len() / columns.max(1);
        if member.axis == 0 {
            for row in 0..rows {
                sums[member.index(row, self.size)] += products(row).sum::<f64>();
            }
            return;
        }
        let mut of_columns = vec![0.0f64; columns];
        for row in 0..rows {
            of_columns.iter_mut().zip(products(row)).for_each(|(sum, product)| *sum += product);
        }
        for (column, sum) in of_columns.into_iter().enumerate() {
            sums[member.index(column, self.size)] += sum;
        }
    }
}
