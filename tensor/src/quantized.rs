//! Layout-neutral result of every quantizer.

use crate::grid::GroupGrid;
use crate::{Mat, QuantScheme};

/// A quantized linear: `weight[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g]` with
/// `g = group_of(i)`. Codes are in the original column order.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedLinear {
    /// Bits, group, symmetry, scale grid.
    pub scheme: QuantScheme,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Unsigned codes `[out_features, in_features]`, row-major, each in `0..=max_code`.
    pub codes: Vec<u8>,
    /// `[out_features, groups]`, row-major, on the scheme's scale grid.
    pub scales: Vec<f32>,
    /// `[out_features, groups]`, row-major; the code that means zero. May be `max_code + 1` in foreign
    /// GPTQ v1 files, which store `zero - 1`.
    pub zeros: Vec<u16>,
    /// Group of each column, `[in_features]`; `None` means `column / group_size`.
    pub g_idx: Option<Vec<u32>>,
}

impl QuantizedLinear {
    /// Of codes `[out_features, in_features]` and grids `[out_features, groups]`.
    pub fn of_grids(
        scheme: QuantScheme,
        (out_features, in_features): (usize, usize),
        codes: Vec<u8>,
        grids: &[GroupGrid],
    ) -> Self {
        Self {
            scheme,
            out_features,
            in_features,
            codes,
            scales: grids.iter().map(|grid| grid.scale).collect(),
            zeros: grids.iter().map(|grid| grid.zero).collect(),
            g_idx: None,
        }
    }

    /// Number of groups per row.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features.max(1)
    }

    /// Group of a column.
    pub fn group_of(&self, column: usize) -> usize {
        match &self.g_idx {
            Some(g_idx) => g_idx[column] as usize,
            None => column / self.scheme.group_size(self.in_features),
        }
    }

    /// Writes row `row` of the dequantized weight into `out [in_features]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let groups = self.groups();
        let codes = &self.codes[row * self.in_features..(row + 1) * self.in_features];
        let scales = &self.scales[row * groups..(row + 1) * groups];
        let zeros = &self.zeros[row * groups..(row + 1) * groups];
        if let Some(g_idx) = &self.g_idx {
            for ((out, &code), &group) in out.iter_mut().zip(codes).zip(g_idx) {
                let group = group as usize;
                *out = (f32::from(code) - f32::from(zeros[group])) * scales[group];
            }
        } else {
            let size = self.scheme.group_size(self.in_features);
            for (group, (out, codes)) in out.chunks_mut(size).zip(codes.chunks(size)).enumerate() {
                let (zero, scale) = (f32::from(zeros[group]), scales[group]);
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = (f32::from(code) - zero) * scale;
                }
            }
        }
    }

    /// The dequantized weight `[out_features, in_features]`, f32.
    pub fn dequantize(&self) -> Mat {
        let mut weight = Mat::zeros((self.out_features, self.in_features));
        for (row, mut out) in weight.outer_iter_mut().enumerate() {
            self.dequantize_row(
                row,
                out.as_slice_mut().expect("rows of a fresh matrix are contiguous"),
            );
        }
        weight
    }
}
