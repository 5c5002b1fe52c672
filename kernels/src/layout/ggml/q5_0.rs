//! q5_0, 22 bytes for 32 weights: `weight = d · (code − 16)`.
//!
//! ```text
//! byte  0..2    d, f16
//! byte  2..6    bit i of the word: bit 4 of code[i]
//! byte  6..22   byte 6 + j: bits 0-3 low bits of code[j], bits 4-7 low bits of code[16 + j]
//! ```

use attar_tensor::BlockType;

use super::bits::{fifth, half, nibbles, put_fifth, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Q50;

impl Bits for Q50 {
    const BLOCK: BlockType = BlockType::Q50;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        put_fifth(&mut bytes[2..6], &block.codes[..32]);
        put_nibbles(&mut bytes[6..22], &block.codes[..32]);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        nibbles(&bytes[6..22], &mut block.codes[..32]);
        fifth(&bytes[2..6], &mut block.codes[..32]);
    }
}
