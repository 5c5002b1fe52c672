//! A Hugging Face model directory: config.json, one or many weight files with an index, and whatever lies
//! beside them. Weights are safetensors or, when there are none, PyTorch state dicts (see
//! [`crate::pytorch`]).
//!
//! Nothing outside of the directory is reached by a name in a file: an index names files of the directory
//! itself. The directory's own files may be links to regular files, as in the Hugging Face cache.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use attar_tensor::{SourceError, TensorHeader, TensorSource, TensorView};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, Visitor},
};
use serde_json::Value;

use crate::{
    FormatError, Tokenizer, brief,
    gguf::{Gguf, source::Dequantize},
    hash_file,
    pytorch::{PytorchFile, convert_command},
    read_bounded, read_json,
    safetensors::SafetensorsFile,
};

/// An opened checkpoint or artifact.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Value,
    files: Vec<WeightFile>,
    headers: Vec<TensorHeader>,
    /// File of each header.
    owner: Vec<usize>,
}

/// One file of weights.
#[derive(Debug)]
enum WeightFile {
    Safetensors(SafetensorsFile),
    Pytorch(PytorchFile),
    Gguf(Box<Gguf>),
}

impl WeightFile {
    fn open(path: &Path) -> Result<Self, FormatError> {
        if path.extension().is_some_and(|end| end == "bin") {
            PytorchFile::open(path).map(Self::Pytorch)
        } else {
            SafetensorsFile::open(path).map(Self::Safetensors)
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pytorch(file) => file.path(),
            Self::Gguf(file) => file.file().path(),
        }
    }

    fn headers(&self) -> Vec<TensorHeader> {
        match self {
            Self::Safetensors(file) => file.headers().cloned().collect(),
            Self::Pytorch(file) => file.headers().cloned().collect(),
            Self::Gguf(file) => file.headers().cloned().collect(),
        }
    }

    fn view(&self, name: &str) -> Option<TensorView<'_>> {
        match self {
            Self::Safetensors(file) => file.view(name),
            Self::Pytorch(file) => file.view(name),
            Self::Gguf(file) => file.view(name),
        }
    }

    fn prefetch(&self, name: &str) {
        match self {
            Self::Safetensors(file) => file.prefetch(name),
            Self::Pytorch(file) => file.prefetch(name),
            Self::Gguf(file) => file.prefetch(name),
        }
    }

    fn release(&self, name: &str) {
        match self {
            Self::Safetensors(file) => file.release(name),
            Self::Pytorch(file) => file.release(name),
            Self::Gguf(file) => file.release(name),
        }
    }
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";
const PYTORCH_SINGLE: &str = "pytorch_model.bin";
/// Largest index that is read, bytes: as large as a safetensors header may be.
const MAX_INDEX: u64 = 100_000_000;

/// The weight map of an index: which file of its directory holds which tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// Names of the files, sorted.
    pub files: Vec<String>,
    /// Tensor and its file's place in `files`.
    pub tensors: BTreeMap<String, usize>,
}

/// Whether an index may name this file: a plain name of a weight file, no path.
fn is_weight_file(name: &str) -> bool {
    !name.contains(['/', '\\', ':', '\0'])
        && [".safetensors", ".bin"]
            .iter()
            .any(|end| name.strip_suffix(end).is_some_and(|stem| !stem.is_empty()))
}

