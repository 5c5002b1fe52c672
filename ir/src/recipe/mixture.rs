//! Mixtures of block types by name: which type each tensor gets, as llama.cpp's quantizer decides for the same name
//! (llama-quant.cpp, `llama_tensor_get_type`), so that a file of that name has that file's size.

use attar_tensor::BlockType;

use crate::{ModelGraph, Role};

/// A mixture. The order is by size, smallest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is its name")]
pub enum Mixture {
    Q2KS,
    Q2K,
    Q3KS,
    Q3KM,
    Q3KL,
    Iq4Xs,
    Iq4Nl,
    Q40,
    Q4KS,
    Q41,
    Q4KM,
    Q50,
    Q5KS,
    Q51,
    Q5KM,
    Q6K,
    Q80,
}

/// Names as recipes write them; llama.cpp's are the same in capitals.
pub const MIXTURES: &[(&str, Mixture)] = &[
    ("q2_k_s", Mixture::Q2KS),
    ("q2_k", Mixture::Q2K),
    ("q3_k_s", Mixture::Q3KS),
    ("q3_k_m", Mixture::Q3KM),
    ("q3_k_l", Mixture::Q3KL),
    ("iq4_xs", Mixture::Iq4Xs),
    ("iq4_nl", Mixture::Iq4Nl),
    ("q4_0", Mixture::Q40),
    ("q4_k_s", Mixture::Q4KS),
    ("q4_1", Mixture::Q41),
    ("q4_k_m", Mixture::Q4KM),
    ("q5_0", Mixture::Q50),
    ("q5_k_s", Mixture::Q5KS),
    ("q5_1", Mixture::Q51),
    ("q5_k_m", Mixture::Q5KM),
    ("q6_k", Mixture::Q6K),
    ("q8_0", Mixture::Q80),
];

