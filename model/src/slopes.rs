//! Slopes of the next-token loss of some text along the indices of dimensions of the model ([`attar_ir::slopes`]), with one
//! block and its gradient in memory ([`crate::descent`]).
//!
//! What the head reads of a channel and what the norm before it puts there have the same slope, since only their product
//! enters; so the gradient on the head, a table as large as the vocabulary, is never made.

use attar_ir::{Block, BlockState, BlockValues, Dim, DimName, SlopeBy, SlopeQuery, Slopes};

use crate::{BlockGradient, Decoder, ModelError, Spill, WeightSource, descent::Descent};

/// Products of one dimension: a row of sums for each window, or one for all.
struct Sums {
    dim: Dim,
    by: SlopeBy,
    windows: usize,
    rows: Vec<Vec<f64>>,
}

impl Sums {
    fn new(dim: Dim, by: SlopeBy, windows: usize) -> Self {
        let rows = if by == SlopeBy::Groups { windows } else { 1 };
        Self { rows: vec![vec![0.0; dim.size]; rows], by, windows, dim }
    }

    /// Adds the products of the tensors of a block that belong to the dimension.
    fn add(&mut self, row: usize, block: &Block, state: &BlockState, gradient: &BlockValues) {
        let Self { dim, by, rows, .. } = self;
        let absolute = *by == SlopeBy::Elements;
        for member in &dim.members {
            let mut add = |columns: usize, values: &[f32], gradient: &[f32]| {
                dim.add_products(member, columns, (values, gradient), absolute, &mut rows[row]);
            };
            for (at, site) in block.sites.iter().enumerate() {
                let Some(part) = member.tensor.strip_prefix(&site.name) else { continue };
                match (part, &state.linears[at].bias, &gradient.biases[at]) {
                    (".weight", ..) => {
                        let weight = state.linears[at].weight.values();
                        let values = weight.as_slice().expect("standard layout");
                        let slopes = gradient.linears[at].as_slice().expect("standard layout");
                        add(site.in_features, values, slopes);
                    }
                    (".bias", Some(bias), Some(slopes)) => add(1, bias, slopes),
                    _ => {}
                }
            }
            for (at, norm) in block.norms.iter().enumerate() {
                if member.tensor == norm.tensor {
                    add(1, &state.norms[at], &gradient.norms[at]);
                }
            }
        }
    }

