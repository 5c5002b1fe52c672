//! What calibration can provide to a pass.

use attar_tensor::Mat;

bitflags::bitflags! {
    /// Statistics of a site's input that a pass asks for.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Needs: u16 {
        /// Largest absolute value per channel.
        const ABS_MAX = 1;
        /// Mean absolute value per channel.
        const ABS_MEAN = 1 << 1;
        /// Sum of squares per channel.
        const SQUARE_SUM = 1 << 2;
        /// `H = 2/n XᵀX`.
        const HESSIAN = 1 << 3;
        /// No statistic, but the block as a function: its inputs, and what the original block put out
        /// ([`crate::BlockFunction`]).
        const TEACHER = 1 << 4;
        /// No statistic of an input, but what the next-token loss says of the block's weights ([`BlockGradients`]); of
        /// the original model, taken from the last block to the first before any is worked on.
        const GRADIENTS = 1 << 5;
    }
}

/// Statistics of the activations of one [`crate::InputGroup`]. A field is present when it was asked for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct InputStats {
    /// Tokens seen.
    pub tokens: usize,
    /// `[width]`, largest absolute value.
    pub abs_max: Option<Vec<f32>>,
    /// `[width]`, mean absolute value.
    pub abs_mean: Option<Vec<f32>>,
    /// `[width]`, sum of squares over tokens.
    pub square_sum: Option<Vec<f64>>,
    /// `[width, width]`, symmetric, `2/n XᵀX` (accumulated in f64, stored as f32).
    pub hessian: Option<Mat>,
}

impl InputStats {
    /// Follows a fold analytically: the activations were divided by `scale [width]` per channel, so
    /// `H → D⁻¹ H D⁻¹` and the channel statistics are divided likewise.
    pub fn fold(&mut self, scale: &[f32]) {
        for (values, power) in [(&mut self.abs_max, 1), (&mut self.abs_mean, 1)] {
            for (value, s) in values.iter_mut().flatten().zip(scale) {
                *value /= s.powi(power);
            }
        }
        for (value, s) in self.square_sum.iter_mut().flatten().zip(scale) {
            *value /= f64::from(*s) * f64::from(*s);
        }
        if let Some(hessian) = &mut self.hessian {
            for (mut row, si) in hessian.outer_iter_mut().zip(scale) {
                for (value, sj) in row.iter_mut().zip(scale) {
                    *value /= si * sj;
                }
            }
        }
    }
}

/// Statistics that come from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// What the file knows of every linear of the blocks. Steps that need no more read it instead of calibrating.
    pub needs: Needs,
    /// Whether it knows the input of the output head too.
    pub head: bool,
}

/// What the next-token loss says of the weights of one linear, over all calibration windows; of a window it is the mean
/// negative log-likelihood of its tokens, nats.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteGradient {
    /// `[out_features, in_features]`: sum over windows of the gradient.
    pub sum: Mat,
    /// `[out_features, in_features]`: sum over windows of its squares, the diagonal of the empirical Fisher matrix.
    pub squares: Mat,
}

/// Gradients of a decoder block. As large as two blocks of weights: what is to be kept of them is made while they are there.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockGradients {
    /// Windows that were added.
    pub windows: usize,
    /// By site.
    pub sites: Vec<SiteGradient>,
}

/// Statistics of a block: `inputs[i]` belongs to `block.inputs[i]`, `None` where nothing was asked for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BlockStats {
    /// One entry per input group.
    pub inputs: Vec<Option<InputStats>>,
    /// What the loss says of its weights, where [`Needs::GRADIENTS`] was asked for.
    pub gradients: Option<BlockGradients>,
}

impl BlockStats {
    /// No statistics for `inputs` input groups.
    pub fn empty(inputs: usize) -> Self {
        Self { inputs: vec![None; inputs], gradients: None }
    }

    /// Statistics of one input group, when collected.
    pub fn input(&self, index: usize) -> Option<&InputStats> {
        self.inputs.get(index).and_then(Option::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folding_equals_recomputing() {
        let x = Mat::from_shape_fn((7, 3), |(t, c)| ((t * 3 + c) as f32 * 0.7).sin());
        let s = [2.0f32, 0.5, 3.0];
        let gram = |x: &Mat| x.t().dot(x) * (2.0 / 7.0);
        let mut stats = InputStats { tokens: 7, hessian: Some(gram(&x)), ..Default::default() };
        stats.fold(&s);
        let scaled = Mat::from_shape_fn((7, 3), |(t, c)| x[[t, c]] / s[c]);
        let again = gram(&scaled);
        for (a, b) in stats.hessian.unwrap().iter().zip(&again) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
