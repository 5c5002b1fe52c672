//! An opened checkpoint or artifact whose linears multiply: packed ones through their kernel, dense ones
//! in f32.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Mutex, PoisonError},
};

use attar_formats::{
    Checkpoint,
    adapter::{Adapter, Correction},
    quant_config,
};
use attar_ir::{Site, plan::Leaf};
use attar_kernels::cpu::dense::Dense;
use attar_kernels::layout::suffixes_of;
use attar_kernels::{Activations, Prepared};
use attar_model::{Decoder, LinearOp, LowRankOp, ModelError, WeightSource};
use attar_tensor::{LayoutId, Mat, PackedLinear, TensorHeader, TensorSource, TensorView};
use serde::Serialize;
use serde_json::Value;

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
    /// The two linears of each site that is factored.
    factors: BTreeMap<String, [Site; 2]>,
    adapter: Option<Adapter>,
    /// A GGUF file whose weights in blocks read as numbers: for the embedding.
    dense: Option<Checkpoint>,
}

/// What a kernel was taken for.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(crate) struct Taken {
    pub(crate) linears: usize,
    /// Those of them whose zeros are left away.
    pub(crate) without_zeros: usize,
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
        let ranks = ranks(checkpoint.config())?;
        let apart = |name: &str| is_quantized(name) || ranks.contains_key(name);
        let decoder = Decoder::read_with(checkpoint.config(), numbers, &apart)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let adapter = match checkpoint.gguf() {
            None => Adapter::open(path)?,
            Some(_) => None,
        };
        let factors = factors(&decoder, &ranks, numbers, &is_quantized)
            .and_then(|factors| check_adapter(adapter.as_ref(), &decoder).map(|()| factors))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self {
            checkpoint,
            decoder,
            activations: Activations::F32,
            weights_only: false,
            resident: false,
            kernels: Mutex::default(),
            quant,
            factors,
            adapter,
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

    /// The linears that the files hold of a site: itself, or its two factors.
    pub(crate) fn leaves<'a>(&'a self, site: &'a Site) -> impl Iterator<Item = &'a Site> {
        let factors = self.factors.get(&site.name).map(<[Site; 2]>::as_slice);
        factors.unwrap_or(std::slice::from_ref(site)).iter()
    }

    /// Every linear that the files hold.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Site> {
        let sites = self.decoder.graph.all_blocks().flat_map(|block| &block.sites);
        sites.flat_map(|site| self.leaves(site))
    }

    /// Names of the sites that are factored.
    pub(crate) fn factored(&self) -> impl Iterator<Item = &str> {
        self.factors.keys().map(String::as_str)
    }

    /// The rank of a site's factors.
    pub(crate) fn rank(&self, site: &str) -> Option<usize> {
        self.factors.get(site).map(|[down, _]| down.out_features)
    }

    /// The adapter beside the checkpoint.
    pub(crate) const fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// Names of the sites that the adapter corrects.
    pub(crate) fn corrected(&self) -> Vec<String> {
        let mut sites: Vec<String> =
            self.adapter.iter().flat_map(Adapter::sites).map(str::to_owned).collect();
        sites.sort();
        sites.dedup();
        sites
    }

    /// The correction of a site.
    pub(crate) fn correction(&self, site: &Site) -> Result<Option<Correction<'_>>, Error> {
        let Some(adapter) = &self.adapter else { return Ok(None) };
        Ok(adapter.correction(&site.name, (site.out_features, site.in_features))?)
    }

    /// Headers of the checkpoint's tensors, then of the adapter's.
    pub(crate) fn headers(&self) -> Vec<TensorHeader> {
        let adapter = self.adapter.iter().flat_map(Adapter::headers);
        self.checkpoint.headers().iter().chain(adapter).cloned().collect()
    }

    /// Bytes of the weight files, the adapter's among them.
    pub(crate) fn file_bytes(&self) -> Result<u64, Error> {
        let adapter = self.adapter.as_ref().map_or(Ok(0), Adapter::file_bytes)?;
        Ok(self.checkpoint.file_bytes()? + adapter)
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
        let mut tensors: Vec<_> =
            self.leaves(site).flat_map(|linear| self.linear_tensors(linear)).collect();
        for leaf in [Leaf::CorrectionDown, Leaf::CorrectionUp] {
            let name = leaf.name(&site.name, "weight");
            let headers = self.adapter.iter().flat_map(Adapter::headers);
            tensors.extend(headers.filter(|h| h.name == name).map(|h| (h.name.clone(), h.bytes())));
        }
        tensors
    }

    fn linear_tensors(&self, site: &Site) -> Vec<(String, usize)> {
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

    fn took(&self, kernel: &'static str, without_zeros: bool, bytes: usize) {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = kernels.entry(kernel).or_default();
        taken.linears += 1;
        taken.without_zeros += usize::from(without_zeros);
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
        let fail = |error: Error| ModelError::Tensor {
            name: site.name.clone(),
            reason: error.to_string(),
        };
        let whole = match self.factors.get(&site.name) {
            Some([down, up]) => Box::new(LowRankOp {
                base: None,
                rank: down.out_features,
                down: self.one(decoder, down)?,
                up: self.one(decoder, up)?,
                scale: 1.0,
            }),
            None => self.one(decoder, site)?,
        };
        let Some(Correction { down, up, scale }) = self.correction(site).map_err(fail)? else {
            return Ok(whole);
        };
        let rank = down.shape()[0];
        let thin = |view| self.dense(&format!("the correction of {}", site.name), &view);
        let (down, up) = (thin(down)?, thin(up)?);
        Ok(Box::new(LowRankOp { base: Some(whole), down, up, rank, scale }))
    }
}

