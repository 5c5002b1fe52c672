//! What the model is: blocks of linear sites, the activations they read, and the coupling between them.

use serde::{Deserialize, Serialize};

/// The part a linear plays in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Attention output projection.
    AttentionOutput,
    /// Gate of a gated MLP.
    Gate,
    /// Up projection of a gated MLP.
    Up,
    /// Down projection of an MLP.
    Down,
    /// Output head.
    Head,
}

/// One linear in one block: `y = x · weightᵀ + bias`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Site {
    /// Tensor name without `.weight`, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// The part it plays.
    pub role: Role,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// True when `<name>.bias` exists.
    pub bias: bool,
    /// Element type of the weight in the source checkpoint.
    pub dtype: attar_tensor::DType,
}

impl Site {
    /// True for the linear that makes logits.
    pub fn is_head(&self) -> bool {
        self.role == Role::Head
    }

    /// Number of weights.
    pub const fn weights(&self) -> usize {
        self.out_features * self.in_features
    }

    /// The two linears that stand for it at this rank: `<name>.down [rank, in_features]` and
    /// `<name>.up [out_features, rank]`.
    pub fn factors(&self, rank: usize) -> [Self; 2] {
        let thin = |part: &str, out_features, in_features| Self {
            name: format!("{}.{part}", self.name),
            out_features,
            in_features,
            bias: false,
            ..self.clone()
        };
        [thin("down", rank, self.in_features), thin("up", self.out_features, rank)]
    }
}

/// Activations that one or several sites read. Its position in [`Block::inputs`] is the *stage* at which
/// these sites are solved: data order, so that a later group sees what the compressed former ones put out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InputGroup {
    /// Short name for reports, e.g. `attention input`.
    pub name: &'static str,
    /// Number of channels.
    pub width: usize,
    /// Indices into [`Block::sites`] of the sites that read it. Sites of one group are fused by runtimes
    /// (q/k/v, gate/up) when there are several.
    pub sites: Vec<usize>,
}

/// A normalisation with a learned weight per channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Norm {
    /// Full tensor name, e.g. `model.layers.0.input_layernorm.weight`.
    pub tensor: String,
    /// Number of channels.
    pub width: usize,
}

/// What produces the channels of an input group, so that a scale can be folded into it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Producer {
    /// The weight of a norm: index into [`Block::norms`].
    Norm(usize),
    /// The output rows (and bias) of a site: index into [`Block::sites`].
    Rows(usize),
}

/// Which producer channel makes which consumer channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ChannelMap {
    /// The same index.
    Identity,
    /// Grouped-query attention: consumer channel `h * head_dim + d` comes from producer channel
    /// `(h / repeat) * head_dim + d`.
    GroupedHeads {
        /// Channels per head.
        head_dim: usize,
        /// Query heads per key/value head.
        repeat: usize,
    },
}

impl ChannelMap {
    /// The producer channel behind a consumer channel.
    pub const fn producer_of(self, consumer: usize) -> usize {
        match self {
            Self::Identity => consumer,
            Self::GroupedHeads { head_dim, repeat } => {
                (consumer / head_dim / repeat) * head_dim + consumer % head_dim
            }
        }
    }

    /// Number of producer channels behind `consumers` consumer channels.
    pub const fn producers(self, consumers: usize) -> usize {
        match self {
            Self::Identity => consumers,
            Self::GroupedHeads { repeat, .. } => consumers / repeat,
        }
    }
}

/// A place where a per-channel scale cancels: producer channels are divided by `s`, the columns of every
/// consumer are multiplied by `s`, and the block computes the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fold {
    /// Who makes the channels.
    pub producer: Producer,
    /// Index into [`Block::inputs`]: all sites of this group are consumers.
    pub input: usize,
    /// Which producer channel makes which consumer channel.
    pub map: ChannelMap,
}

/// Shape of the attention in a block, for cost estimates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

/// One decoder block, or the epilogue (final norm and output head) seen as a block with one site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Block {
    /// Position; the epilogue comes last.
    pub index: usize,
    /// Name prefix with the trailing dot, e.g. `model.layers.0.`; empty for the epilogue.
    pub prefix: String,
    /// The linears, in data order.
    pub sites: Vec<Site>,
    /// Norms with a weight that folds may change.
    pub norms: Vec<Norm>,
    /// Groups of sites that read the same activations, in data order.
    pub inputs: Vec<InputGroup>,
    /// Where scales can be folded.
    pub folds: Vec<Fold>,
    /// Attention shape; `None` in the epilogue.
    pub attention: Option<AttentionShape>,
}

impl Block {
    /// The norm whose output the input group reads as it is. The head reads the final norm, whether a scale may be folded
    /// into it or not.
    pub fn norm_of(&self, input: usize) -> Option<usize> {
        if self.attention.is_none() {
            return (input == 0 && !self.norms.is_empty()).then_some(0);
        }
        self.folds.iter().find_map(|fold| match fold.producer {
            Producer::Norm(norm) if fold.input == input => Some(norm),
            _ => None,
        })
    }

    /// Index of the input group that a site reads.
    pub fn input_of(&self, site: usize) -> usize {
        self.inputs
            .iter()
            .position(|input| input.sites.contains(&site))
            .expect("every site of a block reads one of its inputs")
    }

    /// FLOPs of one forward pass over `tokens` tokens in windows of `context` (causal attention counted
    /// as half of the square).
    pub fn forward_flops(&self, tokens: usize, context: usize) -> f64 {
        let linears: f64 =
            self.sites.iter().map(|site| 2.0 * site.weights() as f64 * tokens as f64).sum();
        let attention = self
            .attention
            .map_or(0.0, |a| 2.0 * tokens as f64 * context as f64 * (a.heads * a.head_dim) as f64);
        linears + attention
    }
}

/// The model as compression sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelGraph {
    /// `model_type` of config.json.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Largest context the model was trained for.
    pub context: usize,
    /// Decoder blocks in order.
    pub blocks: Vec<Block>,
    /// Final norm and output head, one site with role [`Role::Head`] named `lm_head`.
    pub epilogue: Block,
    /// Name under which the source stores the embedding (`model.embed_tokens.weight`, or
    /// `lm_head.weight` when only that is stored and the two are tied).
    pub embedding: String,
    /// True when the output head shares the embedding's weight.
    pub tied: bool,
}

impl ModelGraph {
    /// Decoder blocks, then the epilogue.
    pub fn all_blocks(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().chain(std::iter::once(&self.epilogue))
    }

    /// Weights in the linears of the decoder blocks.
    pub fn block_weights(&self) -> usize {
        self.blocks.iter().flat_map(|block| &block.sites).map(Site::weights).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::ChannelMap;

    #[test]
    fn grouped_heads_share_a_producer() {
        let map = ChannelMap::GroupedHeads { head_dim: 4, repeat: 2 };
        assert_eq!(map.producers(16), 8);
        let rows: Vec<_> = (0..16).map(|c| map.producer_of(c)).collect();
        assert_eq!(rows, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]);
    }
}
