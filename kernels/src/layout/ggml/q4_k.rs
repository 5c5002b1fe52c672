//! q4_k, 144 bytes for 256 weights, 8 sub-blocks of 32:
//! `weight = d · sub_scale · code − dmin · sub_min`.
//!
//! ```text
//! byte   0..2    d, f16
//! byte   2..4    dmin, f16
//! byte   4..16   sub_scale and sub_min, 6 bits each, see `bits::scales_k4`
//! byte  16..144  byte 16 + 32 c + l: bits 0-3 code[64 c + l], bits 4-7 code[64 c + 32 + l]
//! ```

use attar_tensor::BlockType;

use super::bits::{half, nibbles, put_half, put_nibbles, put_scales_k4, scales_k4};
use super::{Bits, Parts};

pub(super) struct Q4K;

impl Bits for Q4K {
    const BLOCK: BlockType = BlockType::Q4K;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        put_half(bytes, 2, block.dmin);
        put_scales_k4(&mut bytes[4..16], &block.sub_scales, &block.sub_mins);
        for (bytes, codes) in bytes[16..].chunks_exact_mut(32).zip(block.codes.chunks_exact(64)) {
            put_nibbles(bytes, codes);
        }
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        block.dmin = half(bytes, 2);
        scales_k4(&bytes[4..16], &mut block.sub_scales, &mut block.sub_mins);
        for (bytes, codes) in bytes[16..].chunks_exact(32).zip(block.codes.chunks_exact_mut(64)) {
            nibbles(bytes, codes);
        }
    }
}
