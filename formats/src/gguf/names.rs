//! Names of tensors: Hugging Face's and GGUF's.

/// Parts of a block: Hugging Face's, GGUF's.
const BLOCK: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// What stands outside of the blocks.
const OUTER: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Frequencies of the rotary embedding that Llama 3 scales; computed, not a weight.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

fn split(name: &str) -> Option<(&str, &str)> {
    [".weight", ".bias"].into_iter().find_map(|end| Some((name.strip_suffix(end)?, end)))
}

fn index(text: &str) -> Option<usize> {
    let number: usize = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// The GGUF name of `model.layers.3.mlp.up_proj.weight` and the like.
pub fn to_gguf(name: &str) -> Option<String> {
    let (stem, end) = split(name)?;
    if let Some((_, to)) = OUTER.iter().find(|(from, _)| *from == stem) {
        return Some(format!("{to}{end}"));
    }
    let (number, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let (_, to) = BLOCK.iter().find(|(from, _)| *from == part)?;
    Some(format!("blk.{}.{to}{end}", index(number)?))
}

/// The inverse of [`to_gguf`].
pub fn from_gguf(name: &str) -> Option<String> {
    let (stem, end) = split(name)?;
    if let Some((from, _)) = OUTER.iter().find(|(_, to)| *to == stem) {
        return Some(format!("{from}{end}"));
    }
    let (number, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let (from, _) = BLOCK.iter().find(|(_, to)| *to == part)?;
    Some(format!("model.layers.{}.{from}{end}", index(number)?))
}

/// Rows of a Llama query or key weight in GGUF's order, as places in Hugging Face's: within a head, the two
/// halves that a rotation mixes are interleaved. `rows` is heads times `head_dim`.
pub fn interleave(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    (0..rows).map(|row| row / head_dim * head_dim + row % 2 * half + row % head_dim / 2).collect()
}

/// The inverse of [`interleave`].
pub fn deinterleave(rows: usize, head_dim: usize) -> Vec<usize> {
    let half = head_dim / 2;
    (0..rows)
        .map(|row| {
            let within = row % head_dim;
            row / head_dim * head_dim + within % half * 2 + within / half
        })
        .collect()
}

/// Takes rows of equal size in the order `order`.
pub fn permute(bytes: &[u8], order: &[usize]) -> Vec<u8> {
    let row = bytes.len() / order.len().max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for &at in order {
        out.extend_from_slice(&bytes[at * row..(at + 1) * row]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_unknown_ones_do_not() {
        for (from, _) in BLOCK {
            for end in ["weight", "bias"] {
                let name = format!("model.layers.17.{from}.{end}");
                assert_eq!(from_gguf(&to_gguf(&name).unwrap()), Some(name));
            }
        }
        assert_eq!(to_gguf("lm_head.weight").as_deref(), Some("output.weight"));
        assert_eq!(from_gguf("token_embd.weight").as_deref(), Some("model.embed_tokens.weight"));
        for bad in ["model.layers.x.mlp.up_proj.weight", "model.layers.01.mlp.up_proj.weight", "a"]
        {
            assert_eq!(to_gguf(bad), None);
        }
        for bad in ["blk.0.ffn_gate_exps.weight", "blk.-1.ffn_up.weight", ROPE_FREQS] {
            assert_eq!(from_gguf(bad), None);
        }
    }

    #[test]
    fn rows_of_heads_interleave_and_come_back() {
        // Two heads of 4: halves (0 1 | 2 3).
        assert_eq!(interleave(8, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        for (rows, head) in [(8, 4), (64, 32), (12, 6)] {
            let bytes: Vec<u8> = (0..rows as u8 * 2).collect();
            let there = permute(&bytes, &interleave(rows, head));
            assert_eq!(permute(&there, &deinterleave(rows, head)), bytes);
        }
    }
}
