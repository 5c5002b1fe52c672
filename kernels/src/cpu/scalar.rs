//! The plain kernel: what every other one is measured against for readability.

use super::rows::{Activations, BLOCK, Rows};

/// `W[row] · x[token]`.
pub(crate) fn dot(rows: &Rows, row: usize, input: &Activations, token: usize) -> f32 {
    let places = rows.places();
    let x = &input.x[token * places..(token + 1) * places];
    let codes = rows.row_codes(row);
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    let bytes = rows.block_bytes();
    let mut total = 0.0f32;
    for group in 0..rows.groups() {
        let (first, end) =
            (rows.group_blocks[group] as usize, rows.group_blocks[group + 1] as usize);
        let zero = zeros[group];
        let mut sum = 0.0f32;
        for block in first..end {
            let codes = &codes[block * bytes..(block + 1) * bytes];
            let x = &x[block * BLOCK..(block + 1) * BLOCK];
            sum += dot_block(codes, x, rows.nibbles, zero);
        }
        total += sum * scales[group];
    }
    total
}

fn dot_block(codes: &[u8], x: &[f32], nibbles: bool, zero: f32) -> f32 {
    if nibbles {
        let (low, high) = x.split_at(BLOCK / 2);
        codes
            .iter()
            .zip(low.iter().zip(high))
            .map(|(&byte, (&low, &high))| {
                (f32::from(byte & 15) - zero) * low + (f32::from(byte >> 4) - zero) * high
            })
            .sum()
    } else {
        codes.iter().zip(x).map(|(&code, &x)| (f32::from(code) - zero) * x).sum()
    }
}

/// Writes the weights of one row, in the order of places.
pub(crate) fn dequantize(rows: &Rows, row: usize, out: &mut [f32]) {
    let codes = rows.row_codes(row);
    let (scales, zeros) = (rows.row_scales(row), rows.row_zeros(row));
    let bytes = rows.block_bytes();
    for group in 0..rows.groups() {
        let (scale, zero) = (scales[group], zeros[group]);
        for block in rows.group_blocks[group] as usize..rows.group_blocks[group + 1] as usize {
            let codes = &codes[block * bytes..(block + 1) * bytes];
            let out = &mut out[block * BLOCK..(block + 1) * BLOCK];
            if rows.nibbles {
                let (low, high) = out.split_at_mut(BLOCK / 2);
                for ((&byte, low), high) in codes.iter().zip(low).zip(high) {
                    *low = (f32::from(byte & 15) - zero) * scale;
                    *high = (f32::from(byte >> 4) - zero) * scale;
                }
            } else {
                for (&code, out) in codes.iter().zip(out) {
                    *out = (f32::from(code) - zero) * scale;
                }
            }
        }
    }
}
