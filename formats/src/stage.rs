//! The work directory of a run: results and statistics under the hash of their true inputs, scratch files
//! that vanish with the process, and a lock that keeps a second process out.
//!
//! ```text
//! DIR/stage.lock          locked while a process works here; its first line tells the format
//! DIR/objects/<key>/      model.safetensors (the tensors) and object.json (kind, label, hash, facts)
//! DIR/tmp/                objects being written; emptied when the directory is opened
//! ```
//! An object appears by one rename, so a killed process leaves it whole or not at all; its hash is checked
//! when it is read, so that a page lost with the power is noticed and the work done again. Nothing is
//! synced to disk for that reason: the worst that a crash of the machine costs is time.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use attar_tensor::{Tensor, TensorHeader};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    FormatError, hash_file,
    safetensors::{SafetensorsFile, SafetensorsWriter},
};

const LOCK: &str = "stage.lock";
const FORMAT: &str = "attar stage 1";
const OBJECT: &str = "object.json";
const WEIGHTS: &str = "model.safetensors";

/// Name of an object: blake3 of everything that its content depends on, 64 hex digits.
pub type Key = String;

/// What is known of an object without reading its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObjectInfo {
    /// What it is: `statistic`, `result`, `stream`.
    pub kind: String,
    /// For people: block, stage, pass.
    pub label: String,
    /// blake3 of the tensor file.
    pub blake3: String,
    /// Bytes of the tensor file.
    pub bytes: u64,
    /// Whatever its maker wants back with it.
    pub facts: Value,
}

/// An object read back.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Facts.
    pub info: ObjectInfo,
    /// Tensors by name, sorted.
    pub tensors: Vec<(String, Tensor)>,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Its key.
    pub key: Key,
    /// Facts; `None` when `object.json` cannot be read.
    pub info: Option<ObjectInfo>,
    /// Bytes of its directory.
    pub bytes: u64,
    /// Seconds since it was last used.
    pub age: u64,
}

/// An opened work directory.
#[derive(Debug)]
pub struct Stage {
    root: PathBuf,
    /// Holds the lock.
    _lock: fs::File,
}

