//! Dense bit streams: 32 codes of `bits` bits in `bits` words, least significant bit first, no padding.
//!
//! Code `i` occupies bits `i * bits .. (i + 1) * bits` of the stream; bit `b` of the stream is bit
//! `b % 32` of word `b / 32`. For 2, 4 and 8 bits no code crosses a word. Three layouts of the field
//! are this stream, taken along rows or along columns.

/// Codes that make a whole number of words at any width.
pub(crate) const CHUNK: usize = 32;

/// Words that hold `count` codes.
pub(crate) const fn words(count: usize, bits: u8) -> usize {
    (count * bits as usize).div_ceil(32)
}

/// Packs 32 codes into the first `bits` words.
#[inline]
pub(crate) fn pack32(codes: &[u8; CHUNK], bits: u8) -> [u32; 8] {
    let mut out = [0u32; 8];
    match bits {
        8 => {
            for (word, c) in out.iter_mut().zip(codes.chunks_exact(4)) {
                *word = u32::from_le_bytes([c[0], c[1], c[2], c[3]]);
            }
        }
        4 => {
            for (word, c) in out.iter_mut().zip(codes.chunks_exact(8)) {
                let x = u64::from_le_bytes(c.try_into().expect("chunks are eight bytes"));
                let x = (x | x >> 4) & 0x00ff_00ff_00ff_00ff;
                let x = (x | x >> 8) & 0x0000_ffff_0000_ffff;
                *word = (x | x >> 16) as u32;
            }
        }
        _ => {
            let (mut held, mut filled, mut at) = (0u64, 0u32, 0);
            for &code in codes {
                held |= u64::from(code) << filled;
                filled += u32::from(bits);
                if filled >= 32 {
                    out[at] = held as u32;
                    at += 1;
                    held >>= 32;
                    filled -= 32;
                }
            }
        }
    }
    out
}

/// Inverse of [`pack32`]; `words` holds at least `bits` words.
#[inline]
pub(crate) fn unpack32(words: &[u32], bits: u8) -> [u8; CHUNK] {
    let mut codes = [0u8; CHUNK];
    match bits {
        8 => {
            for (codes, word) in codes.chunks_exact_mut(4).zip(words) {
                codes.copy_from_slice(&word.to_le_bytes());
            }
            return codes;
        }
        4 => {
            for (codes, &word) in codes.chunks_exact_mut(8).zip(words) {
                let x = u64::from(word);
                let x = (x | x << 16) & 0x0000_ffff_0000_ffff;
                let x = (x | x << 8) & 0x00ff_00ff_00ff_00ff;
                let x = (x | x << 4) & 0x0f0f_0f0f_0f0f_0f0f;
                codes.copy_from_slice(&x.to_le_bytes());
            }
            return codes;
        }
        _ => {}
    }
    let mask = (1u64 << bits) - 1;
    let (mut held, mut filled, mut at) = (0u64, 0u32, 0);
    for code in &mut codes {
        if filled < u32::from(bits) {
            held |= u64::from(words[at]) << filled;
            at += 1;
            filled += 32;
        }
        *code = (held & mask) as u8;
        held >>= bits;
        filled -= u32::from(bits);
    }
    codes
}

/// Packs a row of any length into `out`, which has [`words`]`(codes.len(), bits)` elements.
pub(crate) fn pack_row(codes: &[u8], bits: u8, out: &mut [u32]) {
    for (codes, out) in codes.chunks(CHUNK).zip(out.chunks_mut(usize::from(bits))) {
        let packed = if let Ok(full) = codes.try_into() {
            pack32(full, bits)
        } else {
            let mut full = [0u8; CHUNK];
            full[..codes.len()].copy_from_slice(codes);
            pack32(&full, bits)
        };
        out.copy_from_slice(&packed[..out.len()]);
    }
}

/// Inverse of [`pack_row`].
pub(crate) fn unpack_row(words: &[u32], bits: u8, codes: &mut [u8]) {
    for (codes, words) in codes.chunks_mut(CHUNK).zip(words.chunks(usize::from(bits))) {
        let mut full = [0u32; 8];
        full[..words.len()].copy_from_slice(words);
        codes.copy_from_slice(&unpack32(&full, bits)[..codes.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_i_starts_at_bit_i_times_bits() {
        for bits in [2u8, 3, 4, 8] {
            for i in 0..CHUNK {
                let mut codes = [0u8; CHUNK];
                codes[i] = 1;
                let packed = pack32(&codes, bits);
                let bit = i * usize::from(bits);
                for (w, &word) in packed.iter().enumerate() {
                    let expected = if w == bit / 32 { 1u32 << (bit % 32) } else { 0 };
                    assert_eq!(word, expected, "{bits} bits, code {i}, word {w}");
                }
            }
        }
    }

    #[test]
    fn three_bit_codes_cross_words() {
        let mut codes = [0u8; CHUNK];
        codes[10] = 0b101;
        codes[21] = 0b110;
        let packed = pack32(&codes, 3);
        assert_eq!(packed[..3], [0b01 << 30, 1, 0b11]);
    }

    #[test]
    fn rows_of_any_length_come_back() {
        for bits in [2u8, 3, 4, 8] {
            for count in [1, 7, 31, 32, 33, 100] {
                let codes: Vec<u8> =
                    (0..count).map(|i| (i * 37 + 11) as u8 & ((1u16 << bits) - 1) as u8).collect();
                let mut packed = vec![0; words(count, bits)];
                pack_row(&codes, bits, &mut packed);
                let mut again = vec![0; count];
                unpack_row(&packed, bits, &mut again);
                assert_eq!(codes, again);
            }
        }
    }
}
