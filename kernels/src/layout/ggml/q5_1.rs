//! q5_1, 24 bytes for 32 weights: `weight = d · code + dmin`.
//!
//! ```text
//! byte  0..2    d, f16
//! byte  2..4    dmin, f16
//! byte  4..8    bit i of the word: bit 4 of code[i]
//! byte  8..24   byte 8 + j: bits 0-3 low bits of code[j], bits 4-7 low bits of code[16 + j]
//! ```

use attar_tensor::BlockType;

use super::bits::{fifth, half, nibbles, put_fifth, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Q51;

impl Bits for Q51 {
    const BLOCK: BlockType = BlockType::Q51;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        put_half(bytes, 2, block.dmin);
        put_fifth(&mut bytes[4..8], &block.codes[..32]);
        put_nibbles(&mut bytes[8..24], &block.codes[..32]);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        block.dmin = half(bytes, 2);
        nibbles(&bytes[8..24], &mut block.codes[..32]);
        fifth(&bytes[4..8], &mut block.codes[..32]);
    }
}
