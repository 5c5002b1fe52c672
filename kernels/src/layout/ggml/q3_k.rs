//! q3_k, 110 bytes for 256 weights, 16 sub-blocks of 16: `weight = d · sub_scale · (code − 4)`.
//!
//! ```text
//! byte   0..32   byte l: bit k is bit 2 of code[32 k + l]
//! byte  32..96   byte 32 + 32 h + l: bits 2k, 2k + 1 are the low bits of code[128 h + 32 k + l]
//! byte  96..104  byte 96 + s: bits 0-3 low bits of sub_scale[s] + 32, bits 4-7 of sub_scale[8 + s] + 32
//! byte 104..108  byte 104 + s: bits 2k, 2k + 1 are the high bits of sub_scale[4 k + s] + 32
//! byte 108..110  d, f16
//! ```

use attar_tensor::BlockType;

use super::bits::{half, pairs, put_half, put_pairs};
use super::{Bits, Parts};

pub(super) struct Q3K;

impl Bits for Q3K {
    const BLOCK: BlockType = BlockType::Q3K;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        for (l, byte) in bytes[..32].iter_mut().enumerate() {
            *byte = (0..8).fold(0, |byte, k| byte | (block.codes[32 * k + l] >> 2 & 1) << k);
        }
        put_pairs(&mut bytes[32..64], &block.codes[..128]);
        put_pairs(&mut bytes[64..96], &block.codes[128..]);
        let stored = |s: usize| (block.sub_scales[s] + 32) as u8;
        for s in 0..8 {
            bytes[96 + s] = stored(s) & 15 | stored(8 + s) << 4;
        }
        for s in 0..4 {
            bytes[104 + s] = (0..4).fold(0, |byte, k| byte | stored(4 * k + s) >> 4 << (2 * k));
        }
        put_half(bytes, 108, block.d);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        pairs(&bytes[32..64], &mut block.codes[..128]);
        pairs(&bytes[64..96], &mut block.codes[128..]);
        for (i, code) in block.codes.iter_mut().enumerate() {
            *code |= (bytes[i % 32] >> (i / 32) & 1) << 2;
        }
        for s in 0..16 {
            let low = if s < 8 { bytes[96 + s] & 15 } else { bytes[88 + s] >> 4 };
            let high = bytes[104 + s % 4] >> (2 * (s / 4)) & 3;
            block.sub_scales[s] = (low | high << 4) as i8 - 32;
        }
        block.d = half(bytes, 108);
    }
}