impl Stage {
    /// Opens a work directory, which is created when it does not exist.
    ///
    /// # Errors
    /// When the directory holds something else, another process works in it, or it cannot be written.
    pub fn open(root: &Path) -> Result<Self, FormatError> {
        let lock = root.join(LOCK);
        let used = fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_some());
        if used && !lock.exists() {
            return Err(FormatError::invalid(
                root,
                "holds files that are not a work directory of attar; choose an empty or new one",
            ));
        }
        fs::create_dir_all(root).map_err(FormatError::io(root))?;
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock)
            .map_err(FormatError::io(&lock))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(FormatError::invalid(
                    root,
                    "another attar process works in this directory; wait for it or give another --scratch",
                ));
            }
            // A filesystem without locks cannot tell.
            Err(fs::TryLockError::Error(_)) => {}
        }
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(&mut file, 64), &mut text)
            .map_err(FormatError::io(&lock))?;
        if text.is_empty() {
            file.write_all(FORMAT.as_bytes()).map_err(FormatError::io(&lock))?;
        } else if text != FORMAT && !FORMAT.starts_with(&text) {
            return Err(FormatError::invalid(
                root,
                format!(
                    "was made by another version of attar ({}); give another --scratch",
                    text.lines().next().unwrap_or_default()
                ),
            ));
        }
        let tmp = root.join("tmp");
        if tmp.exists() {
            fs::remove_dir_all(&tmp).map_err(FormatError::io(&tmp))?;
        }
        for folder in [tmp, root.join("objects")] {
            fs::create_dir_all(&folder).map_err(FormatError::io(&folder))?;
        }
        Ok(Self { root: root.to_path_buf(), _lock: file })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where scratch files are opened.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn place(&self, key: &str) -> PathBuf {
        self.root.join("objects").join(key)
    }

    /// True when an object of this name is there (its content is checked by [`Stage::get`]).
    pub fn contains(&self, key: &str) -> bool {
        self.place(key).join(OBJECT).is_file()
    }

    /// Stores an object; one that is there already is kept.
    ///
    /// # Errors
    /// When the disk refuses (full, read-only); nothing is left under the object's name then.
    pub fn put(
        &self,
        key: &str,
        kind: &str,
        label: &str,
        facts: Value,
        tensors: &[(String, Tensor)],
    ) -> Result<(), FormatError> {
        let headers = tensors
            .iter()
            .map(|(name, tensor)| TensorHeader {
                name: name.clone(),
                dtype: tensor.dtype(),
                shape: tensor.shape().to_vec(),
            })
            .collect();
        self.put_with(key, kind, label, facts, headers, |writer| {
            for (name, tensor) in tensors {
                writer.write_view(name, &tensor.view()).map_err(|error| error.to_string())?;
            }
            Ok(())
        })
    }

    /// As [`Stage::put`] for tensors that are written piece by piece: `fill` writes every declared one.
    ///
    /// # Errors
    /// As [`Stage::put`], and whatever `fill` says.
    pub fn put_with(
        &self,
        key: &str,
        kind: &str,
        label: &str,
        facts: Value,
        headers: Vec<TensorHeader>,
        fill: impl FnOnce(&mut SafetensorsWriter) -> Result<(), String>,
    ) -> Result<(), FormatError> {
        self.put_found(key, kind, label, headers, |writer| fill(writer).map(|()| facts))
    }

    /// As [`Stage::put_with`] for facts that are known when the tensors are.
    ///
    /// # Errors
    /// As [`Stage::put_with`].
    pub fn put_found(
        &self,
        key: &str,
        kind: &str,
        label: &str,
        headers: Vec<TensorHeader>,
        fill: impl FnOnce(&mut SafetensorsWriter) -> Result<Value, String>,
    ) -> Result<(), FormatError> {
        let target = self.place(key);
        if self.contains(key) {
            return Ok(());
        }
        let folder = self.scratch().join(key);
        let written = (|| {
            fs::create_dir_all(&folder).map_err(FormatError::io(&folder))?;
            let mut writer = SafetensorsWriter::create(&folder, headers, usize::MAX)?;
            let facts =
                fill(&mut writer).map_err(|reason| FormatError::invalid(&folder, reason))?;
            writer.close()?;
            let weights = folder.join(WEIGHTS);
            let info = ObjectInfo {
                kind: kind.to_owned(),
                label: label.to_owned(),
                blake3: hash_file(&weights)?,
                bytes: fs::metadata(&weights).map_err(FormatError::io(&weights))?.len(),
                facts,
            };
            let text = serde_json::to_vec_pretty(&info)
                .map_err(|error| FormatError::invalid(&folder, error.to_string()))?;
            let path = folder.join(OBJECT);
            fs::write(&path, text).map_err(FormatError::io(&path))?;
            if target.exists() {
                fs::remove_dir_all(&target).map_err(FormatError::io(&target))?;
            }
            fs::rename(&folder, &target).map_err(FormatError::io(&target))
        })();
        if written.is_err() {
            let _ = fs::remove_dir_all(&folder);
        }
        written
    }

    /// Facts of an object, without its tensors.
    pub fn info(&self, key: &str) -> Option<ObjectInfo> {
        serde_json::from_slice(&fs::read(self.place(key).join(OBJECT)).ok()?).ok()
    }

    /// Reads an object back. One that is damaged is removed and counts as absent.
    ///
    /// # Errors
    /// When it is there and whole, but cannot be read.
    pub fn get(&self, key: &str) -> Result<Option<Object>, FormatError> {
        let folder = self.place(key);
        let Some(info) = self.whole(key)? else {
            if folder.exists() {
                fs::remove_dir_all(&folder).map_err(FormatError::io(&folder))?;
            }
            return Ok(None);
        };
        let path = folder.join(WEIGHTS);
        let file = SafetensorsFile::open(&path)?;
        let mut tensors = Vec::new();
        for header in file.headers() {
            let view = file.view(&header.name).ok_or_else(|| {
                FormatError::invalid(&path, format!("tensor {} cannot be read", header.name))
            })?;
            tensors.push((header.name.clone(), view.to_tensor()));
            file.release(&header.name);
        }
        self.touch(key);
        Ok(Some(Object { info, tensors }))
    }

    /// The tensors of an object left in its file, for those too large to be held at once.
    ///
    /// # Errors
    /// As [`Stage::get`].
    pub fn open_object(
        &self,
        key: &str,
    ) -> Result<Option<(ObjectInfo, SafetensorsFile)>, FormatError> {
        let folder = self.place(key);
        let Some(info) = self.whole(key)? else {
            if folder.exists() {
                fs::remove_dir_all(&folder).map_err(FormatError::io(&folder))?;
            }
            return Ok(None);
        };
        self.touch(key);
        Ok(Some((info, SafetensorsFile::open(&folder.join(WEIGHTS))?)))
    }

    /// Facts of an object whose bytes are what they were when it was written.
    fn whole(&self, key: &str) -> Result<Option<ObjectInfo>, FormatError> {
        let Some(info) = self.info(key) else { return Ok(None) };
        let path = self.place(key).join(WEIGHTS);
        match fs::metadata(&path) {
            Ok(meta) if meta.len() == info.bytes => {}
            _ => return Ok(None),
        }
        Ok((hash_file(&path)? == info.blake3).then_some(info))
    }

    /// Marks an object as used now; a filesystem that does not keep times only makes pruning blunter.
    fn touch(&self, key: &str) {
        if let Ok(file) = fs::OpenOptions::new().write(true).open(self.place(key).join(OBJECT)) {
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// Removes an object.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn remove(&self, key: &str) -> Result<(), FormatError> {
        let folder = self.place(key);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FormatError::io(&folder)(error))
            }
            _ => Ok(()),
        }
    }

    /// Every object, least recently used first.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn list(&self) -> Result<Vec<Entry>, FormatError> {
        let objects = self.root.join("objects");
        let now = SystemTime::now();
        let mut entries = Vec::new();
        for entry in fs::read_dir(&objects).map_err(FormatError::io(&objects))? {
            let path = entry.map_err(FormatError::io(&objects))?.path();
            let key = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let size = |name: &str| fs::metadata(path.join(name)).map_or(0, |meta| meta.len());
            let used = fs::metadata(path.join(OBJECT)).and_then(|meta| meta.modified()).ok();
            let age = used.and_then(|used| now.duration_since(used).ok()).unwrap_or_default();
            entries.push((
                used,
                Entry {
                    info: self.info(&key),
                    bytes: size(WEIGHTS) + size(OBJECT),
                    age: age.as_secs(),
                    key,
                },
            ));
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.key.cmp(&b.1.key)));
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }

    /// Checks every object; returns the keys of those that are damaged.
    ///
    /// # Errors
    /// When an object cannot be read.
    pub fn verify(&self) -> Result<Vec<Key>, FormatError> {
        let mut damaged = Vec::new();
        for entry in self.list()? {
            if self.whole(&entry.key)?.is_none() {
                damaged.push(entry.key);
            }
        }
        Ok(damaged)
    }

    /// Removes least recently used objects until at most `limit` bytes are left; returns what went.
    ///
    /// # Errors
    /// When an object cannot be removed.
    pub fn prune(&self, limit: u64) -> Result<Vec<Entry>, FormatError> {
        let entries = self.list()?;
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut gone = Vec::new();
        for entry in entries {
            if total <= limit {
                break;
            }
            self.remove(&entry.key)?;
            total -= entry.bytes;
            gone.push(entry);
        }
        Ok(gone)
    }

    /// Removes the whole directory; the work is done.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn destroy(self) -> Result<(), FormatError> {
        let Self { root, _lock } = self;
        // The lock goes last: a process that is killed here leaves a work directory, not a heap of files.
        for folder in [root.join("objects"), root.join("tmp")] {
            fs::remove_dir_all(&folder).map_err(FormatError::io(&folder))?;
        }
        let lock = root.join(LOCK);
        fs::remove_file(&lock).map_err(FormatError::io(&lock))?;
        fs::remove_dir(&root).map_err(FormatError::io(&root))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::DType;
    use serde_json::json;

    fn tensor(value: f32) -> Vec<(String, Tensor)> {
        vec![("x".into(), Tensor::from_f32(DType::F32, vec![100], &[value; 100]).unwrap())]
    }

    #[test]
    fn objects_come_back_or_count_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("work");
        let stage = Stage::open(&root).unwrap();
        assert!(Stage::open(&root).unwrap_err().to_string().contains("another attar process"));
        assert!(stage.get("a").unwrap().is_none() && !stage.contains("a"));
        stage.put("a", "result", "block 0", json!({"n": 1}), &tensor(1.0)).unwrap();
        stage.put("a", "result", "block 0", json!({"n": 2}), &tensor(2.0)).unwrap();
        let object = stage.get("a").unwrap().unwrap();
        assert_eq!((object.tensors, object.info.facts), (tensor(1.0), json!({"n": 1})));
        drop(stage);
        let stage = Stage::open(&root).unwrap();
        assert!(stage.contains("a") && stage.verify().unwrap().is_empty());
        // A flipped bit, a missing half.
        for damage in [true, false] {
            let file = root.join("objects/a/model.safetensors");
            let mut bytes = fs::read(&file).unwrap();
            if damage {
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
            } else {
                bytes.truncate(50);
            }
            fs::write(&file, bytes).unwrap();
            assert_eq!(stage.verify().unwrap(), ["a"]);
            assert!(stage.get("a").unwrap().is_none() && !stage.contains("a"));
            stage.put("a", "result", "block 0", json!(null), &tensor(1.0)).unwrap();
        }
        stage.destroy().unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn pruning_takes_the_least_recently_used() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::open(&dir.path().join("work")).unwrap();
        for key in ["a", "b", "c"] {
            stage.put(key, "statistic", key, json!(null), &tensor(0.0)).unwrap();
        }
        let age = |key: &str, seconds: u64| {
            let path = stage.place(key).join(OBJECT);
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            let then = SystemTime::now() - std::time::Duration::from_secs(seconds);
            file.set_modified(then).unwrap();
        };
        age("a", 50);
        age("b", 100);
        age("c", 75);
        stage.get("b").unwrap();
        let entries = stage.list().unwrap();
        let keys: Vec<_> = entries.iter().map(|entry| entry.key.as_str()).collect();
        assert_eq!(keys, ["c", "a", "b"]);
        let gone = stage.prune(2 * entries[0].bytes).unwrap();
        assert_eq!(gone.len(), 1);
        assert!(!stage.contains("c") && stage.contains("a") && stage.contains("b"));
    }

    #[test]
    fn a_directory_of_somebody_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "years").unwrap();
        let error = Stage::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a work directory"), "{error}");
        assert!(dir.path().join("thesis.tex").exists());
    }
}
