//! An opened checkpoint or artifact whose linears multiply: packed ones through their kernel, dense ones
//! in f32.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, PoisonError},
};

use attar_formats::{Checkpoint, quant_config};
use attar_ir::Site;
use attar_kernels::cpu::dense::Dense;
use attar_kernels::layout::suffixes_of;
use attar_kernels::{Activations, Prepared};
use attar_model::{Decoder, LinearOp, ModelError, WeightSource};
use attar_tensor::{LayoutId, PackedLinear, TensorSource};
use serde::Serialize;

use crate::Error;

/// A model on disk.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) decoder: Decoder,
    /// What its kernels do to activations where the scheme says nothing of them.
    pub(crate) activations: Activations,
    /// Whether weights whose scheme rounds activations (W8A8) are multiplied with activations as they come.
    pub(crate) weights_only: bool,
    /// Whether dense weights stay in memory in the type of their file, to be read at its speed; otherwise
    /// they become f32.
    pub(crate) resident: bool,
    /// Kernels taken so far, with the linears and the bytes of each.
    kernels: Mutex<BTreeMap<&'static str, Taken>>,
    quant: Option<quant_config::Parsed>,
    /// A GGUF file whose weights in blocks read as numbers: for the embedding.
    dense: Option<Checkpoint>,
}

/// What a kernel was taken for.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(crate) struct Taken {
    pub(crate) linears: usize,
    /// In memory; a token reads all of them.
    pub(crate) bytes: usize,
}

impl Opened {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let checkpoint = Checkpoint::open(path)?;
        let quant = quant_config::parse(checkpoint.config())
            .map_err(|error| format!("{}: {error}", path.display()))?;
        checkpoint.check_readable()?;
        let dense = match checkpoint.gguf() {
            Some(_) => Some(Checkpoint::open_dense(checkpoint.place(), crate::gguf::dequantize)?),
            None => None,
        };
        let is_quantized = |name: &str| {
            quant
                .as_ref()
                .is_some_and(|q| checkpoint.header(&format!("{name}{}", q.marker())).is_some())
        };
        let numbers = dense.as_ref().unwrap_or(&checkpoint);
        let decoder = Decoder::read_with(checkpoint.config(), numbers, &is_quantized)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self {
            checkpoint,
            decoder,
            activations: Activations::F32,
            weights_only: false,
            resident: false,
            kernels: Mutex::default(),
            quant,
            dense,
        })
    }

    /// Name of the layout, when anything is quantized: the most frequent block type for a GGUF file.
    pub(crate) fn layout(&self) -> Option<&'static str> {
        if let Some(gguf) = self.checkpoint.gguf() {
            let mut linears = std::collections::BTreeMap::new();
            for site in self.decoder.graph.all_blocks().flat_map(|block| &block.sites) {
                if let Some(block) = self.scheme_of(site).and_then(attar_tensor::QuantScheme::block)
                {
                    *linears.entry(block).or_insert(0usize) += 1;
                }
            }
            let most = linears.into_iter().max_by_key(|(_, count)| *count).map(|(block, _)| block);
            let any = || gguf.block_types().first().map(|(block, _)| *block);
            return most.or_else(any).map(attar_tensor::BlockType::name);
        }
        self.quant.as_ref().map(|quant| quant.layout)
    }

    /// Every tensor in numbers.
    pub(crate) fn numbers(&self) -> &Checkpoint {
        self.dense.as_ref().unwrap_or(&self.checkpoint)
    }

    /// Suffixes of the packed parts of a site.
    fn suffixes(&self, site: &str) -> Vec<&'static str> {
        suffixes_of(|suffix| self.checkpoint.header(&format!("{site}.{suffix}")).is_some())
    }

    /// Uses `asked`, or what the schemes say, and `otherwise` where they say nothing.
    pub(crate) fn set_activations(&mut self, asked: Option<Activations>, otherwise: Activations) {
        self.activations = asked.unwrap_or(otherwise);
        self.weights_only = asked == Some(Activations::F32);
    }

    /// Names and bytes of the tensors that hold a site's weight.
    pub(crate) fn weight_tensors(&self, site: &Site) -> Vec<(String, usize)> {
        let dense = self.decoder.weight_tensor(site);
        let packed: Vec<_> = self
            .suffixes(&site.name)
            .iter()
            .map(|part| format!("{}.{part}", site.name))
            .filter_map(|name| self.checkpoint.header(&name).map(|h| (name, h.bytes())))
            .collect();
        if packed.is_empty() {
            self.checkpoint.header(&dense).map(|h| (dense, h.bytes())).into_iter().collect()
        } else {
            packed
        }
    }

    /// The scheme of a site's packed weight; `None` when it is dense.
    pub(crate) fn scheme_of(&self, site: &Site) -> Option<attar_tensor::QuantScheme> {
        let quant = self.quant.as_ref()?;
        self.checkpoint.header(&format!("{}{}", site.name, quant.marker()))?;
        quant.scheme_of(&site.name)
    }

    /// The type of a weight in blocks, linear or not, by its name without `.weight`.
    pub(crate) fn block_of(&self, stem: &str) -> Option<attar_tensor::BlockType> {
        self.checkpoint.header(&format!("{stem}.blocks"))?;
        self.quant.as_ref()?.scheme_of(stem)?.block()
    }

    /// Whether `quantization_config` calls a site quantized; `None` when there is no such config.
    pub(crate) fn declared(&self, site: &Site) -> Option<bool> {
        self.quant.as_ref().map(|quant| quant.scheme_of(&site.name).is_some())
    }

    /// The packed linear of a site; `None` when it is dense.
    pub(crate) fn packed(&self, site: &Site) -> Result<Option<PackedLinear>, Error> {
        let Some(quant) = &self.quant else { return Ok(None) };
        if self.checkpoint.header(&format!("{}{}", site.name, quant.marker())).is_none() {
            return Ok(None);
        }
        let scheme = quant.scheme_of(&site.name).ok_or_else(|| {
            format!("{}: packed, but quantization_config has no scheme for it", site.name)
        })?;
        let mut parts = Vec::new();
        for part in self.suffixes(&site.name) {
            let name = format!("{}.{part}", site.name);
            parts.push((part, self.checkpoint.read(&name)?.to_tensor()));
            self.checkpoint.release(&name);
        }
        Ok(Some(PackedLinear {
            layout: LayoutId(quant.layout_of(scheme)),
            scheme,
            out_features: site.out_features,
            in_features: site.in_features,
            parts,
        }))
    }

    fn took(&self, kernel: &'static str, bytes: usize) {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = kernels.entry(kernel).or_default();
        taken.linears += 1;
        taken.bytes += bytes;
    }

    /// Kernels taken so far.
    pub(crate) fn taken(&self) -> BTreeMap<&'static str, Taken> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bits per weight over the linears of the decoder blocks (and the head when it is quantized), all
    /// parts counted.
    pub(crate) fn bits_per_weight(&self) -> f64 {
        let (mut bytes, mut weights) = (0usize, 0usize);
        for block in self.decoder.graph.all_blocks() {
            for site in &block.sites {
                let parts = self.weight_tensors(site);
                let head = block.attention.is_none();
                if head && parts.iter().all(|(name, _)| name.ends_with(".weight")) {
                    continue;
                }
                bytes += parts.iter().map(|(_, bytes)| bytes).sum::<usize>();
                weights += site.weights();
            }
        }
        8.0 * bytes as f64 / weights.max(1) as f64
    }
}

