//! Activations in the order in which the kernels read them.
//!
//! Tokens are taken in chunks of 8, then 4, 2 and 1; within a chunk everything lies token next to token,
//! so that a kernel reads it in one stream:
//!
//! ```text
//! f32      [place][token]
//! bytes    [quad][token][4 places]      scales [block][token]      sums [group][token]
//! ```

use attar_tensor::linalg::Isa;
use rayon::prelude::*;

use super::tiles::{BLOCK, QUADS, Shape};
use crate::spec::Activations;

/// Most tokens of a chunk.
pub(crate) const CHUNK: usize = 8;
/// Blocks and tokens whose largest magnitude is smaller count as zero: their inverse is not finite.
pub(crate) const SMALLEST: f32 = 1e-30;
/// Adding this leaves a rounded integer in the low bits of a float.
const ROUND: f32 = 12_582_912.0;

/// Tokens that are multiplied together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Chunk {
    pub(crate) first: usize,
    pub(crate) count: usize,
}

/// Cuts `m` tokens into chunks of at most `most`, a power of two.
pub(crate) fn chunks(m: usize, most: usize) -> Vec<Chunk> {
    let (mut chunks, mut first, mut count) = (Vec::new(), 0, most);
    while first < m {
        while count > m - first {
            count /= 2;
        }
        chunks.push(Chunk { first, count });
        first += count;
    }
    chunks
}

/// Cuts a vector that holds `width` elements for each token into the parts of the chunks.
fn split<'a, T>(mut all: &'a mut [T], width: usize, chunks: &[Chunk]) -> Vec<&'a mut [T]> {
    let mut parts = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let (part, rest) = all.split_at_mut(chunk.count * width);
        parts.push(part);
        all = rest;
    }
    parts
}

/// f32 activations of all tokens.
#[derive(Debug)]
pub(crate) struct Floats {
    pub(crate) chunks: Vec<Chunk>,
    x: Vec<f32>,
    /// Sums over groups, made in f64.
    sums: Vec<f32>,
}

/// One chunk of [`Floats`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct FloatChunk<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) sums: &'a [f32],
}

/// Activations as bytes, of all tokens.
#[derive(Debug)]
pub(crate) struct Bytes {
    pub(crate) chunks: Vec<Chunk>,
    q: Vec<i8>,
    /// Of blocks.
    scales: Vec<f32>,
    /// `Σ scale · Σ q` of groups.
    sums: Vec<f32>,
}

/// One chunk of [`Bytes`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByteChunk<'a> {
    pub(crate) q: &'a [i8],
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [f32],
}

/// Brings one token into the order of places; `placed` is used again.
fn place<'a>(shape: &Shape, x: &'a [f32], placed: &'a mut Vec<f32>) -> &'a [f32] {
    let Some(order) = &shape.order else { return x };
    placed.clear();
    placed.extend(order.iter().map(|&column| x.get(column as usize).copied().unwrap_or(0.0)));
    placed
}

/// All tokens `[m, places]` in the order of places; `None` when they are so already.
pub(crate) fn place_all(shape: &Shape, x: &[f32], m: usize) -> Option<Vec<f32>> {
    let order = shape.order.as_ref()?;
    let mut placed = vec![0.0f32; m * order.len()];
    let tokens = placed.par_chunks_mut(order.len().max(1)).zip(x.par_chunks(shape.in_features));
    tokens.for_each(|(to, x)| {
        for (to, &column) in to.iter_mut().zip(order) {
            *to = x.get(column as usize).copied().unwrap_or(0.0);
        }
    });
    Some(placed)
}

impl Floats {
    pub(crate) fn new(shape: &Shape, x: &[f32], m: usize, most: usize) -> Self {
        let (columns, places, groups) = (shape.in_features, shape.places(), shape.groups());
        let chunks = chunks(m, most);
        let (mut to, mut sums) = (vec![0.0f32; m * places], vec![0.0f32; m * groups]);
        let mut placed = Vec::new();
        let parts = split(&mut to, places, &chunks).into_iter();
        let parts = parts.zip(split(&mut sums, groups, &chunks)).zip(&chunks);
        for ((to, sums), chunk) in parts {
            for t in 0..chunk.count {
                let token = chunk.first + t;
                let x = place(shape, &x[token * columns..(token + 1) * columns], &mut placed);
                for (to, &x) in to[t..].iter_mut().step_by(chunk.count).zip(x) {
                    *to = x;
                }
                for group in 0..groups {
                    let blocks = &shape.group_blocks[group..group + 2];
                    let x = &x[blocks[0] as usize * BLOCK..blocks[1] as usize * BLOCK];
                    let sum: f64 = x.iter().map(|&x| f64::from(x)).sum();
                    sums[group * chunk.count + t] = sum as f32;
                }
            }
        }
        Self { chunks, x: to, sums }
    }

    pub(crate) fn chunk(&self, shape: &Shape, chunk: Chunk) -> FloatChunk<'_> {
        let of = |width: usize| chunk.first * width..(chunk.first + chunk.count) * width;
        FloatChunk { x: &self.x[of(shape.places())], sums: &self.sums[of(shape.groups())] }
    }
}