impl Index {
    /// Reads `*.index.json`. Memory taken: at most 64 bytes for each byte of the text plus 4 KiB; keys other
    /// than `weight_map` are skipped, not kept.
    ///
    /// # Errors
    /// When the text is no JSON, has no `weight_map`, names a tensor twice, or names a file by a path:
    /// absolute, with `..`, with any separator, or with an ending that no weight file has.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct File {
            weight_map: Option<Places>,
        }
        #[derive(Default)]
        struct Places {
            files: BTreeMap<String, usize>,
            tensors: BTreeMap<String, usize>,
        }
        /// Turns a file's name into its number without keeping every copy of it.
        struct Number<'a>(&'a mut BTreeMap<String, usize>);
        impl<'de> DeserializeSeed<'de> for Number<'_> {
            type Value = usize;
            fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<usize, D::Error> {
                from.deserialize_str(self)
            }
        }
        impl Visitor<'_> for Number<'_> {
            type Value = usize;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a weight file")
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<usize, E> {
                if let Some(&number) = self.0.get(name) {
                    return Ok(number);
                }
                if !is_weight_file(name) {
                    return Err(E::custom(format!(
                        "names no weight file of this directory, but `{}`; paths are refused",
                        brief(name)
                    )));
                }
                let number = self.0.len();
                self.0.insert(name.to_owned(), number);
                Ok(number)
            }
        }
        impl<'de> Deserialize<'de> for Places {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Table;
                impl<'de> Visitor<'de> for Table {
                    type Value = Places;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a table of tensors and files")
                    }
                    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Places, A::Error> {
                        let Places { mut files, mut tensors } = Places::default();
                        while let Some(tensor) = map.next_key::<String>()? {
                            let file =
                                map.next_value_seed(Number(&mut files)).map_err(|error| {
                                    A::Error::custom(format!(
                                        "tensor {}: {}",
                                        brief(&tensor),
                                        brief(error)
                                    ))
                                })?;
                            if tensors.contains_key(&tensor) {
                                return Err(A::Error::custom(format!(
                                    "tensor {tensor} stands twice"
                                )));
                            }
                            tensors.insert(tensor, file);
                        }
                        Ok(Places { files, tensors })
                    }
                }
                from.deserialize_map(Table)
            }
        }
        let file: File = serde_json::from_slice(json).map_err(brief)?;
        let Places { files, mut tensors } = file.weight_map.ok_or("has no `weight_map`")?;
        let mut sorted = vec![0; files.len()];
        let mut names = Vec::with_capacity(files.len());
        for (place, (name, number)) in files.into_iter().enumerate() {
            sorted[number] = place;
            names.push(name);
        }
        for file in tensors.values_mut() {
            *file = sorted[*file];
        }
        Ok(Self { files: names, tensors })
    }
}

impl Checkpoint {
    /// Opens a directory: reads config.json and the headers of every shard, no weights. Looks for
    /// `model.safetensors.index.json`, `model.safetensors`, `pytorch_model.bin.index.json` and
    /// `pytorch_model.bin` in this order. Memory: as [`read_json`], [`Index::parse`] and, for all shards,
    /// twice [`crate::safetensors::parse`] or [`crate::pytorch::parse`].
    ///
    /// # Errors
    /// Missing files, files that are no regular files, shards that the index and the files tell differently
    /// about, damaged headers.
    pub fn open(folder: &Path) -> Result<Self, FormatError> {
        Self::open_with(folder, None)
    }

    /// As [`Checkpoint::open`]; weights that a GGUF file stores in blocks read as F32 through `dequantize`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and for a GGUF file with tensors whose codes are not understood.
    pub fn open_dense(folder: &Path, dequantize: Dequantize) -> Result<Self, FormatError> {
        let checkpoint = Self::open_with(folder, Some(dequantize))?;
        checkpoint.check_readable()?;
        Ok(checkpoint)
    }

    /// The model that was made of `source`: other weights and another config.json beside the same tokenizer
    /// and other files.
    ///
    /// # Errors
    /// When the source is a GGUF file, whose tokenizer lies in the file itself.
    pub fn made_of(
        source: &Self,
        config: Value,
        weights: SafetensorsFile,
    ) -> Result<Self, FormatError> {
        if source.gguf().is_some() {
            return Err(FormatError::invalid(
                source.place(),
                "is a GGUF file: passes on the whole model need a Hugging Face directory",
            ));
        }
        let headers: Vec<TensorHeader> = weights.headers().cloned().collect();
        Ok(Self {
            folder: source.folder.clone(),
            config,
            files: vec![WeightFile::Safetensors(weights)],
            owner: vec![0; headers.len()],
            headers,
        })
    }

    /// Refuses a GGUF file with tensors whose codes are not understood.
    ///
    /// # Errors
    /// When there is one.
    pub fn check_readable(&self) -> Result<(), FormatError> {
        match self.gguf().map(Gguf::unreadable) {
            Some([first, rest @ ..]) => Err(FormatError::invalid(
                self.files[0].path(),
                format!(
                    "tensor {first}{} of a type that can be carried, but not read",
                    if rest.is_empty() {
                        " is".into()
                    } else {
                        format!(" and {} more are", rest.len())
                    }
                ),
            )),
            _ => Ok(()),
        }
    }

