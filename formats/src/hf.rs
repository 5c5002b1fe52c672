//! A Hugging Face model directory: config.json, one or many safetensors files with an index, and
//! whatever lies beside them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use attar_tensor::{SourceError, TensorHeader, TensorSource, TensorView};
use serde_json::Value;

use crate::{FormatError, hash_file, read_json, safetensors::SafetensorsFile};

/// An opened checkpoint or artifact.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Value,
    files: Vec<SafetensorsFile>,
    headers: Vec<TensorHeader>,
    /// File of each header.
    owner: Vec<usize>,
}

const INDEX: &str = "model.safetensors.index.json";

impl Checkpoint {
    /// Opens a directory: reads config.json and the headers of every shard, no weights.
    ///
    /// # Errors
    /// Missing files, shards that the index and the files tell differently about, damaged headers.
    pub fn open(folder: &Path) -> Result<Self, FormatError> {
        let invalid = |reason: String| FormatError::invalid(folder, reason);
        if !folder.is_dir() {
            return Err(invalid(if folder.exists() {
                "is a file; give the directory that holds config.json and *.safetensors (GGUF input is not supported yet)".into()
            } else {
                "does not exist".into()
            }));
        }
        let path = folder.join("config.json");
        if !path.exists() {
            return Err(invalid(
                "has no config.json, so the architecture is unknown; give a Hugging Face model directory".into(),
            ));
        }
        let config = read_json(&path)?;
        let index = folder.join(INDEX);
        let mut names: Vec<String> = Vec::new();
        let mut map = None;
        if index.exists() {
            let json = read_json(&index)?;
            let weights = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| {
                FormatError::invalid(&index, "has no `weight_map`; download the file again")
            })?;
            let mut placed = BTreeMap::new();
            for (tensor, file) in weights {
                let file = file.as_str().filter(|f| !f.contains(['/', '\\'])).ok_or_else(|| {
                    FormatError::invalid(
                        &index,
                        format!("tensor {tensor} names no file of this directory"),
                    )
                })?;
                placed.insert(tensor.clone(), file.to_owned());
                names.push(file.to_owned());
            }
            names.sort();
            names.dedup();
            map = Some(placed);
        } else if folder.join("model.safetensors").exists() {
            names.push("model.safetensors".into());
        } else {
            let others: Vec<String> = list(folder)?
                .into_iter()
                .filter(|name| name.ends_with(".bin") || name.ends_with(".pth"))
                .collect();
            return Err(invalid(if others.is_empty() {
                "has neither model.safetensors nor model.safetensors.index.json".into()
            } else {
                format!("has only {}; convert it to safetensors first", others.join(", "))
            }));
        }
        let mut files = Vec::new();
        for name in &names {
            let path = folder.join(name);
            if !path.exists() {
                return Err(invalid(format!(
                    "shard {name} is missing, but {INDEX} names it; download it"
                )));
            }
            files.push(SafetensorsFile::open(&path)?);
        }
        let mut all = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for header in file.headers() {
                if let Some((_, other)) = all.insert(header.name.clone(), (header.clone(), at)) {
                    return Err(invalid(format!(
                        "tensor {} is in {} and in {}",
                        header.name, names[other], names[at]
                    )));
                }
            }
        }
        if let Some(map) = map {
            for (tensor, file) in &map {
                match all.get(tensor) {
                    Some((_, at)) if names[*at] == *file => {}
                    _ => {
                        return Err(invalid(format!(
                            "{INDEX} says that tensor {tensor} is in {file}, but it is not; download both again"
                        )));
                    }
                }
            }
            if let Some(tensor) = all.keys().find(|tensor| !map.contains_key(*tensor)) {
                return Err(invalid(format!("tensor {tensor} is in a shard, but not in {INDEX}")));
            }
        }
        let (headers, owner) = all.into_values().unzip();
        Ok(Self { folder: folder.to_path_buf(), config, files, headers, owner })
    }

    /// The directory.
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
        let skip = |name: &str| {
            name.starts_with('.')
                || name == "config.json"
                || name == INDEX
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
        let config = self.folder.join("config.json");
        for path in self.files.iter().map(SafetensorsFile::path).chain([config.as_path()]) {
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
}
