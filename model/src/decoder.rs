//! A checkpoint's decoder: its description, its graph, and its blocks' weights.

use attar_ir::{
    AttentionShape, Block, BlockState, LinearState, ModelGraph, Norm, Role, Site, Weight,
};
use attar_tensor::{DType, Mat, TensorSource, linalg::first_non_finite};
use serde_json::Value;

use crate::{DecoderSpec, ModelError, attention::QkNorm};

/// A decoder as described by config.json and found in the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// Numbers of the architecture.
    pub spec: DecoderSpec,
    /// Sites, inputs and folds.
    pub graph: ModelGraph,
}

fn shape_is(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Result<DType, ModelError> {
    let fail = |reason: String| ModelError::Tensor { name: name.to_owned(), reason };
    let Some(header) = source.header(name) else {
        return Err(fail("is missing from the checkpoint, but config.json calls for it".into()));
    };
    if header.shape != shape {
        return Err(fail(format!(
            "has shape {:?}, but config.json calls for {shape:?}",
            header.shape
        )));
    }
    Ok(header.dtype)
}

/// One tensor as f32, checked for NaN and infinity; its mapped pages are given back.
pub(crate) fn read_finite(source: &dyn TensorSource, name: &str) -> Result<Vec<f32>, ModelError> {
    let fail = |reason: String| ModelError::Tensor { name: name.to_owned(), reason };
    let values = source.read(name)?.to_f32().map_err(|error| fail(error.to_string()))?;
    source.release(name);
    if let Some(at) = first_non_finite(&values) {
        return Err(fail(format!(
            "holds {} at flat index {at}; the checkpoint is damaged, download or export it again",
            values[at]
        )));
    }
    Ok(values)
}

impl Decoder {
    /// Reads config.json and checks every tensor it calls for.
    ///
    /// # Errors
    /// [`ModelError::Config`] and [`ModelError::Tensor`] naming the fact or tensor.
    pub fn read(config: &Value, source: &dyn TensorSource) -> Result<Self, ModelError> {
        Self::read_with(config, source, &|_| false)
    }

    /// As [`Decoder::read`] for an artifact: sites for which `quantized` is true have no `.weight`.
    ///
    /// # Errors
    /// As [`Decoder::read`].
    pub fn read_with(
        config: &Value,
        source: &dyn TensorSource,
        quantized: &dyn Fn(&str) -> bool,
    ) -> Result<Self, ModelError> {
        let spec = DecoderSpec::read(config)?;
        let site = |name: String, role, out_features, in_features, bias| {
            let dtype = if quantized(&name) {
                DType::F32
            } else {
                shape_is(source, &format!("{name}.weight"), &[out_features, in_features])?
            };
            if bias {
                shape_is(source, &format!("{name}.bias"), &[out_features])?;
            }
            Ok::<_, ModelError>(Site { name, role, out_features, in_features, bias, dtype })
        };
        let (hidden, inner) = (spec.hidden, spec.intermediate);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        // Grows with the tensors found, not with what config.json claims.
        let mut blocks = Vec::new();
        for index in 0..spec.layers {
            let prefix = format!("model.layers.{index}.");
            let name = |part: &str| format!("{prefix}{part}");
            let (ab, ob, mb) = (spec.qkv_bias, spec.o_bias, spec.mlp_bias);
            let sites = vec![
                site(name("self_attn.q_proj"), Role::Query, q, hidden, ab)?,
                site(name("self_attn.k_proj"), Role::Key, kv, hidden, ab)?,
                site(name("self_attn.v_proj"), Role::Value, kv, hidden, ab)?,
                site(name("self_attn.o_proj"), Role::AttentionOutput, hidden, q, ob)?,
                site(name("mlp.gate_proj"), Role::Gate, inner, hidden, mb)?,
                site(name("mlp.up_proj"), Role::Up, inner, hidden, mb)?,
                site(name("mlp.down_proj"), Role::Down, hidden, inner, mb)?,
            ];
            let mut norms = Vec::new();
            for part in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
                shape_is(source, &name(part), &[hidden])?;
                norms.push(Norm { tensor: name(part), width: hidden });
            }
            if spec.qk_norm {
                for part in ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] {
                    shape_is(source, &name(part), &[spec.head_dim])?;
                }
            }
            let attention = AttentionShape {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
            };
            blocks.push(Block::coupled(index, prefix, (sites, norms), Some(attention), true));
        }
        shape_is(source, "model.norm.weight", &[hidden])?;
        let embed = "model.embed_tokens.weight";
        let embedding = if source.header(embed).is_none()
            && spec.tied
            && source.header("lm_head.weight").is_some()
        {
            "lm_head.weight"
        } else {
            embed
        };
        let dtype = shape_is(source, embedding, &[spec.vocab, hidden])?;
        if !spec.tied && !quantized("lm_head") {
            shape_is(source, "lm_head.weight", &[spec.vocab, hidden])?;
        }
        let head = Site {
            name: "lm_head".into(),
            role: Role::Head,
            out_features: spec.vocab,
            in_features: hidden,
            bias: false,
            dtype,
        };
        let norm = Norm { tensor: "model.norm.weight".into(), width: hidden };
        let parts = (vec![head], vec![norm]);
        // A scale folded into a tied head would reach the embedding.
        let epilogue = Block::coupled(spec.layers, String::new(), parts, None, !spec.tied);
        let graph = ModelGraph {
            family: spec.family.clone(),
            hidden,
            vocab: spec.vocab,
            context: spec.context,
            blocks,
            epilogue,
            embedding: embedding.to_owned(),
            tied: spec.tied,
        };
        Ok(Self { spec, graph })
    }

    /// The description of a block; `layers` is the epilogue.
    ///
    /// # Panics
    /// When the index is beyond the epilogue.
    pub fn block(&self, index: usize) -> &Block {
        self.graph.blocks.get(index).unwrap_or(&self.graph.epilogue)
    }

    /// Name of the tensor that holds a site's dense weight (the embedding's for a tied head).
    pub fn weight_tensor(&self, site: &Site) -> String {
        if site.role == Role::Head && self.graph.tied {
            self.graph.embedding.clone()
        } else {
            format!("{}.weight", site.name)
        }
    }

    /// Loads a block's weights as f32.
    ///
    /// # Errors
    /// A missing or unreadable tensor, or one that holds NaN or infinity (named, with its index).
    pub fn load_block(
        &self,
        index: usize,
        source: &dyn TensorSource,
    ) -> Result<BlockState, ModelError> {
        let block = self.block(index);
        let mut linears = Vec::with_capacity(block.sites.len());
        for site in &block.sites {
            linears.push(LinearState {
                weight: Weight::Dense(self.load_weight(site, source)?),
                bias: self.load_bias(site, source)?,
            });
        }
        Ok(BlockState::new(index, linears, self.load_norms(index, source)?))
    }

    /// Loads the weight of one linear as f32.
    ///
    /// # Errors
    /// As [`Decoder::load_block`].
    pub fn load_weight(&self, site: &Site, source: &dyn TensorSource) -> Result<Mat, ModelError> {
        let weight = read_finite(source, &self.weight_tensor(site))?;
        Ok(Mat::from_shape_vec((site.out_features, site.in_features), weight)
            .expect("shapes were checked when the graph was read"))
    }

    pub(crate) fn load_bias(
        &self,
        site: &Site,
        source: &dyn TensorSource,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        site.bias.then(|| read_finite(source, &format!("{}.bias", site.name))).transpose()
    }

    pub(crate) fn load_norms(
        &self,
        index: usize,
        source: &dyn TensorSource,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        self.block(index).norms.iter().map(|norm| read_finite(source, &norm.tensor)).collect()
    }

    /// Norm weights of queries and keys of a block, where the family has them.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn load_qk_norm(
        &self,
        index: usize,
        source: &dyn TensorSource,
    ) -> Result<QkNorm, ModelError> {
        if !self.spec.qk_norm || index >= self.spec.layers {
            return Ok(None);
        }
        let prefix = &self.block(index).prefix;
        Ok(Some((
            read_finite(source, &format!("{prefix}self_attn.q_norm.weight"))?,
            read_finite(source, &format!("{prefix}self_attn.k_norm.weight"))?,
        )))
    }
}