impl Bytes {
    /// Rounds with one scale per block, or per token.
    pub(crate) fn new(
        shape: &Shape,
        (x, m): (&[f32], usize),
        most: usize,
        activations: Activations,
        isa: Isa,
    ) -> Self {
        let (places, groups, blocks) = (shape.places(), shape.groups(), shape.blocks());
        let chunks = chunks(m, most);
        let mut q = vec![0i8; m * places];
        let mut scales = vec![0.0f32; m * blocks];
        let mut sums = vec![0.0f32; m * groups];
        let parts = split(&mut q, places, &chunks).into_iter();
        let parts = parts.zip(split(&mut scales, blocks, &chunks));
        let parts = parts.zip(split(&mut sums, groups, &chunks)).zip(&chunks);
        let fill =
            |(((q, scales), sums), chunk): (((&mut [i8], &mut [f32]), &mut [f32]), &Chunk)| {
                let to = Rounded { q, scales, sums, count: chunk.count };
                let x = &x[chunk.first * shape.in_features..];
                let per_token = activations == Activations::Int8PerToken;
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: a kernel is prepared for instruction sets that this machine has.
                    Isa::Avx512 => unsafe { round_avx512(shape, x, per_token, to) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Isa::Avx2 => unsafe { round_avx2(shape, x, per_token, to) },
                    _ => round(shape, x, per_token, to),
                }
            };
        if chunks.len() > 1 {
            parts.collect::<Vec<_>>().into_par_iter().for_each(fill);
        } else {
            parts.for_each(fill);
        }
        Self { chunks, q, scales, sums }
    }

    pub(crate) fn chunk(&self, shape: &Shape, chunk: Chunk) -> ByteChunk<'_> {
        let of = |width: usize| chunk.first * width..(chunk.first + chunk.count) * width;
        ByteChunk {
            q: &self.q[of(shape.places())],
            scales: &self.scales[of(shape.blocks())],
            sums: &self.sums[of(shape.groups())],
        }
    }
}

/// Where a chunk of rounded tokens goes.
struct Rounded<'a> {
    q: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    count: usize,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn round_avx512(shape: &Shape, x: &[f32], per_token: bool, to: Rounded<'_>) {
    round(shape, x, per_token, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn round_avx2(shape: &Shape, x: &[f32], per_token: bool, to: Rounded<'_>) {
    round(shape, x, per_token, to);
}

/// Rounds the first `to.count` tokens of `x`. The same bits on every instruction set.
#[inline(always)]
fn round(shape: &Shape, x: &[f32], per_token: bool, to: Rounded<'_>) {
    let (columns, count) = (shape.in_features, to.count);
    let mut placed = Vec::new();
    for t in 0..count {
        let x = place(shape, &x[t * columns..(t + 1) * columns], &mut placed);
        let x = x.as_chunks::<BLOCK>().0;
        let mut scale = (0.0, 0.0);
        if per_token {
            let mut largest = 0;
            for x in x {
                largest = largest.max(largest_bits(x));
            }
            scale = scale_of(largest);
        }
        for group in 0..shape.groups() {
            let mut sum = 0.0f32;
            for block in shape.group_blocks[group] as usize..shape.group_blocks[group + 1] as usize
            {
                let x = &x[block];
                if !per_token {
                    scale = scale_of(largest_bits(x));
                }
                let mut q = [0i8; BLOCK];
                let mut total = 0i32;
                for (q, &x) in q.iter_mut().zip(x) {
                    *q = (x * scale.1 + ROUND).to_bits() as i8;
                    total += i32::from(*q);
                }
                let to_q = &mut to.q[block * BLOCK * count..(block + 1) * BLOCK * count];
                let quads = to_q.as_chunks_mut::<4>().0;
                for (quad, q) in q.as_chunks::<4>().0.iter().enumerate() {
                    quads[quad * count + t] = *q;
                }
                to.scales[block * count + t] = scale.0;
                sum += scale.0 * total as f32;
            }
            to.sums[group * count + t] = sum;
        }
    }
    debug_assert_eq!(to.q.len(), shape.blocks() * QUADS * 4 * count);
}

/// Bits of the largest magnitude; those of NaN are larger than any.
#[inline(always)]
fn largest_bits(x: &[f32; BLOCK]) -> u32 {
    let mut largest = 0;
    for x in x {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    largest
}

/// Scale and inverse for a largest magnitude.
#[inline(always)]
fn scale_of(bits: u32) -> (f32, f32) {
    let largest = f32::from_bits(bits);
    if largest < SMALLEST { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_token_once() {
        for m in 0..40 {
            let mut next = 0;
            for chunk in chunks(m, CHUNK) {
                assert_eq!(chunk.first, next);
                assert!([1, 2, 4, 8].contains(&chunk.count));
                next += chunk.count;
            }
            assert_eq!(next, m);
        }
    }
}
