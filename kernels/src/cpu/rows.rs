//! The form in which the CPU kernels read a linear, whatever layout it came in.
//!
//! Columns are ordered by group, so that a group is contiguous, and each group is filled up to a
//! multiple of 32 columns with columns whose activation is zero. A block of 32 columns of a row is
//!
//! ```text
//! up to 4 bits   16 bytes: byte j = code[j] | code[16 + j] << 4
//! 8 bits         32 bytes: byte j = code[j]
//! ```
//!
//! Rows follow each other without gaps, so that one row is one sequential stream.

use attar_tensor::QuantizedLinear;
use rayon::prelude::*;

/// Columns of a block.
pub(crate) const BLOCK: usize = 32;

/// Codes, scales and zero points of a linear.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
    /// True when a block is 16 bytes.
    pub(crate) nibbles: bool,
    /// First block of each group, and the number of blocks behind the last.
    pub(crate) group_blocks: Vec<u32>,
    /// Column in each place, `u32::MAX` for filling; `None` when places are columns.
    pub(crate) order: Option<Vec<u32>>,
    /// `[out_features, blocks, block_bytes]`.
    pub(crate) codes: Vec<u8>,
    /// `[out_features, groups]`.
    pub(crate) scales: Vec<f32>,
    /// `[out_features, groups]`.
    pub(crate) zeros: Vec<f32>,
}

/// Activations in the order of [`Rows`].
pub(crate) struct Activations {
    /// `[m, places]`.
    pub(crate) x: Vec<f32>,
    /// Sum over each group, `[m, groups]`.
    pub(crate) sums: Vec<f32>,
}

impl Rows {
    /// Rearranges a quantized linear whose lengths and indices have been checked.
    pub(crate) fn new(weight: &QuantizedLinear) -> Self {
        let (rows, columns) = (weight.out_features, weight.in_features);
        let groups = weight.groups();
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); groups];
        for column in 0..columns {
            members[weight.group_of(column)].push(column as u32);
        }
        let mut order = Vec::with_capacity(columns);
        let mut group_blocks = vec![0u32];
        for member in &members {
            order.extend_from_slice(member);
            order.resize(order.len().next_multiple_of(BLOCK), u32::MAX);
            group_blocks.push((order.len() / BLOCK) as u32);
        }
        let identity = order.len() == columns && order.iter().zip(0u32..).all(|(&a, b)| a == b);

        let nibbles = weight.scheme.bits <= 4;
        let block_bytes = if nibbles { BLOCK / 2 } else { BLOCK };
        let row_bytes = order.len() / BLOCK * block_bytes;
        let mut codes = vec![0u8; rows * row_bytes];
        let from = weight.codes.par_chunks(columns.max(1));
        codes.par_chunks_mut(row_bytes.max(1)).zip(from).with_min_len(16).for_each_init(
            || vec![0u8; order.len()],
            |places, (to, from)| {
                if identity {
                    places.copy_from_slice(from);
                } else {
                    for (place, &column) in places.iter_mut().zip(&order) {
                        *place = from.get(column as usize).copied().unwrap_or(0);
                    }
                }
                if nibbles {
                    let blocks = places.as_chunks::<BLOCK>().0;
                    for (to, from) in to.as_chunks_mut::<{ BLOCK / 2 }>().0.iter_mut().zip(blocks) {
                        for (j, byte) in to.iter_mut().enumerate() {
                            *byte = from[j] | from[BLOCK / 2 + j] << 4;
                        }
                    }
                } else {
                    to.copy_from_slice(places);
                }
            },
        );
        Self {
            out_features: rows,
            in_features: columns,
            nibbles,
            group_blocks,
            order: if identity { None } else { Some(order) },
            codes,
            scales: weight.scales.clone(),
            zeros: weight.zeros.iter().map(|&zero| f32::from(zero)).collect(),
        }
    }

    pub(crate) fn groups(&self) -> usize {
        self.group_blocks.len() - 1
    }

    /// Columns with the filling.
    pub(crate) fn places(&self) -> usize {
        self.group_blocks[self.groups()] as usize * BLOCK
    }

    pub(crate) fn block_bytes(&self) -> usize {
        if self.nibbles { BLOCK / 2 } else { BLOCK }
    }

    pub(crate) fn row_codes(&self, row: usize) -> &[u8] {
        let bytes = self.places() / BLOCK * self.block_bytes();
        &self.codes[row * bytes..(row + 1) * bytes]
    }

    pub(crate) fn row_scales(&self, row: usize) -> &[f32] {
        &self.scales[row * self.groups()..(row + 1) * self.groups()]
    }

    pub(crate) fn row_zeros(&self, row: usize) -> &[f32] {
        &self.zeros[row * self.groups()..(row + 1) * self.groups()]
    }

    pub(crate) fn resident_bytes(&self) -> usize {
        self.codes.len()
            + 4 * (self.scales.len() + self.zeros.len() + self.group_blocks.len())
            + self.order.as_ref().map_or(0, |order| 4 * order.len())
    }

    /// Brings `x [m, in_features]` into the order of places.
    pub(crate) fn arrange(&self, x: &[f32], m: usize) -> Activations {
        let x = match &self.order {
            None => x.to_vec(),
            Some(order) => {
                let mut placed = Vec::with_capacity(m * order.len());
                for x in x.chunks_exact(self.in_features.max(1)) {
                    placed.extend(
                        order.iter().map(|&column| x.get(column as usize).copied().unwrap_or(0.0)),
                    );
                }
                placed
            }
        };
        let mut sums = Vec::with_capacity(m * self.groups());
        for x in x.chunks_exact(self.places().max(1)) {
            for pair in self.group_blocks.windows(2) {
                let group = &x[pair[0] as usize * BLOCK..pair[1] as usize * BLOCK];
                sums.push(sum(group));
            }
        }
        Activations { x, sums }
    }
}

/// Sum in eight lanes: as accurate as the products it is compared with, and vectorised.
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for chunk in values.chunks_exact(8) {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{quantized, scheme, shuffle_groups};

    #[test]
    fn groups_are_gathered_and_filled() {
        let mut weight = quantized(scheme(3, 48, false), 3, 96, 1);
        shuffle_groups(&mut weight, 2);
        let rows = Rows::new(&weight);
        assert_eq!(rows.group_blocks, [0, 2, 4]);
        assert_eq!(rows.places(), 128);
        let order = rows.order.as_ref().unwrap();
        let g_idx = weight.g_idx.as_ref().unwrap();
        for (place, &column) in order.iter().enumerate() {
            if column != u32::MAX {
                assert_eq!(g_idx[column as usize] as usize, place / 64);
            }
        }
        let x: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let arranged = rows.arrange(&x, 1);
        let mut seen = arranged.x.clone();
        seen.retain(|&value| value > 0.0);
        seen.sort_by(f32::total_cmp);
        assert_eq!(seen, x[1..], "every column once, the rest zero");
    }

    #[test]
    fn four_bit_codes_take_half_a_byte() {
        let weight = quantized(scheme(4, 32, true), 8, 64, 1);
        let rows = Rows::new(&weight);
        assert!(rows.order.is_none());
        assert_eq!(rows.codes.len(), 8 * 64 / 2);
    }
}