    fn open_gguf(path: &Path, dequantize: Option<Dequantize>) -> Result<Self, FormatError> {
        let gguf = Gguf::open(path, dequantize)?;
        let config = gguf.config().clone();
        let headers: Vec<TensorHeader> = gguf.headers().cloned().collect();
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Ok(Self {
            folder: folder.unwrap_or(Path::new(".")).to_path_buf(),
            config,
            files: vec![WeightFile::Gguf(Box::new(gguf))],
            owner: vec![0; headers.len()],
            headers,
        })
    }

    fn open_with(folder: &Path, dequantize: Option<Dequantize>) -> Result<Self, FormatError> {
        let invalid = |reason: String| FormatError::invalid(folder, reason);
        if !folder.is_dir() {
            if folder.extension().is_some_and(|end| end == "gguf") {
                return Self::open_gguf(folder, dequantize);
            }
            return Err(invalid(if folder.exists() {
                "is a file; give a *.gguf file or the directory that holds config.json and *.safetensors"
                    .into()
            } else {
                "does not exist".into()
            }));
        }
        let path = folder.join("config.json");
        if !path.exists() {
            let files = list(folder)?;
            let mut ggufs = files.iter().filter(|name| name.ends_with(".gguf"));
            if let (Some(only), None) = (ggufs.next(), ggufs.next()) {
                return Self::open_gguf(&folder.join(only), dequantize);
            }
            return Err(invalid(
                "has no config.json, so the architecture is unknown; give a Hugging Face model directory".into(),
            ));
        }
        let config = read_json(&path)?;
        let has = |name: &str| folder.join(name).exists();
        let (names, map) = if let Some(name) =
            [INDEX, SINGLE, PYTORCH_INDEX, PYTORCH_SINGLE].into_iter().find(|name| has(name))
        {
            if name.ends_with(".json") {
                let path = folder.join(name);
                let index = Index::parse(&read_bounded(&path, MAX_INDEX)?).map_err(|reason| {
                    FormatError::invalid(&path, format!("{reason}; download the file again"))
                })?;
                (index.files, Some((name, index.tensors)))
            } else {
                (vec![name.to_owned()], None)
            }
        } else {
            let others: Vec<String> = list(folder)?
                .into_iter()
                .filter(|name| name.ends_with(".bin") || name.ends_with(".pth"))
                .collect();
            return Err(invalid(if others.is_empty() {
                "has neither model.safetensors nor model.safetensors.index.json".into()
            } else {
                format!(
                    "has only {}; rename PyTorch state dicts to pytorch_model*.bin and convert them to safetensors: {}",
                    others.join(", "),
                    convert_command(folder)
                )
            }));
        };
        let mut files = Vec::new();
        for name in &names {
            let path = folder.join(name);
            if !path.exists() {
                return Err(invalid(match map {
                    Some((index, _)) => {
                        format!("shard {name} is missing, but {index} names it; download it")
                    }
                    None => format!("{name} is gone"),
                }));
            }
            files.push(WeightFile::open(&path)?);
        }
        let mut all: Vec<(TensorHeader, usize)> = files
            .iter()
            .enumerate()
            .flat_map(|(at, file)| file.headers().into_iter().map(move |header| (header, at)))
            .collect();
        all.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        if let Some(pair) = all.windows(2).find(|pair| pair[0].0.name == pair[1].0.name) {
            return Err(invalid(format!(
                "tensor {} is in {} and in {}",
                pair[0].0.name, names[pair[0].1], names[pair[1].1]
            )));
        }
        if let Some((index, map)) = map {
            for (tensor, file) in &map {
                let found = all.binary_search_by(|(h, _)| h.name.as_str().cmp(tensor));
                if found.is_err() || found.is_ok_and(|at| all[at].1 != *file) {
                    return Err(invalid(format!(
                        "{index} says that tensor {tensor} is in {}, but it is not; download both again",
                        names[*file]
                    )));
                }
            }
            if let Some((header, _)) =
                all.iter().find(|(header, _)| !map.contains_key(&header.name))
            {
                return Err(invalid(format!(
                    "tensor {} is in a shard, but not in {index}",
                    header.name
                )));
            }
        }
        let (headers, owner) = all.into_iter().unzip();
        Ok(Self { folder: folder.to_path_buf(), config, files, headers, owner })
    }