    /// Adds the products of activations `[tokens, size]` and the gradient on them: what scaling their channels does.
    fn add_channels(&mut self, row: usize, (x, d): (&[f32], &[f32])) {
        let size = self.dim.size;
        for (x, d) in x.chunks(size).zip(d.chunks(size)) {
            let products = x.iter().zip(d).map(|(&x, &d)| f64::from(x) * f64::from(d));
            self.rows[row].iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
    }

    fn finish(self) -> (DimName, Vec<f64>) {
        let all = self.windows.max(1) as f64;
        let of = |index: usize| match self.by {
            SlopeBy::Groups => {
                let squares = self.rows.iter().map(|row| row[index] * row[index]);
                (squares.sum::<f64>() / all).sqrt()
            }
            SlopeBy::Elements => self.rows[0][index] / all,
        };
        (self.dim.name, (0..self.dim.size).map(of).collect())
    }
}

/// The mean loss of the windows, nats per token, and the slopes that `query` asks for. `spill` says where streams lie, of
/// which there are [`SlopeQuery::streams`]; `progress` is told of each block that is done.
///
/// # Errors
/// Tensors that cannot be read, streams that cannot be stored, and a loss or a slope that is no number.
///
/// # Panics
/// When `query` names a dimension that the model does not have, or the elements of one that embedding and head belong to.
pub fn loss_slopes(
    decoder: &Decoder,
    source: &dyn WeightSource,
    windows: &[Vec<u32>],
    query: &SlopeQuery,
    spill: &Spill,
    progress: &dyn Fn(),
) -> Result<(f64, Slopes), ModelError> {
    let whole = query.dims.contains(&DimName::Hidden);
    assert!(!whole || query.by == SlopeBy::Groups, "embeddings have no gradient by element");
    let tensors = source.tensors();
    let dims = decoder.graph.dims();
    let sums = |of: &dyn Fn(DimName) -> bool| -> Vec<Sums> {
        let wanted = dims.iter().filter(|dim| query.dims.contains(&dim.name) && of(dim.name));
        wanted.map(|dim| Sums::new(dim.clone(), query.by, windows.len())).collect()
    };
    let mut over_all = sums(&|name| name == DimName::Hidden);
    let mut slopes = Slopes::new();
    let mut descent = Descent::new(decoder, source, windows, Some(spill), progress)?;
    let loss = descent.head(tensors, whole, &mut |window, norm, of_norm| {
        for sums in &mut over_all {
            // The norm's weight, and the columns of the head.
            let products = norm.iter().zip(of_norm);
            let products = products.map(|(&w, &g)| 2.0 * f64::from(w) * f64::from(g));
            sums.rows[window].iter_mut().zip(products).for_each(|(sum, of)| *sum += of);
        }
    })?;
    for block in decoder.graph.blocks.iter().rev() {
        let mut own = sums(&|name| name.block() == Some(block.index));
        let state = decoder.load_block(block.index, tensors)?;
        let mut gradient = BlockValues::of(&state).zeros();
        let wanted = Wanted::of(block, &own, &over_all);
        descent.block(block.index, tensors, &state, &mut |window, run| {
            if query.by == SlopeBy::Groups {
                gradient.tensors_mut().for_each(|tensor| tensor.fill(0.0));
            }
            run(&mut wanted.places(&mut gradient));
            if query.by == SlopeBy::Groups {
                let all = own.iter_mut().chain(&mut over_all);
                all.for_each(|sums| sums.add(window, block, &state, &gradient));
            }
        })?;
        if query.by == SlopeBy::Elements {
            for sums in &mut own {
                sums.add(0, block, &state, &gradient);
            }
        }
        slopes.extend(own.into_iter().map(Sums::finish));
        progress();
    }
    if whole {
        // Scaling a column of the embedding scales what enters the first block.
        descent.input(&mut |window, x, d| {
            for sums in &mut over_all {
                sums.add_channels(window, (x, d));
            }
        })?;
    }
    slopes.extend(over_all.into_iter().map(Sums::finish));
    if !loss.is_finite() || slopes.values().flatten().any(|slope| !slope.is_finite()) {
        let reason =
            format!("the loss of the calibration text is {loss}, or its gradient no number");
        return Err(ModelError::Tensor { name: "of the model".into(), reason });
    }
    Ok((loss, slopes))
}

/// The tensors of a block that belong to a dimension asked for.
struct Wanted {
    linears: Vec<bool>,
    biases: Vec<bool>,
    norms: Vec<bool>,
}

impl Wanted {
    fn of(block: &Block, own: &[Sums], over_all: &[Sums]) -> Self {
        let of_dims = |tensor: &str| {
            let all = own.iter().chain(over_all).flat_map(|sums| &sums.dim.members);
            all.into_iter().any(|member| member.tensor == tensor)
        };
        let sites = |part: &str| {
            let of = |site: &attar_ir::Site| of_dims(&format!("{}.{part}", site.name));
            block.sites.iter().map(of).collect()
        };
        let norms = block.norms.iter().map(|norm| of_dims(&norm.tensor)).collect();
        Self { linears: sites("weight"), biases: sites("bias"), norms }
    }

    /// The places of their gradients, and that of what the block reads.
    fn places<'a>(&self, gradient: &'a mut BlockValues) -> BlockGradient<'a> {
        let Self { linears, biases, norms } = self;
        BlockGradient {
            linears: linears
                .iter()
                .zip(&mut gradient.linears)
                .map(|(wanted, g)| wanted.then(|| g.as_slice_mut().expect("standard layout")))
                .collect(),
            biases: biases
                .iter()
                .zip(&mut gradient.biases)
                .map(|(wanted, g)| g.as_deref_mut().filter(|_| *wanted))
                .collect(),
            norms: norms
                .iter()
                .zip(&mut gradient.norms)
                .map(|(wanted, g)| wanted.then_some(g.as_mut_slice()))
                .collect(),
            qk_norm: None,
            input: true,
        }
    }
}