struct Kernel(Box<dyn Prepared>);

impl LinearOp for Kernel {
    fn matmul(&self, x: &[f32], m: usize, out: &mut [f32]) {
        self.0.matmul(x, m, out);
    }
}

impl WeightSource for Opened {
    fn tensors(&self) -> &dyn TensorSource {
        self.numbers()
    }

    fn linear(&self, decoder: &Decoder, site: &Site) -> Result<Box<dyn LinearOp>, ModelError> {
        let fail = |reason: String| ModelError::Tensor { name: site.name.clone(), reason };
        match self.packed(site).map_err(|error| fail(error.to_string()))? {
            Some(packed) => {
                let activations = match Activations::of(packed.scheme.activations) {
                    Activations::F32 => self.activations,
                    _ if self.weights_only => Activations::F32,
                    said => said,
                };
                let (name, kernel) = attar_kernels::select_kernel(&packed, activations)
                    .map_err(|error| fail(error.to_string()))?;
                self.took(name, kernel.resident_bytes());
                Ok(Box::new(Kernel(kernel)))
            }
            None if self.resident => {
                let name = decoder.weight_tensor(site);
                let view = self.numbers().read(&name)?;
                if let Ok(Some((at, value))) = crate::verify::non_finite(&view) {
                    return Err(ModelError::Tensor {
                        name,
                        reason: format!(
                            "holds {value} at flat index {at}; the checkpoint is damaged, download or \
                             export it again"
                        ),
                    });
                }
                let dense = Dense::new(&view).ok_or_else(|| {
                    fail(format!("has dtype {}, no float that a kernel reads", view.dtype()))
                })?;
                self.numbers().release(&name);
                self.took(dense.name(), dense.resident_bytes());
                Ok(Box::new(Kernel(Box::new(dense))))
            }
            None => self.numbers().linear(decoder, site),
        }
    }
}