    /// The GGUF file, when the checkpoint is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match self.files.first() {
            Some(WeightFile::Gguf(gguf)) => Some(gguf),
            _ => None,
        }
    }

    /// What was opened: the directory, or the GGUF file.
    pub fn place(&self) -> &Path {
        self.gguf().map_or(&self.folder, |gguf| gguf.file().path())
    }

    /// The tokenizer: `tokenizer.json` of the directory, or the one that a GGUF file describes.
    ///
    /// # Errors
    /// As [`Tokenizer::open`], or when the file's metadata describe none that is known.
    pub fn tokenizer(&self) -> Result<Tokenizer, FormatError> {
        match self.gguf() {
            Some(gguf) => gguf.tokenizer(),
            None => Tokenizer::open(&self.folder),
        }
    }

    /// The directory, that of the file for a GGUF file.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// config.json, key order kept.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Every other regular file of the directory that belongs to the model, sorted: tokenizer,
    /// generation config, templates, licence. Not: weights, other weight formats, our own reports.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn auxiliary_files(&self) -> Result<Vec<PathBuf>, FormatError> {
        if self.gguf().is_some() {
            return Ok(Vec::new());
        }
        let skip = |name: &str| {
            name.starts_with('.')
                || name == "config.json"
                || name.ends_with(".index.json")
                || name == crate::artifact::MANIFEST
                || name == crate::artifact::REPORT
                || name == crate::artifact::REPORT_PAGE
                || name == "quantize_config.json"
                || [".safetensors", ".bin", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"]
                    .iter()
                    .any(|end| name.ends_with(end))
        };
        Ok(list(&self.folder)?
            .into_iter()
            .filter(|name| !skip(name))
            .map(|name| self.folder.join(name))
            .collect())
    }

    /// blake3 of config.json and every weight file, by file name.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn hashes(&self) -> Result<BTreeMap<String, String>, FormatError> {
        let mut out = BTreeMap::new();
        let config = self.gguf().is_none().then(|| self.folder.join("config.json"));
        for path in self.files.iter().map(WeightFile::path).chain(config.as_deref()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            out.insert(name, hash_file(path)?);
        }
        Ok(out)
    }

    /// Asks the system to read the tensors whose names begin with `prefix` ahead; they take no memory of
    /// this process until they are used.
    pub fn prefetch(&self, prefix: &str) {
        for (header, &file) in self.headers.iter().zip(&self.owner) {
            if header.name.starts_with(prefix) {
                self.files[file].prefetch(&header.name);
            }
        }
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        let at = self.headers.binary_search_by(|h| h.name.as_str().cmp(name)).ok()?;
        Some(self.files[self.owner[at]].path())
    }

    /// File, first byte and number of bytes of a tensor; `None` in other files than safetensors.
    pub fn bytes_of(&self, name: &str) -> Option<(&Path, usize, usize)> {
        let at = self.headers.binary_search_by(|h| h.name.as_str().cmp(name)).ok()?;
        match &self.files[self.owner[at]] {
            WeightFile::Safetensors(file) => {
                file.place(name).map(|(start, length)| (file.path(), start, length))
            }
            WeightFile::Pytorch(_) | WeightFile::Gguf(_) => None,
        }
    }

    /// Bytes of the weight files.
    ///
    /// # Errors
    /// When a file cannot be looked up.
    pub fn file_bytes(&self) -> Result<u64, FormatError> {
        self.files
            .iter()
            .map(|f| Ok(std::fs::metadata(f.path()).map_err(FormatError::io(f.path()))?.len()))
            .sum()
    }
}

