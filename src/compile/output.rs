//! One artifact while it is written.

use std::collections::BTreeSet;

use attar_formats::{Checkpoint, adapter::AdapterWriter, artifact::ArtifactWriter};
use attar_ir::{
    Block, BlockState, Factors, Site, Weight,
    plan::{Leaf, Origin, PlannedEmit},
};
use attar_tensor::{DType, Mat, Tensor, TensorSource, block_search};

use crate::Error;

/// Weights of an embedding that are searched at once.
const PIECE: usize = 1 << 20;

pub(super) struct Output<'a> {
    pub(super) emit: &'a PlannedEmit,
    pub(super) writer: ArtifactWriter,
    /// Corrections go there.
    pub(super) adapter: Option<AdapterWriter>,
    pub(super) written: BTreeSet<String>,
}

/// A matrix in the dtype of the checkpoint.
fn narrow(values: &Mat, dtype: DType) -> Result<Tensor, Error> {
    let shape = values.shape().to_vec();
    let values = values.as_slice().ok_or("weights are in standard layout")?;
    Ok(Tensor::from_f32(dtype, shape, values)?)
}

impl Output<'_> {
    fn put(&mut self, name: &str, tensor: &Tensor) -> Result<(), Error> {
        self.writer.put(name, &tensor.view())?;
        self.written.insert(name.to_owned());
        Ok(())
    }

    /// Writes what a block's passes made or changed.
    pub(super) fn put_block(
        &mut self,
        block: &Block,
        state: &BlockState,
        source: &Checkpoint,
    ) -> Result<(), Error> {
        let layout = |name| attar_kernels::layout(name).ok_or("the plan checked layouts");
        let stored: Vec<(String, DType)> =
            self.emit.tensors.iter().map(|t| (t.name.clone(), t.dtype)).collect();
        let stored = |name: &str| {
            let declared = stored.iter().find(|(known, _)| known == name).map(|(_, dtype)| *dtype);
            declared.or_else(|| source.header(name).map(|h| h.dtype)).unwrap_or(DType::F32)
        };
        for (at, (site, linear)) in block.sites.iter().zip(&state.linears).enumerate() {
            let weight = format!("{}.weight", site.name);
            let (base, correction) = match &linear.weight {
                Weight::Corrected(weight) => (&weight.base, Some(&weight.correction)),
                other => (other, None),
            };
            match base {
                Weight::Quantized(_) => self.put_linear(site, base)?,
                Weight::Dense(values) if state.weight_changed[at] => {
                    let shape = vec![site.out_features, site.in_features];
                    let values = values.as_slice().ok_or("weights are in standard layout")?;
                    self.put(&weight, &Tensor::from_f32(stored(&weight), shape, values)?)?;
                }
                Weight::Dense(_) => {}
                Weight::Corrected(_) => return Err("a correction is not corrected again".into()),
                Weight::Factored(factors) if self.emit.merge => {
                    let shape = vec![site.out_features, site.in_features];
                    let values = factors.product();
                    let values = values.as_slice().ok_or("weights are in standard layout")?;
                    self.put(&weight, &Tensor::from_f32(stored(&weight), shape, values)?)?;
                }
                Weight::Factored(factors) => {
                    let [down, up] = site.factors(factors.rank());
                    self.put_linear(&down, &factors.down)?;
                    self.put_linear(&up, &factors.up)?;
                }
                Weight::Blocks(blocks) => {
                    let packed = layout(blocks.block.name())?
                        .pack_blocks(blocks)
                        .map_err(|error| format!("{}: {error}", site.name))?;
                    for (suffix, tensor) in &packed.parts {
                        // A tied head is stored as the embedding.
                        let of = |origin: &Origin| {
                            matches!(origin, Origin::Part { site: of, suffix: part }
                                if *of == site.name && part == suffix)
                        };
                        let found = self.emit.tensors.iter().find(|t| of(&t.origin));
                        let name = found.ok_or("the plan lists every part")?.name.clone();
                        self.put(&name, tensor)?;
                    }
                }
            }
            if let Some(correction) = correction {
                self.put_correction(site, correction)?;
            }
            if let (true, Some(bias)) = (state.bias_changed[at], &linear.bias) {
                let name = format!("{}.bias", site.name);
                self.put(&name, &Tensor::from_f32(stored(&name), vec![bias.len()], bias)?)?;
            }
        }
        for (at, (norm, values)) in block.norms.iter().zip(&state.norms).enumerate() {
            if state.norm_changed[at] {
                let dtype = stored(&norm.tensor);
                self.put(&norm.tensor, &Tensor::from_f32(dtype, vec![values.len()], values)?)?;
            }
        }
        Ok(())
    }

    /// Writes a linear under its own name, packed or in its dtype.
    fn put_linear(&mut self, linear: &Site, weight: &Weight) -> Result<(), Error> {
        if let Some(quantized) = weight.as_quantized() {
            let layout = attar_kernels::layout(self.emit.layout.0);
            let packed = layout
                .ok_or("the plan checked layouts")?
                .pack(quantized, linear.dtype)
                .map_err(|error| format!("{}: {error}", linear.name))?;
            for (suffix, tensor) in &packed.parts {
                self.put(&format!("{}.{suffix}", linear.name), tensor)?;
            }
            return Ok(());
        }
        let values = weight.as_dense().ok_or("factors are dense or affine")?;
        self.put(&format!("{}.weight", linear.name), &narrow(values, linear.dtype)?)
    }

    /// Writes a correction to the adapter.
    fn put_correction(&mut self, site: &Site, correction: &Factors) -> Result<(), Error> {
        let adapter = self.adapter.as_mut().ok_or("the plan lists the adapter's tensors")?;
        for (leaf, values) in
            [(Leaf::CorrectionDown, &correction.down), (Leaf::CorrectionUp, &correction.up)]
        {
            let tensor = narrow(&values.values(), site.dtype)?;
            adapter.put(&leaf.name(&site.name, "weight"), &tensor.view())?;
        }
        Ok(())
    }

    /// Copies every tensor that no pass changed.
    pub(super) fn put_rest(&mut self, source: &Checkpoint) -> Result<(), Error> {
        for tensor in &self.emit.tensors {
            if self.written.contains(&tensor.name) {
                continue;
            }
            if let Origin::Coded { tensor: name, block } = &tensor.origin {
                let view = source.read(name)?;
                let rows = tensor.shape[0];
                let columns: usize = view.shape().iter().skip(1).product();
                let layout =
                    attar_kernels::layout(block.name()).ok_or("the plan checked layouts")?;
                // A few rows at a time: in f32 an embedding can be larger than all else that a run holds.
                let step = (PIECE / columns.max(1)).max(1);
                let mut values = vec![0.0f32; step.min(rows) * columns];
                let mut bytes = Vec::with_capacity(tensor.bytes());
                for first in (0..rows).step_by(step) {
                    let some = step.min(rows - first);
                    let values = &mut values[..some * columns];
                    view.copy_to_f32(first * columns, values)?;
                    let blocks = block_search::search(*block, values, some, columns, None);
                    for (_, part) in &layout.pack_blocks(&blocks)?.parts {
                        bytes.extend_from_slice(part.bytes());
                    }
                }
                let whole = Tensor::new(tensor.dtype, tensor.shape.clone(), bytes)?;
                self.writer.put(&tensor.name, &whole.view())?;
                source.release(name);
            }
            if let Origin::Source(name) = &tensor.origin {
                let view = source.read(name)?;
                if view.dtype() == tensor.dtype {
                    self.writer.put(&tensor.name, &view)?;
                } else {
                    // A vector for GGUF, widened, or what a pass on the whole model has computed, narrowed.
                    let mut bytes = Vec::with_capacity(tensor.bytes());
                    let elements: usize = tensor.shape.iter().product();
                    let mut values = vec![0.0f32; PIECE.min(elements)];
                    for first in (0..elements).step_by(PIECE) {
                        let values = &mut values[..PIECE.min(elements - first)];
                        view.copy_to_f32(first, values)?;
                        let piece = Tensor::from_f32(tensor.dtype, vec![values.len()], values)?;
                        bytes.extend_from_slice(piece.bytes());
                    }
                    let other = Tensor::new(tensor.dtype, tensor.shape.clone(), bytes)?;
                    self.writer.put(&tensor.name, &other.view())?;
                }
                source.release(name);
            }
        }
        Ok(())
    }
}
