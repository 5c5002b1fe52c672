//! Artifacts: directories that appear whole or not at all. Everything is written under
//! `<out>.partial`; [`ArtifactRoot::seal`] renames it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use attar_tensor::{SourceError, TensorHeader, TensorView};
use serde_json::{Map, Value, json};

use crate::{
    FormatError, adapter,
    gguf::artifact::{GgufArtifact, GgufPlan},
    hash_file,
    safetensors::SafetensorsWriter,
};

/// Manifest of an artifact: hashes of sources, recipe, calibration set and outputs.
pub const MANIFEST: &str = "attar_manifest.json";
/// Report of the compression.
pub const REPORT: &str = "report.json";
/// The same for people.
pub const REPORT_PAGE: &str = "report.html";
/// The weights and all else of an artifact in the container gguf.
pub const GGUF: &str = "model.gguf";
/// Marks a directory as being written by us, and is locked while it is.
const MARKER: &str = ".attar-partial";
/// Data of one shard at most, bytes.
const SHARD_BYTES: usize = 5_000_000_000;

/// The output directory of a run while it is being written. Dropped without [`ArtifactRoot::seal`], it
/// removes what it wrote.
#[derive(Debug)]
pub struct ArtifactRoot {
    target: PathBuf,
    partial: PathBuf,
    /// Holds the lock until the root is gone.
    _marker: fs::File,
    sealed: bool,
}

