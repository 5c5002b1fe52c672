//! Text generation with a key/value cache: a prompt is run once, then one token at a time (m = 1, the
//! decode path of the kernels).

use attar_tensor::{linalg::silu_mul, rng::Rng};

use crate::{
    BlockOps, Decoder, ModelError, WeightSource,
    attention::{attend, place_heads},
    evaluate::{Walk, embed, final_logits},
    rope::RopeTable,
};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Seed of the draw.
    pub seed: u64,
}

/// A whole model held for generation.
pub struct Generator<'a> {
    decoder: &'a Decoder,
    source: &'a dyn WeightSource,
    blocks: Vec<BlockOps<'static>>,
    head: BlockOps<'static>,
    cache: Vec<(Vec<f32>, Vec<f32>)>,
    /// Activations inside a block; fresh memory for each product costs page faults.
    buffers: [Vec<f32>; 4],
    length: usize,
    rope: RopeTable,
    rng: Rng,
    temperature: f32,
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("length", &self.length).finish_non_exhaustive()
    }
}

impl<'a> Generator<'a> {
    /// Loads every block; `positions` bounds prompt and generated tokens together.
    ///
    /// # Errors
    /// When a tensor cannot be read.
    pub fn new(
        decoder: &'a Decoder,
        source: &'a dyn WeightSource,
        positions: usize,
        sampling: Sampling,
    ) -> Result<Self, ModelError> {
        let layers = decoder.spec.layers;
        let cached = positions * decoder.spec.kv_heads * decoder.spec.head_dim;
        let blocks = (0..layers)
            .map(|index| BlockOps::load(decoder, index, source))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            decoder,
            source,
            blocks,
            head: BlockOps::load(decoder, layers, source)?,
            cache: (0..layers)
                .map(|_| (Vec::with_capacity(cached), Vec::with_capacity(cached)))
                .collect(),
            buffers: Default::default(),
            length: 0,
            rope: RopeTable::new(decoder.spec.rope, decoder.spec.head_dim, positions),
            rng: Rng::new(sampling.seed),
            temperature: sampling.temperature,
        })
    }

    /// Forgets everything that was run.
    pub fn clear(&mut self) {
        self.length = 0;
        for (keys, values) in &mut self.cache {
            keys.clear();
            values.clear();
        }
    }

    /// Positions left.
    pub fn remaining(&self) -> usize {
        self.rope.positions() - self.length
    }

    /// Runs `tokens` behind what was run before; logits `[vocab]` of the last one.
    ///
    /// # Errors
    /// When the embedding cannot be read.
    ///
    /// # Panics
    /// When `tokens` is empty or does not fit [`Generator::remaining`].
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        assert!(!tokens.is_empty() && tokens.len() <= self.remaining(), "tokens fit the positions");
        let spec = &self.decoder.spec;
        let (m, start) = (tokens.len(), self.length);
        let mut x = embed(self.decoder, self.source.tensors(), tokens)?;
        let [h, q, k, v] = &mut self.buffers;
        for (index, (ops, (keys, values))) in self.blocks.iter().zip(&mut self.cache).enumerate() {
            let walk = Walk { decoder: self.decoder, index, rope: &self.rope };
            let out = |site: usize| self.decoder.block(index).sites[site].out_features;
            walk.norm_into(&ops.norms[0], &x, h);
            ops.apply_into(0, out(0), h, m, q);
            ops.apply_into(1, out(1), h, m, k);
            ops.apply_into(2, out(2), h, m, v);
            let (qn, kn) = match &ops.qk_norm {
                Some((q, k)) => (Some(q.as_slice()), Some(k.as_slice())),
                None => (None, None),
            };
            place_heads(spec, &self.rope, qn, start, out(0), q);
            place_heads(spec, &self.rope, kn, start, out(1), k);
            keys.extend_from_slice(k);
            values.extend_from_slice(v);
            h.resize(q.len(), 0.0);
            attend(spec, spec.window[index], start, (q, keys, values), h);
            ops.apply_into(3, out(3), h, m, q);
            for (x, y) in x.iter_mut().zip(&*q) {
                *x += y;
            }
            walk.norm_into(&ops.norms[1], &x, h);
            ops.apply_into(4, out(4), h, m, q);
            ops.apply_into(5, out(5), h, m, k);
            silu_mul(q, k);
            ops.apply_into(6, out(6), q, m, v);
            for (x, y) in x.iter_mut().zip(&*v) {
                *x += y;
            }
        }
        self.length += m;
        let last = &x[(m - 1) * spec.hidden..];
        Ok(final_logits(self.decoder, &self.head, last).into_raw_vec_and_offset().0)
    }

    /// Chooses a token from logits.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let best = |values: &[f32]| {
            let at =
                values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
            at.map_or(0, |(index, _)| index)
        };
        let top = best(logits);
        if self.temperature <= 0.0 {
            return top as u32;
        }
        let max = f64::from(logits[top]);
        let weights: Vec<f64> = logits
            .iter()
            .map(|&l| ((f64::from(l) - max) / f64::from(self.temperature)).exp())
            .collect();
        let mut left = self.rng.uniform_f64() * weights.iter().sum::<f64>();
        for (token, weight) in weights.iter().enumerate() {
            left -= weight;
            if left <= 0.0 {
                return token as u32;
            }
        }
        top as u32
    }
}
