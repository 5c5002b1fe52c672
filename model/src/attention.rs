//! Causal attention with grouped query heads and an optional sliding window:
//! `out_h = softmax(mask(q_h k_gᵀ / sqrt(d))) v_g`, query rows in chunks so that blocks above the
//! diagonal (and behind the window) are never computed. f32.

use attar_tensor::linalg::{gemm_nn, gemm_nt, rms_norm_row, softmax_row_in_place};

use crate::{rope::RopeTable, spec::DecoderSpec};

/// Query rows handled at once.
const CHUNK: usize = 128;

/// Norm weights of queries and keys, `[head_dim]` each.
pub(crate) type QkNorm = Option<(Vec<f32>, Vec<f32>)>;

/// Normalises (when the family does) and rotates the heads of `x [tokens, heads * head_dim]` whose
/// first row stands at position `start`.
pub(crate) fn place_heads(
    spec: &DecoderSpec,
    rope: &RopeTable,
    norm: Option<&[f32]>,
    start: usize,
    width: usize,
    x: &mut [f32],
) {
    let mut scratch = vec![0.0; spec.head_dim];
    for (t, row) in x.chunks_mut(width).enumerate() {
        for head in row.chunks_mut(spec.head_dim) {
            if let Some(weight) = norm {
                rms_norm_row(head, weight, spec.rms_eps, &mut scratch);
                head.copy_from_slice(&scratch);
            }
            rope.rotate(head, start + t);
        }
    }
}

/// Attention of `q [m, heads*d]`, whose first row stands at position `start`, over keys and values
/// `[start + m, kv_heads*d]`; writes `out [m, heads*d]`.
pub(crate) fn attend(
    spec: &DecoderSpec,
    window: Option<usize>,
    start: usize,
    (q, k, v): (&[f32], &[f32], &[f32]),
    out: &mut [f32],
) {
    let d = spec.head_dim;
    let (ldq, ldk) = (spec.heads * d, spec.kv_heads * d);
    let m = q.len() / ldq;
    let repeat = spec.heads / spec.kv_heads;
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0.0f32; CHUNK.min(m) * (start + m)];
    for head in 0..spec.heads {
        let group = head / repeat * d;
        for first in (0..m).step_by(CHUNK) {
            let rows = CHUNK.min(m - first);
            let end = start + first + rows;
            let begin = window.map_or(0, |w| (start + first + 1).saturating_sub(w));
            let keys = end - begin;
            let scores = &mut scores[..rows * keys];
            gemm_nt(
                (rows, keys, d),
                scale,
                (&q[first * ldq + head * d..], ldq),
                (&k[begin * ldk + group..], ldk),
                false,
                (scores, keys),
            );
            for (r, row) in scores.chunks_mut(keys).enumerate() {
                let position = start + first + r;
                let visible = position + 1 - begin;
                let hidden = window.map_or(0, |w| (position + 1).saturating_sub(w + begin));
                softmax_row_in_place(&mut row[hidden..visible]);
                row[..hidden].fill(0.0);
                row[visible..].fill(0.0);
            }
            gemm_nn(
                (rows, d, keys),
                1.0,
                (scores, keys),
                (&v[begin * ldk + group..], ldk),
                false,
                (&mut out[first * ldq + head * d..], ldq),
            );
        }
    }
}
