//! `pytorch_model.bin`: the state dict that `torch.save` writes, a ZIP archive of one pickle and one file
//! of raw bytes per storage. The pickle is read by a machine that executes nothing: it knows the opcodes
//! and the names that a state dict of tensors needs (see [`pickle`]) and refuses every other by name. The
//! storages are mapped, not copied.
//!
//! Archive: `<prefix>/data.pkl`, `<prefix>/byteorder` (absent or `little`), `<prefix>/data/<key>` for each
//! storage; entries stored, not compressed (PyTorch, `caffe2/serialize/inline_container.cc` and
//! `torch/serialization.py`). The format before PyTorch 1.6 (a bare sequence of pickles) is refused with
//! the command that converts it.

pub mod pickle;
mod zip;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use attar_tensor::{DType, TensorHeader, TensorView};

use crate::{FormatError, brief, mmap::Map, safetensors::Placed};
use pickle::{Element, StateTensor};

/// A tensor found in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Header and bytes in the file; for a strided tensor the bytes from its first element to its last.
    pub placed: Placed,
    /// Elements between neighbours of each dimension, when the tensor is not contiguous.
    pub strides: Option<Vec<usize>>,
}

/// Why a file is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong.
    pub reason: String,
    /// A sound state dict in a form that is not read here; [`convert_command`] reads it.
    pub convertible: bool,
}

impl Refusal {
    fn convertible(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), convertible: true }
    }
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self { reason, convertible: false }
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

/// The tensors of a `torch.save` archive whose bytes are `file`, sorted by name. Memory taken: at most
/// 128 bytes for each byte of the archive's directory and pickle plus 64 KiB, whatever the numbers in
/// them say; the pickle has at most [`pickle::MAX_PICKLE`] bytes. Storages are not touched.
///
/// # Errors
/// Archives that are damaged, compressed, big-endian or no state dict; pickles that call for anything but
/// tensors; storages that are missing or of another size; tensors that reach beyond their storage or
/// overlap themselves.
pub fn parse(file: &[u8]) -> Result<Vec<Stored>, Refusal> {
    // PROTO 2, LONG1 of ten bytes: the magic number of the format before 1.6. `ustar` is older still.
    if file.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")
        || file.get(257..262) == Some(b"ustar")
    {
        return Err(Refusal::convertible("is in the format of torch.save before PyTorch 1.6"));
    }
    let archive = zip::Archive::read(file)?;
    if let Some(name) = archive.packed() {
        return Err(Refusal::convertible(format!("holds {} compressed or encrypted", brief(name))));
    }
    let prefix = {
        let mut found = archive
            .names()
            .filter_map(|n| n.strip_suffix("/data.pkl"))
            .filter(|p| !p.contains('/'));
        let first = found.next().ok_or("holds no data.pkl, so torch.save did not write it")?;
        if found.next().is_some() {
            return Err("holds more than one data.pkl".into());
        }
        first
    };
    if archive.names().any(|name| {
        name.strip_prefix(prefix).is_some_and(|n| n == "/constants.pkl" || n.starts_with("/code/"))
    }) {
        return Err("is a TorchScript archive, which holds code; only state dicts are read".into());
    }
    if let Some(order) = archive.get(&format!("{prefix}/byteorder"))?
        && order.1 != b"little"
    {
        return Err(Refusal::convertible("holds big-endian numbers"));
    }
    let (_, pickled) =
        archive.get(&format!("{prefix}/data.pkl"))?.expect("its name was just found");
    let tensors = pickle::state_dict(pickled)?;
    let mut out = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let wrong = |what: &str| format!("tensor {}: {what}", brief(tensor.name));
        let entry = format!("{prefix}/data/{}", tensor.key);
        let (start, bytes) =
            archive.get(&entry).map_err(|what| wrong(&what))?.ok_or_else(|| {
                wrong(&format!("its storage {} is missing from the archive", brief(&entry)))
            })?;
        let placed = place(&tensor, start, bytes.len());
        out.push(placed.map_err(|refusal| Refusal { reason: wrong(&refusal.reason), ..refusal })?);
    }
    Ok(out)
}

