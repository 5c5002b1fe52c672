//! A Llama-like decoder written with candle's operations, so that its gradients are candle's own.

use candle_core::{D, DType, Device, Result, Tensor, Var};

/// Numbers of the architecture.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Added to the mean square in norms.
    pub eps: f64,
    /// Base of the rotations.
    pub theta: f64,
    /// How many positions a token sees, itself included.
    pub window: Option<usize>,
}

/// One block's values.
#[derive(Debug, Clone)]
pub struct Block {
    /// q, k, v, o, gate, up, down: `[out, in]`.
    pub linears: Vec<Var>,
    /// Of the same.
    pub biases: Vec<Option<Var>>,
    /// Before attention and before the MLP.
    pub norms: Vec<Var>,
    /// Of queries and keys.
    pub qk_norm: Option<(Var, Var)>,
}

/// Cosines, sines and the additive mask of a length.
#[derive(Debug, Clone)]
pub struct Tables {
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Tables {
    /// For windows of `length` tokens.
    pub fn new(shape: Shape, length: usize, dtype: DType) -> Result<Self> {
        let half = shape.head_dim / 2;
        let (mut cos, mut sin, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        for t in 0..length {
            for i in 0..half {
                let angle = t as f64 * shape.theta.powf(-2.0 * i as f64 / shape.head_dim as f64);
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
            for u in 0..length {
                let seen = u <= t && shape.window.is_none_or(|w| u + w > t);
                mask.push(if seen { 0.0 } else { f64::NEG_INFINITY });
            }
        }
        let make = |values, shape: (usize, usize)| {
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
        };
        Ok(Self {
            cos: make(cos, (length, half))?,
            sin: make(sin, (length, half))?,
            mask: make(mask, (length, length))?,
        })
    }
}

fn linear(x: &Tensor, weight: &Var, bias: Option<&Var>) -> Result<Tensor> {
    let (b, t, k) = x.dims3()?;
    let y = x.reshape((b * t, k))?.matmul(&weight.t()?)?.reshape((b, t, ()))?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

impl Block {
    /// What the block makes of `x [batch, tokens, hidden]`.
    pub fn forward(&self, shape: Shape, tables: &Tables, x: &Tensor) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let d = shape.head_dim;
        let eps = shape.eps as f32;
        let of =
            |x: &Tensor, site: usize| linear(x, &self.linears[site], self.biases[site].as_ref());
        let heads =
            |x: Tensor, heads: usize| x.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous();
        let h = candle_nn::ops::rms_norm_slow(x, &self.norms[0], eps)?;
        let mut q = heads(of(&h, 0)?, shape.heads)?;
        let mut k = heads(of(&h, 1)?, shape.kv_heads)?;
        let v = heads(of(&h, 2)?, shape.kv_heads)?;
        if let Some((qn, kn)) = &self.qk_norm {
            q = candle_nn::ops::rms_norm_slow(&q, qn, eps)?;
            k = candle_nn::ops::rms_norm_slow(&k, kn, eps)?;
        }
        q = candle_nn::rotary_emb::rope_slow(&q, &tables.cos, &tables.sin)?;
        k = candle_nn::rotary_emb::rope_slow(&k, &tables.cos, &tables.sin)?;
        let repeat = shape.heads / shape.kv_heads;
        let spread = |x: &Tensor| -> Result<Tensor> {
            if repeat == 1 {
                return Ok(x.clone());
            }
            x.unsqueeze(2)?.expand((b, shape.kv_heads, repeat, t, d))?.reshape((
                b,
                shape.heads,
                t,
                d,
            ))
        };
        let (k, v) = (spread(&k)?, spread(&v)?);
        let scores = (q.matmul(&k.t()?)? * (1.0 / (d as f64).sqrt()))?;
        let p = candle_nn::ops::softmax(&scores.broadcast_add(&tables.mask)?, D::Minus1)?;
        let y = p.matmul(&v)?.transpose(1, 2)?.reshape((b, t, shape.heads * d))?;
        let x = (x + of(&y, 3)?)?;
        let h = candle_nn::ops::rms_norm_slow(&x, &self.norms[1], eps)?;
        let m = (candle_nn::ops::silu(&of(&h, 4)?)? * of(&h, 5)?)?;
        &x + of(&m, 6)?
    }
}
