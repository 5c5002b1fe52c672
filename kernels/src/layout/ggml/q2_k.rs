//! q2_k, 84 bytes for 256 weights, 16 sub-blocks of 16:
//! `weight = d · sub_scale · code − dmin · sub_min`.
//!
//! ```text
//! byte  0..16   byte s: bits 0-3 sub_scale[s], bits 4-7 sub_min[s]
//! byte 16..80   byte 16 + 32 h + l: bits 2k, 2k + 1 are code[128 h + 32 k + l]
//! byte 80..82   d, f16
//! byte 82..84   dmin, f16
//! ```

use attar_tensor::BlockType;

use super::bits::{half, pairs, put_half, put_pairs};
use super::{Bits, Parts};

pub(super) struct Q2K;

impl Bits for Q2K {
    const BLOCK: BlockType = BlockType::Q2K;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        for s in 0..16 {
            bytes[s] = block.sub_scales[s] as u8 | block.sub_mins[s] << 4;
        }
        put_pairs(&mut bytes[16..48], &block.codes[..128]);
        put_pairs(&mut bytes[48..80], &block.codes[128..]);
        put_half(bytes, 80, block.d);
        put_half(bytes, 82, block.dmin);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        for s in 0..16 {
            block.sub_scales[s] = (bytes[s] & 15) as i8;
            block.sub_mins[s] = bytes[s] >> 4;
        }
        pairs(&bytes[16..48], &mut block.codes[..128]);
        pairs(&bytes[48..80], &mut block.codes[128..]);
        block.d = half(bytes, 80);
        block.dmin = half(bytes, 82);
    }
}