impl serde::Serialize for Mixture {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl Mixture {
    /// The mixture of this name, in small or capital letters.
    pub fn from_name(name: &str) -> Option<Self> {
        let found = MIXTURES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, mixture)| *mixture)
    }

    /// Its name.
    ///
    /// # Panics
    /// Never: every mixture is listed.
    pub fn name(self) -> &'static str {
        let found = MIXTURES.iter().find(|(_, mixture)| *mixture == self);
        found.expect("every mixture is listed").0
    }

    /// The type of most tensors.
    pub const fn base(self) -> BlockType {
        match self {
            Self::Q2KS | Self::Q2K => BlockType::Q2K,
            Self::Q3KS | Self::Q3KM | Self::Q3KL => BlockType::Q3K,
            Self::Iq4Xs => BlockType::Iq4Xs,
            Self::Iq4Nl => BlockType::Iq4Nl,
            Self::Q40 => BlockType::Q40,
            Self::Q41 => BlockType::Q41,
            Self::Q4KS | Self::Q4KM => BlockType::Q4K,
            Self::Q50 => BlockType::Q50,
            Self::Q51 => BlockType::Q51,
            Self::Q5KS | Self::Q5KM => BlockType::Q5K,
            Self::Q6K => BlockType::Q6K,
            Self::Q80 => BlockType::Q80,
        }
    }

    /// Type asked for a linear of block `at`; rows that its blocks do not divide get
    /// [`BlockType::fallback`]. `calibrated` tells that statistics serve the quantizer, with which llama.cpp
    /// leaves some tensors at fewer bits and raises others.
    pub fn of(self, graph: &ModelGraph, at: usize, role: Role, calibrated: bool) -> BlockType {
        use BlockType as T;
        let layers = graph.blocks.len();
        let base = self.base();
        let grouped = graph
            .blocks
            .get(at)
            .and_then(|block| block.attention)
            .is_some_and(|shape| shape.kv_heads > 0 && shape.heads / shape.kv_heads >= 4);
        let seventy = graph.family == "llama" && layers == 80;
        let more = at < layers / 8 || at >= 7 * layers / 8 || (at - layers / 8) % 3 == 2;
        let early = at < layers / 8;
        match (role, self) {
            (Role::Head, _) => self.head(),
            (Role::Value, _) => {
                let own = match self {
                    Self::Q2K if grouped => T::Q4K,
                    Self::Q2K => T::Q3K,
                    Self::Q2KS if grouped => T::Q4K,
                    Self::Q3KM if at < 2 => T::Q5K,
                    Self::Q3KM => T::Q4K,
                    Self::Q3KL => T::Q5K,
                    Self::Iq4Nl | Self::Iq4Xs if grouped => T::Q5K,
                    Self::Q4KM | Self::Q5KM if more => T::Q6K,
                    Self::Q4KS if at < 4 => T::Q5K,
                    _ => base,
                };
                if seventy && matches!(own, T::Q3K | T::Q4K) { T::Q5K } else { own }
            }
            (Role::Down, Self::Q2K) => T::Q3K,
            (Role::Down, Self::Q2KS) if early => T::Q4K,
            (Role::Down, Self::Q3KM) if at < layers / 16 => T::Q5K,
            (Role::Down, Self::Q3KM) => T::Q4K,
            (Role::Down, Self::Q3KL) => T::Q5K,
            (Role::Down, Self::Q4KM | Self::Q5KM) if more => T::Q6K,
            (Role::Down, Self::Q4KS) if early => T::Q5K,
            (Role::Down, Self::Iq4Nl | Self::Iq4Xs) if early && !calibrated => T::Q5K,
            (Role::Down, Self::Q40) if early && calibrated => T::Q41,
            (Role::Down, Self::Q50) if early && calibrated => T::Q51,
            (Role::AttentionOutput, Self::Q2K) => T::Q3K,
            (Role::AttentionOutput, Self::Q3KM) => T::Q4K,
            (Role::AttentionOutput, Self::Q3KL) => T::Q5K,
            _ => base,
        }
    }

    /// Type of the output head, and of the embedding where the two are tied.
    pub const fn head(self) -> BlockType {
        match self {
            Self::Q80 => BlockType::Q80,
            _ => BlockType::Q6K,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, Block};

    fn graph_of(layers: usize, heads: usize, kv_heads: usize) -> ModelGraph {
        let block = |index, attention| Block {
            index,
            prefix: String::new(),
            sites: Vec::new(),
            norms: Vec::new(),
            inputs: Vec::new(),
            folds: Vec::new(),
            attention,
        };
        let shape = AttentionShape { heads, kv_heads, head_dim: 32 };
        ModelGraph {
            family: "llama".into(),
            hidden: 256,
            vocab: 2048,
            context: 256,
            blocks: (0..layers).map(|at| block(at, Some(shape))).collect(),
            epilogue: block(layers, None),
            embedding: "model.embed_tokens.weight".into(),
            tied: true,
        }
    }

    /// What llama-quantize printed for a Llama model of 4 blocks, 8 heads and 4 key/value heads.
    #[test]
    fn types_are_those_of_llama_cpp() {
        use Role::{AttentionOutput, Down, Gate, Head, Key, Query, Up, Value};
        let graph = graph_of(4, 8, 4);
        let roles = [Query, Key, Value, AttentionOutput, Gate, Up, Down];
        let row = |mixture: Mixture, at: usize, calibrated: bool| {
            let names = roles.map(|role| mixture.of(&graph, at, role, calibrated).name());
            names.join(" ")
        };
        for (mixture, rows) in [
            (Mixture::Q2K, ["q2_k q2_k q3_k q3_k q2_k q2_k q3_k"; 4]),
            (
                Mixture::Q3KM,
                [
                    "q3_k q3_k q5_k q4_k q3_k q3_k q4_k",
                    "q3_k q3_k q5_k q4_k q3_k q3_k q4_k",
                    "q3_k q3_k q4_k q4_k q3_k q3_k q4_k",
                    "q3_k q3_k q4_k q4_k q3_k q3_k q4_k",
                ],
            ),
            (
                Mixture::Q4KM,
                [
                    "q4_k q4_k q4_k q4_k q4_k q4_k q4_k",
                    "q4_k q4_k q4_k q4_k q4_k q4_k q4_k",
                    "q4_k q4_k q6_k q4_k q4_k q4_k q6_k",
                    "q4_k q4_k q6_k q4_k q4_k q4_k q6_k",
                ],
            ),
            (Mixture::Iq4Xs, ["iq4_xs iq4_xs iq4_xs iq4_xs iq4_xs iq4_xs iq4_xs"; 4]),
        ] {
            for (at, expected) in rows.into_iter().enumerate() {
                assert_eq!(row(mixture, at, true), expected, "{} block {at}", mixture.name());
            }
            assert_eq!(mixture.of(&graph, 4, Head, true), BlockType::Q6K);
        }
        // Heads that share: values get more bits.
        let grouped = graph_of(16, 8, 2);
        assert_eq!(Mixture::Q2K.of(&grouped, 3, Value, true), BlockType::Q4K);
        assert_eq!(Mixture::Iq4Xs.of(&grouped, 3, Value, true), BlockType::Q5K);
        // Without statistics the first ffn_down get more.
        assert_eq!(Mixture::Iq4Xs.of(&grouped, 1, Down, false), BlockType::Q5K);
        assert_eq!(Mixture::Iq4Xs.of(&grouped, 2, Down, false), BlockType::Iq4Xs);
    }

    #[test]
    fn names_are_read_in_any_case() {
        for (name, mixture) in MIXTURES {
            assert_eq!(Mixture::from_name(&name.to_uppercase()), Some(*mixture));
            assert_eq!(mixture.name(), *name);
        }
        assert_eq!(Mixture::from_name("q4_k"), None);
    }
}
