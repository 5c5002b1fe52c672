//! q6_k, 210 bytes for 256 weights, 16 sub-blocks of 16: `weight = d · sub_scale · (code − 32)`.
//!
//! ```text
//! byte   0..128  byte 64 h + l, l < 64: bits 0-3 low bits of code[128 h + l], bits 4-7 of code[128 h + 64 + l]
//! byte 128..192  byte 128 + 32 h + l: bits 2k, 2k + 1 are the high bits of code[128 h + 32 k + l]
//! byte 192..208  byte 192 + s: sub_scale[s], i8
//! byte 208..210  d, f16
//! ```

use attar_tensor::BlockType;

use super::bits::{half, nibbles, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Q6K;

impl Bits for Q6K {
    const BLOCK: BlockType = BlockType::Q6K;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        for (h, codes) in block.codes.chunks_exact(128).enumerate() {
            put_nibbles(&mut bytes[64 * h..64 * (h + 1)], codes);
            for l in 0..32 {
                bytes[128 + 32 * h + l] =
                    (0..4).fold(0, |byte, k| byte | codes[32 * k + l] >> 4 << (2 * k));
            }
        }
        for s in 0..16 {
            bytes[192 + s] = block.sub_scales[s] as u8;
        }
        put_half(bytes, 208, block.d);
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        for (h, codes) in block.codes.chunks_exact_mut(128).enumerate() {
            nibbles(&bytes[64 * h..64 * (h + 1)], codes);
            for (i, code) in codes.iter_mut().enumerate() {
                *code |= (bytes[128 + 32 * h + i % 32] >> (2 * (i / 32)) & 3) << 4;
            }
        }
        for s in 0..16 {
            block.sub_scales[s] = bytes[192 + s] as i8;
        }
        block.d = half(bytes, 208);
    }
}