fn list(folder: &Path) -> Result<Vec<String>, FormatError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(FormatError::io(folder))? {
        let entry = entry.map_err(FormatError::io(folder))?;
        if entry.path().is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

impl TensorSource for Checkpoint {
    fn headers(&self) -> &[TensorHeader] {
        &self.headers
    }

    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError> {
        let at = self.headers.binary_search_by(|h| h.name.as_str().cmp(name)).ok();
        at.and_then(|at| self.files[self.owner[at]].view(name)).ok_or_else(|| {
            SourceError::Missing { name: name.into(), place: self.folder.display().to_string() }
        })
    }

    fn read_row(&self, name: &str, row: usize) -> Result<TensorView<'_>, SourceError> {
        let found = match self.gguf() {
            Some(gguf) => gguf.row(name, row),
            None => self.read(name)?.into_row(row),
        };
        found.ok_or_else(|| SourceError::Invalid {
            name: name.to_owned(),
            reason: format!("has no row {row}"),
        })
    }

    fn release(&self, name: &str) {
        if let Ok(at) = self.headers.binary_search_by(|h| h.name.as_str().cmp(name)) {
            self.files[self.owner[at]].release(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::SafetensorsWriter;
    use attar_tensor::{DType, Tensor, TensorSink};

    fn sharded(dir: &Path) {
        let headers: Vec<_> = ["a", "b"]
            .iter()
            .map(|n| TensorHeader { name: (*n).into(), dtype: DType::F32, shape: vec![4] })
            .collect();
        let mut writer = SafetensorsWriter::create(dir, headers, 16).unwrap();
        for name in ["a", "b"] {
            writer.write(name, &Tensor::from_f32(DType::F32, vec![4], &[1.0; 4]).unwrap()).unwrap();
        }
        writer.finish().unwrap();
        std::fs::write(dir.join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
    }

    #[test]
    fn shards_and_index_must_agree() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let error = |dir: &Path| Checkpoint::open(dir).unwrap_err().to_string();
        assert!(error(dir).contains("config.json"));
        sharded(dir);
        std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        let checkpoint = Checkpoint::open(dir).unwrap();
        assert_eq!(checkpoint.headers().len(), 2);
        assert_eq!(checkpoint.auxiliary_files().unwrap().len(), 1);
        assert_eq!(checkpoint.hashes().unwrap().len(), 3);

        let index = dir.join(INDEX);
        let good = std::fs::read_to_string(&index).unwrap();
        std::fs::write(&index, good.replace("\"b\":", "\"c\":")).unwrap();
        assert!(error(dir).contains("tensor c"));
        std::fs::write(&index, &good).unwrap();
        std::fs::remove_file(dir.join("model-00002-of-00002.safetensors")).unwrap();
        assert!(error(dir).contains("model-00002-of-00002.safetensors is missing"));
    }

    #[test]
    fn an_index_names_files_of_its_own_directory_only() {
        let parse = |file: &str| {
            let json = serde_json::json!({"metadata": {}, "weight_map": {"a": file}});
            Index::parse(json.to_string().as_bytes())
        };
        for bad in [
            "/etc/passwd.bin",
            "../x.safetensors",
            "sub/x.safetensors",
            "..",
            ".",
            "",
            ".bin",
            ".safetensors",
            "..\\x.bin",
            "C:x.bin",
            "x\0.safetensors",
            "config.json",
            "x.safetensors/",
            "/dev/zero",
            "x.safetensors\0",
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains("tensor a: ") && error.contains("paths are refused"), "{error}");
        }
        assert_eq!(parse("..x.bin").unwrap().files, ["..x.bin"]);
        let index = |text: &str| Index::parse(text.as_bytes());
        let good = index(r#"{"weight_map":{"a":"z.bin","b":"y.bin","c":"z.bin"}}"#).unwrap();
        assert_eq!(good.files, ["y.bin", "z.bin"]);
        assert_eq!(good.tensors.values().collect::<Vec<_>>(), [&1, &0, &1]);
        for (text, expected) in [
            (r#"{"weight_map":{"a":"z.bin","a":"y.bin"}}"#, "tensor a stands twice"),
            (r#"{"weight_map":{"a":1}}"#, "tensor a: invalid type"),
            (r#"{"weight_map":[]}"#, "a table of tensors and files"),
            (r#"{"weights":{}}"#, "no `weight_map`"),
            ("{", "EOF"),
        ] {
            let error = index(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let deep = format!("{{\"x\":{}", "[".repeat(1_000_000));
        assert!(index(&deep).unwrap_err().contains("EOF"), "what is skipped is not recursed into");
    }

    /// A checkpoint whose weights are a single safetensors file.
    fn single(dir: &Path) {
        let headers = vec![TensorHeader { name: "a".into(), dtype: DType::F32, shape: vec![1] }];
        let mut writer = SafetensorsWriter::create(dir, headers, 1 << 20).unwrap();
        writer.write("a", &Tensor::from_f32(DType::F32, vec![1], &[1.0]).unwrap()).unwrap();
        writer.finish().unwrap();
        std::fs::write(dir.join("config.json"), "{}").unwrap();
    }

    #[test]
    fn links_to_regular_files_work_and_everything_else_is_refused() {
        use std::os::unix::{fs::symlink, net::UnixListener};
        let dir = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshots/rev"));
        std::fs::create_dir(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        single(&blobs);
        let weights = snapshot.join(SINGLE);
        // As the Hugging Face cache lays it out.
        symlink("../../blobs/config.json", snapshot.join("config.json")).unwrap();
        symlink("../../blobs/model.safetensors", &weights).unwrap();
        let checkpoint = Checkpoint::open(&snapshot).unwrap();
        assert_eq!(checkpoint.read("a").unwrap().to_f32().unwrap(), [1.0]);
        assert_eq!(checkpoint.hashes().unwrap().len(), 2);

        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let folder = dir.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        for (target, expected) in [
            (fifo.as_path(), "a FIFO"),
            (socket.as_path(), "a socket"),
            (folder.as_path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            for name in [SINGLE, "config.json"] {
                let path = snapshot.join(name);
                std::fs::remove_file(&path).unwrap();
                symlink(target, &path).unwrap();
                let error = Checkpoint::open(&snapshot).unwrap_err().to_string();
                assert!(error.contains(expected) && error.contains(name), "{error}");
                assert!(hash_file(&path).unwrap_err().to_string().contains(expected));
                std::fs::remove_file(&path).unwrap();
                symlink(Path::new("../../blobs").join(name), &path).unwrap();
            }
        }
        // A link to nothing and one to itself.
        for target in ["nowhere", SINGLE] {
            std::fs::remove_file(&weights).unwrap();
            symlink(target, &weights).unwrap();
            assert!(Checkpoint::open(&snapshot).is_err());
        }
    }

    #[test]
    fn state_dicts_of_pytorch_open_when_there_is_no_safetensors_file() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/pytorch");
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("config.json"), "{}").unwrap();
        std::fs::copy(golden.join("state.bin"), dir.join(PYTORCH_SINGLE)).unwrap();
        let checkpoint = Checkpoint::open(dir).unwrap();
        let names: Vec<String> = checkpoint.headers().iter().map(|h| h.name.clone()).collect();
        assert_eq!(checkpoint.read("scalar").unwrap().to_f32().unwrap(), [2.5]);
        checkpoint.release("scalar");
        assert!(checkpoint.auxiliary_files().unwrap().is_empty());

        std::fs::rename(dir.join(PYTORCH_SINGLE), dir.join("pytorch_model-00001-of-00001.bin"))
            .unwrap();
        let error = Checkpoint::open(dir).unwrap_err().to_string();
        assert!(error.contains("pytorch_model-00001-of-00001.bin") && error.contains("python3 -c"));
        let map: BTreeMap<&String, &str> =
            names.iter().map(|name| (name, "pytorch_model-00001-of-00001.bin")).collect();
        let index = serde_json::json!({"weight_map": map}).to_string();
        std::fs::write(dir.join(PYTORCH_INDEX), index).unwrap();
        assert_eq!(Checkpoint::open(dir).unwrap().headers(), checkpoint.headers());
        assert!(Checkpoint::open(dir).unwrap().auxiliary_files().unwrap().is_empty());
        // safetensors come first.
        single(dir);
        assert_eq!(Checkpoint::open(dir).unwrap().headers().len(), 1);
    }
}