/// Ranks of the linears that a config.json calls factored.
fn ranks(config: &Value) -> Result<BTreeMap<String, usize>, Error> {
    let Some(table) = config.get("low_rank") else { return Ok(BTreeMap::new()) };
    let table =
        table.as_object().ok_or("config.json: low_rank is no table of linears and ranks")?;
    let mut ranks = BTreeMap::new();
    for (site, rank) in table {
        let rank = rank.as_u64().filter(|rank| (1..1 << 24).contains(rank));
        let rank = rank.ok_or("config.json: low_rank holds something that is no rank")?;
        ranks.insert(site.clone(), rank as usize);
    }
    Ok(ranks)
}

/// The two linears of each factored site, their dense tensors held to the ranks.
fn factors(
    decoder: &Decoder,
    ranks: &BTreeMap<String, usize>,
    tensors: &Checkpoint,
    is_quantized: &dyn Fn(&str) -> bool,
) -> Result<BTreeMap<String, [Site; 2]>, Error> {
    let mut found = BTreeMap::new();
    let mut unknown: BTreeSet<&str> = ranks.keys().map(String::as_str).collect();
    for site in decoder.graph.blocks.iter().flat_map(|block| &block.sites) {
        let Some(&rank) = ranks.get(&site.name) else { continue };
        unknown.remove(site.name.as_str());
        let mut two = site.factors(rank);
        for linear in two.iter_mut().filter(|linear| !is_quantized(&linear.name)) {
            let name = format!("{}.weight", linear.name);
            let want = [linear.out_features, linear.in_features];
            let header = tensors.header(&name);
            let header = header.ok_or_else(|| {
                format!("tensor {name} is missing, but config.json calls {} factored", site.name)
            })?;
            if header.shape != want {
                let have = &header.shape;
                return Err(format!(
                    "tensor {name} has shape {have:?}, but config.json calls for {want:?}"
                )
                .into());
            }
            linear.dtype = header.dtype;
        }
        found.insert(site.name.clone(), two);
    }
    match unknown.first() {
        None => Ok(found),
        Some(name) => {
            let name: String = name.chars().take(80).collect();
            Err(format!("config.json: low_rank names {name:?}, which is no linear of a block")
                .into())
        }
    }
}

/// That an adapter corrects linears of this model, with factors that fit.
fn check_adapter(adapter: Option<&Adapter>, decoder: &Decoder) -> Result<(), Error> {
    let Some(adapter) = adapter else { return Ok(()) };
    let sites = || decoder.graph.all_blocks().flat_map(|block| &block.sites);
    for name in adapter.sites() {
        let site = sites().find(|site| site.name == name);
        let site = site.ok_or_else(|| {
            let name: String = name.chars().take(80).collect();
            format!("the adapter corrects {name:?}, which is no linear of this model")
        })?;
        adapter.correction(name, (site.out_features, site.in_features))?;
    }
    Ok(())
}

impl Opened {
    /// A dense weight in the type of its file or in f32.
    fn dense(&self, name: &str, view: &TensorView<'_>) -> Result<Box<dyn LinearOp>, ModelError> {
        let fail = |reason: String| ModelError::Tensor { name: name.to_owned(), reason };
        if let Ok(Some((at, value))) = crate::verify::non_finite(view) {
            return Err(fail(format!(
                "holds {value} at flat index {at}; the checkpoint is damaged, download or export it again"
            )));
        }
        if !self.resident {
            let shape = (view.shape()[0], view.shape()[1]);
            let values = view.to_f32().map_err(|error| fail(error.to_string()))?;
            let values = Mat::from_shape_vec(shape, values).map_err(|e| fail(e.to_string()))?;
            return Ok(Box::new(values));
        }
        let dense = Dense::new(view).ok_or_else(|| {
            fail(format!("has dtype {}, no float that a kernel reads", view.dtype()))
        })?;
        self.took(dense.name(), false, dense.resident_bytes());
        Ok(Box::new(Kernel(Box::new(dense))))
    }

    /// One linear of the files.
    fn one(&self, decoder: &Decoder, site: &Site) -> Result<Box<dyn LinearOp>, ModelError> {
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
                self.took(name, kernel.without_zeros(), kernel.resident_bytes());
                Ok(Box::new(Kernel(kernel)))
            }
            None if self.resident => {
                let name = decoder.weight_tensor(site);
                let view = self.numbers().read(&name)?;
                let dense = self.dense(&name, &view)?;
                self.numbers().release(&name);
                Ok(dense)
            }
            None => self.numbers().linear(decoder, site),
        }
    }
}