/// Checks a tensor against its storage of `length` bytes at `start` of the file.
fn place(tensor: &StateTensor<'_>, start: usize, length: usize) -> Result<Stored, Refusal> {
    let StateTensor { dtype, storage, elements, offset, ref shape, ref strides, .. } = *tensor;
    let unit = if storage == Element::Bytes { 1 } else { dtype.size() };
    if elements.checked_mul(unit) != Some(length) {
        let reason = format!("its storage has {length} bytes, but {elements} elements are claimed");
        return Err(reason.into());
    }
    let capacity = length / dtype.size();
    let size = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let size = size.filter(|&size| size <= capacity).ok_or_else(|| {
        let reason =
            format!("shape {shape:?} holds more than the {capacity} elements of its storage");
        // A tensor that was expanded has neighbours at the same place.
        Refusal { reason, convertible: strides.contains(&0) }
    })?;
    // One past the last element, counted in elements from the storage's first.
    let mut end = if size == 0 { Some(0) } else { offset.checked_add(1) };
    if size > 0 {
        for (&dim, &stride) in shape.iter().zip(strides) {
            let reach = (dim - 1).checked_mul(stride);
            end = end.and_then(|end| end.checked_add(reach?));
        }
    }
    let end = end.filter(|&end| end <= capacity).ok_or_else(|| {
        format!(
            "offset {offset}, shape {shape:?} and strides {strides:?} reach beyond the {capacity} elements of its storage"
        )
    })?;
    let mut dense = 1;
    let contiguous = size == 0
        || shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
            let fits = dim == 1 || stride == dense;
            dense *= dim;
            fits
        });
    let begin = if size == 0 { 0 } else { offset };
    let header = TensorHeader { name: tensor.name.to_owned(), dtype, shape: shape.clone() };
    let placed = Placed {
        header,
        start: start + begin * dtype.size(),
        length: (end - begin) * dtype.size(),
    };
    Ok(Stored { placed, strides: (!contiguous).then(|| strides.clone()) })
}

/// The command that writes `model.safetensors` beside the `pytorch_model*.bin` of a folder. Python's
/// `weights_only` refuses what could execute code.
pub fn convert_command(folder: &Path) -> String {
    let folder = folder.display().to_string().replace('\'', "'\\''");
    format!(
        "python3 -c \"import glob, sys, torch; from safetensors.torch import save_file; d = sys.argv[1]; w = {{}}; \
         [w.update(torch.load(f, map_location='cpu', weights_only=True)) for f in sorted(glob.glob(glob.escape(d) + '/pytorch_model*.bin'))]; \
         save_file({{k: v.clone().contiguous() for k, v in w.items()}}, d + '/model.safetensors', metadata={{'format': 'pt'}})\" '{folder}'"
    )
}

/// One mapped file.
#[derive(Debug)]
pub struct PytorchFile {
    path: PathBuf,
    map: Map,
    tensors: Vec<Stored>,
}

