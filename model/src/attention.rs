//! Causal attention with grouped query heads and an optional sliding window:
//! `out_h = softmax(mask(q_h k_gᵀ / sqrt(d))) v_g`, query rows in chunks so that blocks above the
//! diagonal (and behind the window) are never computed. f32.

use attar_tensor::linalg::{
    gemm_nn, gemm_nt, gemm_tn, rms_norm_row, rms_norm_row_backward, softmax_row_backward,
    softmax_row_in_place,
};

use crate::{rope::RopeTable, spec::DecoderSpec};

/// Query rows handled at once.
const CHUNK: usize = 128;

/// Norm weights of queries and keys, `[head_dim]` each.
pub type QkNorm = Option<(Vec<f32>, Vec<f32>)>;

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

/// Backward of [`place_heads`] at position 0: `raw` is what entered it, `d` the gradient on what it put out and then
/// the one on what entered. Adds to `d_norm` when it is wanted.
pub(crate) fn place_heads_backward(
    spec: &DecoderSpec,
    rope: &RopeTable,
    norm: Option<&[f32]>,
    width: usize,
    raw: &[f32],
    d: &mut [f32],
    mut d_norm: Option<&mut [f32]>,
) {
    let mut scratch = vec![0.0; spec.head_dim];
    for (t, (d, raw)) in d.chunks_mut(width).zip(raw.chunks(width)).enumerate() {
        for (d, raw) in d.chunks_mut(spec.head_dim).zip(raw.chunks(spec.head_dim)) {
            rope.rotate_back(d, t);
            if let Some(weight) = norm {
                scratch.fill(0.0);
                let d_norm = d_norm.as_deref_mut();
                rms_norm_row_backward(raw, weight, spec.rms_eps, d, &mut scratch, d_norm);
                d.copy_from_slice(&scratch);
            }
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
            let (q, k) = (&q[first * ldq + head * d..], &k[begin * ldk + group..]);
            gemm_nt((rows, keys, d), scale, (q, ldq), (k, ldk), false, (scores, keys));
            for (r, row) in scores.chunks_mut(keys).enumerate() {
                let (hidden, visible) = seen(start + first + r, begin, window);
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

/// Of the keys from `begin` on, which a query at `position` looks at: from the first number up to the second.
fn seen(position: usize, begin: usize, window: Option<usize>) -> (usize, usize) {
    (window.map_or(0, |w| (position + 1).saturating_sub(w + begin)), position + 1 - begin)
}

/// Backward of [`attend`] at position 0 for `d_out [m, heads*d]`; writes the gradients `(dq, dk, dv)` of the shapes
/// of `(q, k, v)`. With P the probabilities, made again chunk by chunk: `dV = Pᵀ dO`, `dP = dO Vᵀ`,
/// `dS = P ⊙ (dP - rowsum(P ⊙ dP))`, `dQ = dS K / sqrt(d)`, `dK = dSᵀ Q / sqrt(d)`. Query heads and chunks are
/// summed in their order.
pub(crate) fn attend_backward(
    spec: &DecoderSpec,
    window: Option<usize>,
    (q, k, v): (&[f32], &[f32], &[f32]),
    d_out: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let d = spec.head_dim;
    let (ldq, ldk) = (spec.heads * d, spec.kv_heads * d);
    let m = q.len() / ldq;
    let repeat = spec.heads / spec.kv_heads;
    let scale = 1.0 / (d as f32).sqrt();
    let mut room = vec![0.0f32; 2 * CHUNK.min(m) * m];
    dk.fill(0.0);
    dv.fill(0.0);
    for head in 0..spec.heads {
        let group = head / repeat * d;
        for first in (0..m).step_by(CHUNK) {
            let rows = CHUNK.min(m - first);
            let end = first + rows;
            let begin = window.map_or(0, |w| (first + 1).saturating_sub(w));
            let keys = end - begin;
            let (p, ds) = room.split_at_mut(rows * keys);
            let ds = &mut ds[..rows * keys];
            let (at_q, at_k) = (first * ldq + head * d, begin * ldk + group);
            let (queries, keyed) = ((&q[at_q..], ldq), (&k[at_k..], ldk));
            let d_rows = (&d_out[at_q..], ldq);
            gemm_nt((rows, keys, d), scale, queries, keyed, false, (p, keys));
            gemm_nt((rows, keys, d), 1.0, d_rows, (&v[at_k..], ldk), false, (ds, keys));
            for (r, (p, ds)) in p.chunks_mut(keys).zip(ds.chunks_mut(keys)).enumerate() {
                let (hidden, visible) = seen(first + r, begin, window);
                softmax_row_in_place(&mut p[hidden..visible]);
                softmax_row_backward(&p[hidden..visible], &mut ds[hidden..visible]);
                for row in [p, ds] {
                    row[..hidden].fill(0.0);
                    row[visible..].fill(0.0);
                }
            }
            gemm_tn((keys, d, rows), 1.0, (p, keys), d_rows, true, (&mut dv[at_k..], ldk));
            gemm_nn((rows, d, keys), scale, (ds, keys), keyed, false, (&mut dq[at_q..], ldq));
            gemm_tn((keys, d, rows), scale, (ds, keys), queries, true, (&mut dk[at_k..], ldk));
        }
    }
}
