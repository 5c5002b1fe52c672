//! q8_0, 34 bytes for 32 weights: `weight = d · (code − 128)`.
//!
//! ```text
//! byte  0..2    d, f16
//! byte  2..34   byte 2 + i: code[i] − 128, i8
//! ```

use attar_tensor::BlockType;

use super::bits::{half, put_half};
use super::{Bits, Parts};

pub(super) struct Q80;

impl Bits for Q80 {
    const BLOCK: BlockType = BlockType::Q80;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        for (byte, code) in bytes[2..34].iter_mut().zip(&block.codes) {
            *byte = code ^ 128;
        }
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        for (code, byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
            *code = byte ^ 128;
        }
    }
}