impl PytorchFile {
    /// Maps and checks a file; memory as [`parse`].
    ///
    /// # Errors
    /// As [`parse`], with the command that converts the file when that helps, and when it is no regular file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let map = Map::open(&crate::open_regular(path)?).map_err(FormatError::io(path))?;
        let tensors = parse(map.bytes()).map_err(|Refusal { reason, convertible }| {
            let remedy = if convertible {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                let command = convert_command(folder.unwrap_or(Path::new(".")));
                format!("convert it to safetensors: {command}")
            } else {
                "download it again or ask its publisher for safetensors files".into()
            };
            FormatError::invalid(path, format!("{reason}; {remedy}"))
        })?;
        Ok(Self { path: path.to_path_buf(), map, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Headers, sorted by name.
    pub fn headers(&self) -> impl Iterator<Item = &TensorHeader> {
        self.tensors.iter().map(|tensor| &tensor.placed.header)
    }

    fn find(&self, name: &str) -> Option<&Stored> {
        let name_of = |t: &Stored| t.placed.header.name.as_str().cmp(name);
        Some(&self.tensors[self.tensors.binary_search_by(name_of).ok()?])
    }

    /// The data of one tensor: mapped, or copied when the tensor is strided.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let Stored { placed: Placed { header, start, length }, strides } = self.find(name)?;
        let bytes = &self.map.bytes()[*start..start + length];
        let bytes = match strides {
            None => Cow::Borrowed(bytes),
            Some(strides) => Cow::Owned(gather(bytes, &header.shape, strides, header.dtype)),
        };
        TensorView::new(header.dtype, header.shape.clone(), bytes).ok()
    }

    /// Asks the system to read the tensor ahead.
    pub fn prefetch(&self, name: &str) {
        if let Some(Stored { placed, .. }) = self.find(name) {
            self.map.prefetch(placed.start, placed.length);
        }
    }

    /// Gives the tensor's mapped pages back.
    pub fn release(&self, name: &str) {
        if let Some(Stored { placed, .. }) = self.find(name) {
            self.map.release(placed.start, placed.length);
        }
    }
}

/// The elements of a strided tensor in row-major order. `bytes` begin with its first element.
fn gather(bytes: &[u8], shape: &[usize], strides: &[usize], dtype: DType) -> Vec<u8> {
    let (size, count) = (dtype.size(), shape.iter().product::<usize>());
    let mut out = Vec::with_capacity(count * size);
    let mut index = vec![0usize; shape.len()];
    for _ in 0..count {
        let at = index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>() * size;
        out.extend_from_slice(&bytes[at..at + size]);
        for (i, &dim) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < dim {
                break;
            }
            *i = 0;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/pytorch");

    fn golden(name: &str) -> PathBuf {
        Path::new(GOLDEN).join(name)
    }

    #[test]
    fn every_tensor_of_torch_reads_as_its_safetensors_twin() {
        let twin = crate::safetensors::SafetensorsFile::open(&golden("state.safetensors")).unwrap();
        for name in ["state.bin", "state_protocol4.bin"] {
            let file = PytorchFile::open(&golden(name)).unwrap();
            assert_eq!(
                file.headers().collect::<Vec<_>>(),
                twin.headers().collect::<Vec<_>>(),
                "{name}"
            );
            for header in twin.headers() {
                let (a, b) = (file.view(&header.name).unwrap(), twin.view(&header.name).unwrap());
                assert!(a == b, "{name}: {}", header.name);
                file.release(&header.name);
            }
            let strided = file.tensors.iter().filter(|t| t.strides.is_some()).count();
            assert_eq!(strided, 2, "a transpose and a slice are not contiguous");
        }
    }

    #[test]
    fn what_is_not_a_plain_state_dict_is_refused_with_the_command() {
        for (name, expected, convertible) in [
            ("legacy.bin", "before PyTorch 1.6", true),
            ("expanded.bin", "tensor wide: shape [1000, 4] holds more than the 4 elements", true),
            ("compressed.bin", "compressed", true),
            ("module.bin", "torch.nn.modules.linear.Linear", false),
            ("system.bin", "posix.system", false),
            ("nested.bin", "`model` holds a dict", false),
            ("number.bin", "`step` holds a number", false),
        ] {
            let error = PytorchFile::open(&golden(name)).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
            assert_eq!(error.contains("python3 -c"), convertible, "{name}: {error}");
        }
        let command = convert_command(Path::new("it's $HOME"));
        assert!(command.ends_with(r" 'it'\''s $HOME'"), "{command}");
    }

    #[test]
    fn no_damaged_byte_panics_or_reads_outside() {
        let good = std::fs::read(golden("state.bin")).unwrap();
        for cut in 0..good.len() {
            let _ = parse(&good[..cut]);
        }
        for at in 0..good.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= change;
                for Stored { placed, .. } in parse(&bad).unwrap_or_default() {
                    assert!(placed.start + placed.length <= bad.len());
                }
            }
        }
    }
}
