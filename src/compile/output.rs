//! One artifact while it is written.

use std::collections::BTreeSet;

use attar_formats::{Checkpoint, artifact::ArtifactWriter};
use attar_ir::{
    Block, BlockState, Weight,
    plan::{Origin, PlannedEmit},
};
use attar_tensor::{DType, Tensor, TensorSource};

use crate::Error;

pub(super) struct Output<'a> {
    pub(super) emit: &'a PlannedEmit,
    pub(super) writer: ArtifactWriter,
    pub(super) written: BTreeSet<String>,
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
        let stored = |name: &str| source.header(name).map_or(DType::F32, |h| h.dtype);
        for (at, (site, linear)) in block.sites.iter().zip(&state.linears).enumerate() {
            let weight = format!("{}.weight", site.name);
            match &linear.weight {
                Weight::Quantized(quantized) => {
                    let packed = layout(self.emit.layout.0)?
                        .pack(quantized, site.dtype)
                        .map_err(|error| format!("{}: {error}", site.name))?;
                    for (suffix, tensor) in &packed.parts {
                        self.put(&format!("{}.{suffix}", site.name), tensor)?;
                    }
                }
                Weight::Dense(values) if state.weight_changed[at] => {
                    let shape = vec![site.out_features, site.in_features];
                    let values = values.as_slice().ok_or("weights are in standard layout")?;
                    self.put(&weight, &Tensor::from_f32(stored(&weight), shape, values)?)?;
                }
                Weight::Dense(_) => {}
                Weight::Blocks(blocks) => {
                    let packed = layout(blocks.block.name())?
                        .pack_blocks(blocks)
                        .map_err(|error| format!("{}: {error}", site.name))?;
                    for (suffix, tensor) in &packed.parts {
                        self.put(&format!("{}.{suffix}", site.name), tensor)?;
                    }
                }
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

    /// Copies every tensor that no pass changed.
    pub(super) fn put_rest(&mut self, source: &Checkpoint) -> Result<(), Error> {
        for tensor in &self.emit.tensors {
            if self.written.contains(&tensor.name) {
                continue;
            }
            if let Origin::Source(name) = &tensor.origin {
                self.writer.put(&tensor.name, &source.read(name)?)?;
                source.release(name);
            }
        }
        Ok(())
    }
}
