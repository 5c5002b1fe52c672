//! q4_1, 20 bytes for 32 weights: `weight = d · code + dmin`.
//!
//! ```text
//! byte  0..2    d, f16
//! byte  2..4    dmin, f16
//! byte  4..20   byte 4 + j: bits 0-3 code[j], bits 4-7 code[16 + j]
//! ```

use attar_tensor::BlockType;

use super::bits::{half, nibbles, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Q41;

impl Bits for Q41 {
    const BLOCK: BlockType = BlockType::Q41;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        put_half(bytes, 2, block.dmin);
        put_nibbles(&mut bytes[4..20], &block.codes[..32]);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        block.dmin = half(bytes, 2);
        nibbles(&bytes[4..20], &mut block.codes[..32]);
    }
}