impl ArtifactRoot {
    /// Creates `<target>.partial`. One that a killed run left behind is replaced.
    ///
    /// # Errors
    /// When the target exists and is not empty, the place cannot be written, `<target>.partial` was not
    /// made by us, or another process is writing it.
    pub fn create(target: &Path) -> Result<Self, FormatError> {
        if fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(FormatError::invalid(
                target,
                "exists and is not empty; choose another --out or remove it",
            ));
        }
        if target.is_file() {
            return Err(FormatError::invalid(target, "is a file; choose another --out"));
        }
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let partial = target.with_file_name(name);
        let marker = partial.join(MARKER);
        if partial.exists() {
            let empty = fs::read_dir(&partial).is_ok_and(|mut entries| entries.next().is_none());
            if !empty && !marker.exists() {
                return Err(FormatError::invalid(
                    &partial,
                    "exists, but was not made by attar; move it away or choose another --out",
                ));
            }
        }
        fs::create_dir_all(&partial).map_err(FormatError::io(&partial))?;
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&marker)
            .map_err(FormatError::io(&marker))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(FormatError::invalid(
                    &partial,
                    "is being written by another attar process; wait for it or choose another --out",
                ));
            }
            // A filesystem without locks cannot tell; the marker still says whose the directory is.
            Err(fs::TryLockError::Error(_)) => {}
        }
        let listed = fs::read_dir(&partial).map_err(FormatError::io(&partial))?;
        for entry in listed {
            let path = entry.map_err(FormatError::io(&partial))?.path();
            if path == marker {
                continue;
            }
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
                .map_err(FormatError::io(&path))?;
        }
        Ok(Self { target: target.to_path_buf(), partial, _marker: file, sealed: false })
    }

    /// Takes away the mark of a run that was killed after its artifact existed, before its last act.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn clear_marker(target: &Path) -> Result<(), FormatError> {
        let marker = target.join(MARKER);
        match fs::remove_file(&marker) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(FormatError::io(&marker)(error))
            }
            _ => Ok(()),
        }
    }

    /// Where files are written for now.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Renames the directory: from now on it exists.
    ///
    /// # Errors
    /// When the rename fails.
    pub fn seal(mut self) -> Result<(), FormatError> {
        if self.target.exists() {
            fs::remove_dir(&self.target).map_err(FormatError::io(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(FormatError::io(&self.target))?;
        self.sealed = true;
        let _ = fs::remove_file(self.target.join(MARKER));
        if let Some(parent) = self.target.parent().filter(|p| !p.as_os_str().is_empty())
            && let Ok(folder) = fs::File::open(parent)
        {
            // The rename is durable once the parent is; a filesystem without that promise says no.
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for ArtifactRoot {
    fn drop(&mut self) {
        if !self.sealed {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Writes one artifact into a folder below an [`ArtifactRoot`].
#[derive(Debug)]
pub struct ArtifactWriter {
    folder: PathBuf,
    tensors: Tensors,
}

/// Where tensors go.
#[derive(Debug)]
enum Tensors {
    Safetensors(SafetensorsWriter),
    Gguf(Box<GgufArtifact>),
}

impl ArtifactWriter {
    /// Creates the folder and declares every tensor.
    ///
    /// # Errors
    /// When the folder or the files cannot be created.
    pub fn create(folder: &Path, headers: Vec<TensorHeader>) -> Result<Self, FormatError> {
        fs::create_dir_all(folder).map_err(FormatError::io(folder))?;
        Ok(Self {
            folder: folder.to_path_buf(),
            tensors: Tensors::Safetensors(SafetensorsWriter::create(folder, headers, SHARD_BYTES)?),
        })
    }

    /// Creates the folder with one file, `model.gguf`, and declares every tensor by its Hugging Face name.
    ///
    /// # Errors
    /// When the file cannot be created, or a tensor has no place in it.
    pub fn create_gguf(folder: &Path, plan: GgufPlan) -> Result<Self, FormatError> {
        fs::create_dir_all(folder).map_err(FormatError::io(folder))?;
        let file = GgufArtifact::create(&folder.join(GGUF), plan)?;
        Ok(Self { folder: folder.to_path_buf(), tensors: Tensors::Gguf(Box::new(file)) })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes one declared tensor.
    ///
    /// # Errors
    /// As [`attar_tensor::TensorSink::write`].
    pub fn put(&mut self, name: &str, tensor: &TensorView<'_>) -> Result<(), SourceError> {
        match &mut self.tensors {
            Tensors::Safetensors(tensors) => tensors.write_view(name, tensor),
            Tensors::Gguf(tensors) => tensors.put(name, tensor),
        }
    }

    /// Copies a file beside the weights.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn copy_file(&self, from: &Path) -> Result<(), FormatError> {
        let to = self.folder.join(from.file_name().unwrap_or_default());
        fs::copy(from, &to).map_err(FormatError::io(&to))?;
        Ok(())
    }

    /// Writes a text beside the weights.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_text(&self, name: &str, text: &str) -> Result<(), FormatError> {
        let path = self.folder.join(name);
        fs::write(&path, text).map_err(FormatError::io(&path))
    }

    /// Writes JSON beside the weights.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put_json(&self, name: &str, value: &Value) -> Result<(), FormatError> {
        put_json(&self.folder.join(name), value)
    }

    /// Finishes the weights and returns the folder.
    ///
    /// # Errors
    /// When a declared tensor was never written.
    pub fn finish(self) -> Result<PathBuf, FormatError> {
        match self.tensors {
            Tensors::Safetensors(tensors) => tensors.finish()?,
            Tensors::Gguf(tensors) => tensors.finish()?,
        }
        Ok(self.folder)
    }
}

/// Writes a JSON file, pretty.
///
/// # Errors
/// When it cannot be written.
pub fn put_json(path: &Path, value: &Value) -> Result<(), FormatError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| FormatError::invalid(path, error.to_string()))?;
    text.push(b'\n');
    fs::write(path, text).map_err(FormatError::io(path))
}

/// Writes the manifest: `facts` plus size and blake3 of every file of the folder except the manifest and
/// the reports (whose timings differ from run to run).
///
/// # Errors
/// When a file cannot be read or the manifest not written.
pub fn write_manifest(folder: &Path, facts: Map<String, Value>) -> Result<(), FormatError> {
    let mut manifest = facts;
    manifest.insert("files".into(), Value::Object(file_table(folder)?));
    put_json(&folder.join(MANIFEST), &Value::Object(manifest))
}

fn file_table(folder: &Path) -> Result<Map<String, Value>, FormatError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(FormatError::io(folder))? {
        let entry = entry.map_err(FormatError::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_file()
            && ![MANIFEST, REPORT, REPORT_PAGE, MARKER].contains(&name.as_str())
        {
            names.push(name);
        }
    }
    for name in [adapter::CONFIG, adapter::WEIGHTS] {
        let name = format!("{}/{name}", adapter::FOLDER);
        if folder.join(&name).is_file() {
            names.push(name);
        }
    }
    names.sort();
    let mut table = Map::new();
    for name in names {
        let path = folder.join(&name);
        let bytes = fs::metadata(&path).map_err(FormatError::io(&path))?.len();
        table.insert(name, json!({"bytes": bytes, "blake3": hash_file(&path)?}));
    }
    Ok(table)
}

/// Compares the files of an artifact with its manifest; returns what differs, empty when nothing does.
/// Names in the manifest are compared, never opened. Memory taken: as [`crate::read_json`], twice.
///
/// # Errors
/// When the manifest is missing or unreadable.
pub fn check_manifest(folder: &Path) -> Result<Vec<String>, FormatError> {
    let path = folder.join(MANIFEST);
    let manifest = crate::read_json(&path)?;
    let files = manifest
        .get("files")
        .and_then(Value::as_object)
        .ok_or_else(|| FormatError::invalid(&path, "has no `files` table"))?;
    let found = file_table(folder)?;
    let mut wrong = Vec::new();
    for (name, want) in files {
        match found.get(name) {
            None => wrong.push(format!("{name}: missing")),
            Some(have) if have != want => {
                wrong.push(format!("{name}: hash or size differs from the manifest"));
            }
            Some(_) => {}
        }
    }
    for name in found.keys().filter(|name| !files.contains_key(*name)) {
        wrong.push(format!("{name}: not in the manifest"));
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::{DType, Tensor};

    #[test]
    fn artifacts_appear_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let header = TensorHeader { name: "a".into(), dtype: DType::F32, shape: vec![1] };
        {
            let root = ArtifactRoot::create(&out).unwrap();
            ArtifactWriter::create(root.partial(), vec![header.clone()]).unwrap();
        }
        assert!(!out.exists() && !dir.path().join("out.partial").exists());
        let root = ArtifactRoot::create(&out).unwrap();
        let mut writer = ArtifactWriter::create(root.partial(), vec![header]).unwrap();
        writer.put("a", &Tensor::from_f32(DType::F32, vec![1], &[2.0]).unwrap().view()).unwrap();
        let folder = writer.finish().unwrap();
        write_manifest(&folder, Map::new()).unwrap();
        root.seal().unwrap();
        assert!(check_manifest(&out).unwrap().is_empty());
        assert!(ArtifactRoot::create(&out).unwrap_err().to_string().contains("not empty"));
        let weights = out.join("model.safetensors");
        let mut bytes = fs::read(&weights).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&weights, bytes).unwrap();
        assert_eq!(check_manifest(&out).unwrap().len(), 1);
        assert!(!out.join(MARKER).exists());
        // What is not ours is left alone; what a killed run left is replaced; a running one is not disturbed.
        let other = dir.path().join("other");
        let partial = dir.path().join("other.partial");
        fs::create_dir(&partial).unwrap();
        fs::write(partial.join("thesis.tex"), "years of work").unwrap();
        let error = ArtifactRoot::create(&other).unwrap_err().to_string();
        assert!(error.contains("not made by attar") && partial.join("thesis.tex").exists());
        fs::write(partial.join(MARKER), "").unwrap();
        let root = ArtifactRoot::create(&other).unwrap();
        assert!(!partial.join("thesis.tex").exists());
        let error = ArtifactRoot::create(&other).unwrap_err().to_string();
        assert!(error.contains("another attar process"), "{error}");
        drop(root);
        assert!(!partial.exists());
        // A path below a file cannot be created, whoever asks.
        assert!(ArtifactRoot::create(&weights.join("below")).is_err());
    }
}
