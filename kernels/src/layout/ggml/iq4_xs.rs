//! iq4_xs, 136 bytes for 256 weights, 8 sub-blocks of 32: `weight = d · sub_scale · table[code]`, the table
//! is [`attar_tensor::blocks::IQ4_VALUES`].
//!
//! ```text
//! byte   0..2    d, f16
//! byte   2..4    bits 2s, 2s + 1 of the word: high bits of sub_scale[s] + 32
//! byte   4..8    byte 4 + j: bits 0-3 low bits of sub_scale[2 j] + 32, bits 4-7 of sub_scale[2 j + 1] + 32
//! byte   8..136  byte 8 + 16 s + j: bits 0-3 code[32 s + j], bits 4-7 code[32 s + 16 + j]
//! ```

use attar_tensor::BlockType;

use super::bits::{half, nibbles, put_half, put_nibbles};
use super::{Bits, Parts};

pub(super) struct Iq4Xs;

impl Bits for Iq4Xs {
    const BLOCK: BlockType = BlockType::Iq4Xs;

    fn pack(block: &Parts, bytes: &mut [u8]) {
        put_half(bytes, 0, block.d);
        let stored = |s: usize| (block.sub_scales[s] + 32) as u8;
        let high = (0..8).fold(0u16, |word, s| word | u16::from(stored(s) >> 4) << (2 * s));
        bytes[2..4].copy_from_slice(&high.to_le_bytes());
        for j in 0..4 {
            bytes[4 + j] = stored(2 * j) & 15 | stored(2 * j + 1) << 4;
        }
        for (bytes, codes) in bytes[8..].chunks_exact_mut(16).zip(block.codes.chunks_exact(32)) {
            put_nibbles(bytes, codes);
        }
    }

    fn unpack(bytes: &[u8], block: &mut Parts) {
        block.d = half(bytes, 0);
        let high = u16::from_le_bytes([bytes[2], bytes[3]]);
        for s in 0..8 {
            let low = bytes[4 + s / 2] >> (4 * (s % 2)) & 15;
            let high = (high >> (2 * s) & 3) as u8;
            block.sub_scales[s] = (low | high << 4) as i8 - 32;
        }
        for (bytes, codes) in bytes[8..].chunks_exact(16).zip(block.codes.chunks_exact_mut(32)) {
            nibbles(bytes, codes);
        }
    }
}
