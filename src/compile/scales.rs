//! Training of the scales of a whole model behind all steps on its blocks: the blocks as they were made, codes and all, are
//! the student, the original is the teacher, and what comes back is a list of scales for each linear. It is one object of
//! the work directory, named by everything that it depends on; a run that was killed goes on from its newest state.

use std::{cell::RefCell, collections::BTreeMap};

use attar_formats::Checkpoint;
use attar_ir::{BlockState, ModelContext, ModelEntry, Train, Weight, plan::ModelStep};
use attar_model::Decoder;
use attar_tensor::{
    DType, QuantizedLinear, SourceError, Tensor, TensorHeader, TensorSource, TensorView,
};
use serde_json::json;

use super::{
    reshape::Around,
    train::{self, Job},
};
use crate::{Error, trace::Trace};

/// The tensors of the blocks as they stand, where they are not those of the checkpoint.
struct Compressed<'a> {
    checkpoint: &'a Checkpoint,
    own: BTreeMap<String, Tensor>,
}

impl TensorSource for Compressed<'_> {
    fn headers(&self) -> &[TensorHeader] {
        self.checkpoint.headers()
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        self.own.get(name).map_or_else(|| self.checkpoint.read(name), |own| Ok(own.view()))
    }

    fn read_row(&self, name: &str, row: usize) -> Result<TensorView<'_>, SourceError> {
        self.checkpoint.read_row(name, row)
    }

    fn release(&self, name: &str) {
        if !self.own.contains_key(name) {
            self.checkpoint.release(name);
        }
    }
}

impl<'a> Compressed<'a> {
    fn of(
        checkpoint: &'a Checkpoint,
        decoder: &Decoder,
        states: &[BlockState],
    ) -> Result<Self, Error> {
        let mut own = BTreeMap::new();
        for (block, state) in decoder.graph.all_blocks().zip(states) {
            let mut put = |name: String, shape: Vec<usize>, values: &[f32]| -> Result<(), Error> {
                own.insert(name, Tensor::from_f32(DType::F32, shape, values)?);
                Ok(())
            };
            for (at, (site, linear)) in block.sites.iter().zip(&state.linears).enumerate() {
                if let (true, Weight::Dense(weight)) = (state.weight_changed[at], &linear.weight) {
                    let values = weight.as_slice().ok_or("weights are in standard layout")?;
                    put(decoder.weight_tensor(site), vec![weight.nrows(), weight.ncols()], values)?;
                }
                if let (true, Some(bias)) = (state.bias_changed[at], &linear.bias) {
                    put(format!("{}.bias", site.name), vec![bias.len()], bias)?;
                }
            }
            for (at, (norm, values)) in block.norms.iter().zip(&state.norms).enumerate() {
                if state.norm_changed[at] {
                    put(norm.tensor.clone(), vec![values.len()], values)?;
                }
            }
        }
        Ok(Self { checkpoint, own })
    }
}

/// The linears that have codes, by the names of their weights.
fn quantized<'a>(
    decoder: &'a Decoder,
    states: &'a mut [BlockState],
) -> BTreeMap<String, &'a mut QuantizedLinear> {
    let mut all = BTreeMap::new();
    for (block, state) in decoder.graph.blocks.iter().zip(states) {
        for (site, linear) in block.sites.iter().zip(&mut state.linears) {
            if let Weight::Quantized(codes) = &mut linear.weight {
                all.insert(format!("{}.weight", site.name), codes);
            }
        }
    }
    all
}

/// Trains (or finds) the scales and gives them to the blocks.
pub(super) fn run(
    step: &ModelStep,
    train: &dyn Train,
    (source, checkpoint, decoder): (&Checkpoint, &Checkpoint, &Decoder),
    states: &mut [BlockState],
    (key, around): (&str, &Around<'_>),
    trace: &Trace,
) -> Result<ModelEntry, Error> {
    let stage = around.stage;
    if stage.open_object(key)?.is_none() {
        let student = Compressed::of(checkpoint, decoder, states)?;
        let codes = quantized(decoder, states);
        let slopes = attar_ir::Slopes::new();
        let learned = RefCell::new(BTreeMap::new());
        let job = Job {
            step,
            around,
            source,
            context: ModelContext { graph: &decoder.graph, seed: around.seed, slopes: &slopes },
            student: (checkpoint.config(), &student),
            codes: &|name| codes.get(name).map(|codes| (**codes).clone()),
            write: &|name, scales| {
                learned.borrow_mut().insert(name.to_owned(), scales.to_vec());
                Ok(())
            },
        };
        let entry = ModelEntry { what: "scales".into(), ..job.train(train, key, trace)? };
        let learned = learned.into_inner();
        let header = |(name, scales): (&String, &Vec<f32>)| TensorHeader {
            name: name.clone(),
            dtype: DType::F32,
            shape: vec![scales.len()],
        };
        let headers = learned.iter().map(header).collect();
        let facts = json!({"entry": entry});
        stage.put_with(key, "scales", &step.label, facts, headers, |writer| {
            for (name, scales) in &learned {
                let bytes = bytemuck::cast_slice(scales);
                let view = TensorView::new(DType::F32, vec![scales.len()], bytes)
                    .map_err(|error| error.to_string())?;
                writer.write_view(name, &view).map_err(|error| error.to_string())?;
            }
            Ok(())
        })?;
        train::forget(stage, key)?;
    }
    let gone = || format!("{}: object {key} has just gone; run again", stage.root().display());
    let (info, file) = stage.open_object(key)?.ok_or_else(gone)?;
    for (name, codes) in quantized(decoder, states) {
        let scales = file.view(&name).ok_or_else(gone)?.to_f32()?;
        if scales.len() != codes.scales.len() {
            return Err(gone().into());
        }
        codes.scales = scales;
    }
    let mut entry: ModelEntry = serde_json::from_value(info.facts["entry"].clone())?;
    entry.step.clone_from(&step.of_chain);
    Ok(entry)
}
