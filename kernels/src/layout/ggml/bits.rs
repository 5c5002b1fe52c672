//! Fields that several block types share.

use half::f16;

/// The half at byte `at`.
pub(super) fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_bits(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

pub(super) fn put_half(bytes: &mut [u8], at: usize, value: f16) {
    bytes[at..at + 2].copy_from_slice(&value.to_bits().to_le_bytes());
}

/// Low nibbles are the first half of the codes, high nibbles the second.
pub(super) fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The inverse of [`nibbles`]; bits above the fourth are left out.
pub(super) fn put_nibbles(bytes: &mut [u8], codes: &[u8]) {
    let (low, high) = codes.split_at(bytes.len());
    for ((byte, low), high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = (low & 15) | (high & 15) << 4;
    }
}

/// Adds the fifth bits of 32 codes: bit i of the word belongs to code i.
pub(super) fn fifth(bytes: &[u8], codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
}

pub(super) fn put_fifth(bytes: &mut [u8], codes: &[u8]) {
    bytes.fill(0);
    for (i, code) in codes.iter().enumerate() {
        bytes[i / 8] |= (code >> 4 & 1) << (i % 8);
    }
}

/// 128 codes of two bits in 32 bytes: bits 2k and 2k + 1 of byte l are code 32 k + l.
pub(super) fn pairs(bytes: &[u8], codes: &mut [u8]) {
    for (k, codes) in codes.chunks_exact_mut(32).enumerate() {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (2 * k) & 3;
        }
    }
}

pub(super) fn put_pairs(bytes: &mut [u8], codes: &[u8]) {
    for (l, byte) in bytes.iter_mut().enumerate() {
        *byte = (0..4).fold(0, |byte, k| byte | (codes[32 * k + l] & 3) << (2 * k));
    }
}

/// Eight scales and eight minima of 6 bits in 12 bytes:
///
/// ```text
/// byte 0..4    bits 0-5 scale 0..4      bits 6-7 high bits of scale 4..8
/// byte 4..8    bits 0-5 min 0..4        bits 6-7 high bits of min 4..8
/// byte 8..12   bits 0-3 low bits of scale 4..8    bits 4-7 low bits of min 4..8
/// ```
pub(super) fn scales_k4(bytes: &[u8], scales: &mut [i8], mins: &mut [u8]) {
    for j in 0..4 {
        scales[j] = (bytes[j] & 63) as i8;
        mins[j] = bytes[4 + j] & 63;
        scales[4 + j] = (bytes[8 + j] & 15 | bytes[j] >> 6 << 4) as i8;
        mins[4 + j] = bytes[8 + j] >> 4 | bytes[4 + j] >> 6 << 4;
    }
}

pub(super) fn put_scales_k4(bytes: &mut [u8], scales: &[i8], mins: &[u8]) {
    let scale = |j: usize| scales[j] as u8;
    for j in 0..4 {
        bytes[j] = scale(j) | scale(4 + j) >> 4 << 6;
        bytes[4 + j] = mins[j] | mins[4 + j] >> 4 << 6;
        bytes[8 + j] = scale(4 + j) & 15 | mins[4 + j] << 4;
    }
}
