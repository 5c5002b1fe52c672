//! q4_0, 18 bytes for 32 weights: `weight = d · (code − 8)`.
//!
//! ```text
//! byte  0..2    d, f16
//! byte  2..18   byte 2 + j: bits 0-3 code[j], bits 4-7 code[16 + j]
//! ```

use attar_tensor::BlockType;

use super::bits::{half, nibbles, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Q40;

impl Bits for Q40 {
    const BLOCK: BlockType = BlockType::Q40;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        put_nibbles(&mut bytes[2..18], &block.codes[..32]);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        nibbles(&bytes[2..18], &mut block.codes[..32]);
    }
}
