//! LoRA adapters as PEFT stores them: `adapter/adapter_config.json` and `adapter/adapter_model.safetensors` beside the
//! checkpoint that they belong to. A linear's output gains `scale · up (down x)`; `down` is PEFT's `lora_A.weight [r, in]`,
//! `up` its `lora_B.weight [out, r]`, and the scale is `lora_alpha / r` (PEFT 0.17, `tuners/lora/layer.py`).

use std::path::{Path, PathBuf};

use attar_tensor::{SourceError, TensorHeader, TensorView};
use serde_json::{Map, Value, json};

use crate::{
    FormatError, artifact, brief, read_json,
    safetensors::{SafetensorsFile, SafetensorsWriter},
};

/// Folder of the adapter inside an artifact. Not the artifact itself: transformers takes a directory with an
/// adapter_config.json for an adapter, and looks for its base model elsewhere.
pub const FOLDER: &str = "adapter";
/// Its configuration.
pub const CONFIG: &str = "adapter_config.json";
/// Its weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// An opened adapter.
#[derive(Debug)]
pub struct Adapter {
    file: SafetensorsFile,
    headers: Vec<TensorHeader>,
    config: Value,
}

/// The correction of one linear.
#[derive(Debug)]
pub struct Correction<'a> {
    /// `[r, in]`.
    pub down: TensorView<'a>,
    /// `[out, r]`.
    pub up: TensorView<'a>,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl Adapter {
    /// Opens the adapter beside an artifact; `None` when there is none. Memory: as [`read_json`] and twice
    /// [`crate::safetensors::parse`].
    ///
    /// # Errors
    /// When it is damaged, or an adapter of another kind than plain LoRA.
    pub fn open(artifact: &Path) -> Result<Option<Self>, FormatError> {
        let folder = artifact.join(FOLDER);
        let path = folder.join(CONFIG);
        if !path.exists() {
            return Ok(None);
        }
        let config = read_json(&path)?;
        let plain = [("use_dora", json!(false)), ("fan_in_fan_out", json!(false))];
        if config["peft_type"] != "LORA" {
            let kind = brief(&config["peft_type"]);
            return Err(FormatError::invalid(
                &path,
                format!("peft_type is {kind}, only LORA is read"),
            ));
        }
        for (key, usual) in
            plain.into_iter().chain([("bias", json!("none")), ("use_rslora", json!(false))])
        {
            let value = config.get(key).filter(|value| !value.is_null());
            if let Some(value) = value.filter(|value| **value != usual) {
                let reason = format!("{key} is {}, only {usual} is read", brief(value));
                return Err(FormatError::invalid(&path, reason));
            }
        }
        let patterns = config.get("alpha_pattern").and_then(Value::as_object);
        let plain =
            |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if let Some((name, _)) = patterns.into_iter().flatten().find(|(name, _)| !plain(name)) {
            let reason =
                format!("alpha_pattern has the regular expression {name:?}; only names are read");
            return Err(FormatError::invalid(&path, reason));
        }
        let file = SafetensorsFile::open(&folder.join(WEIGHTS))?;
        let headers: Vec<TensorHeader> = file.headers().cloned().collect();
        if let Some(odd) = headers.iter().find(|header| site_of(&header.name).is_none()) {
            let reason = format!("tensor {} is no factor of a linear", brief(&odd.name));
            return Err(FormatError::invalid(file.path(), reason));
        }
        Ok(Some(Self { file, headers, config }))
    }

    /// Every tensor.
    pub fn headers(&self) -> &[TensorHeader] {
        &self.headers
    }

    /// One tensor.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        self.file.view(name)
    }

    /// Names of the linears that it corrects, each once or twice.
    pub fn sites(&self) -> impl Iterator<Item = &str> {
        self.headers.iter().filter_map(|header| site_of(&header.name))
    }

    /// Bytes of its weights on disk.
    ///
    /// # Errors
    /// When the file has gone.
    pub fn file_bytes(&self) -> Result<u64, FormatError> {
        let path = self.file.path();
        Ok(std::fs::metadata(path).map_err(FormatError::io(path))?.len())
    }

    /// The correction of a linear of `[out, in]`; `None` when it has none.
    ///
    /// # Errors
    /// When one factor is missing, or shapes do not fit.
    pub fn correction(
        &self,
        site: &str,
        (out, inner): (usize, usize),
    ) -> Result<Option<Correction<'_>>, FormatError> {
        let view = |factor: &str| self.file.view(&format!("{PREFIX}{site}.{factor}.weight"));
        let (down, up) = (view("lora_A"), view("lora_B"));
        let fail = |reason: String| FormatError::invalid(self.file.path(), reason);
        let (down, up) = match (down, up) {
            (None, None) => return Ok(None),
            (Some(down), Some(up)) => (down, up),
            _ => return Err(fail(format!("{site} has one factor of two"))),
        };
        let rank = down.shape().first().copied().unwrap_or(0);
        if rank == 0 || down.shape() != [rank, inner] || up.shape() != [out, rank] {
            return Err(fail(format!(
                "the factors of {site} are {:?} and {:?}, expected [r, {inner}] and [{out}, r]",
                down.shape(),
                up.shape()
            )));
        }
        // A name of the pattern is the end of a linear's name, at a dot (PEFT, `get_pattern_key`).
        let patterns = self.config.get("alpha_pattern").and_then(Value::as_object);
        let own = patterns.into_iter().flatten().find_map(|(name, alpha)| {
            let rest = site.strip_suffix(name.as_str())?;
            (rest.is_empty() || rest.ends_with('.')).then_some(alpha)
        });
        let alpha = own.or_else(|| self.config.get("lora_alpha")).and_then(Value::as_f64);
        let alpha = alpha.ok_or_else(|| fail(format!("{site} has no lora_alpha")))?;
        Ok(Some(Correction { down, up, scale: (alpha / rank as f64) as f32 }))
    }
}

const PREFIX: &str = "base_model.model.";

/// The linear that a tensor of an adapter belongs to.
fn site_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    rest.strip_suffix(".lora_A").or_else(|| rest.strip_suffix(".lora_B"))
}

/// Writes an adapter beside an artifact.
#[derive(Debug)]
pub struct AdapterWriter {
    folder: PathBuf,
    tensors: SafetensorsWriter,
}

impl AdapterWriter {
    /// Creates the folder inside `artifact` and declares every tensor.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create(artifact: &Path, headers: Vec<TensorHeader>) -> Result<Self, FormatError> {
        let folder = artifact.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(FormatError::io(&folder))?;
        let tensors = SafetensorsWriter::create(&folder, headers, usize::MAX)?;
        Ok(Self { folder, tensors })
    }

    /// Writes one declared tensor.
    ///
    /// # Errors
    /// As [`attar_tensor::TensorSink::write`].
    pub fn put(&mut self, name: &str, tensor: &TensorView<'_>) -> Result<(), SourceError> {
        self.tensors.write_view(name, tensor)
    }

    /// Finishes weights and configuration; `ranks` are those of the linears.
    ///
    /// # Errors
    /// When a declared tensor was never written, or the disk refuses.
    pub fn finish(self, ranks: &[(String, usize)]) -> Result<(), FormatError> {
        self.tensors.finish()?;
        let from = self.folder.join("model.safetensors");
        std::fs::rename(&from, self.folder.join(WEIGHTS)).map_err(FormatError::io(&from))?;
        artifact::put_json(&self.folder.join(CONFIG), &config(ranks))
    }
}

/// What PEFT reads. The scale is 1 for every linear: `lora_alpha` is the rank.
fn config(ranks: &[(String, usize)]) -> Value {
    let usual = ranks.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
    let other = ranks.iter().filter(|(_, rank)| *rank != usual);
    let pattern: Map<String, Value> =
        other.map(|(site, rank)| (site.clone(), json!(rank))).collect();
    let sites: Vec<&str> = ranks.iter().map(|(site, _)| site.as_str()).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sites,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "use_rslora": false,
        "use_dora": false,
        "init_lora_weights": true,
        "modules_to_save": null,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::{DType, Tensor};

    fn tensor(shape: [usize; 2]) -> Tensor {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
        Tensor::from_f32(DType::F32, shape.to_vec(), &values).unwrap()
    }

    fn write(folder: &Path, down: [usize; 2], up: [usize; 2]) {
        let name = |factor: &str| format!("{PREFIX}model.up.{factor}.weight");
        let header = |factor, shape: [usize; 2]| TensorHeader {
            name: name(factor),
            dtype: DType::F32,
            shape: shape.to_vec(),
        };
        let headers = vec![header("lora_A", down), header("lora_B", up)];
        let mut writer = AdapterWriter::create(folder, headers).unwrap();
        writer.put(&name("lora_A"), &tensor(down).view()).unwrap();
        writer.put(&name("lora_B"), &tensor(up).view()).unwrap();
        writer.finish(&[("model.up".into(), down[0])]).unwrap();
    }

    #[test]
    fn what_is_written_is_read_back_and_what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Adapter::open(dir.path()).unwrap().is_none());
        write(dir.path(), [2, 8], [3, 2]);
        let adapter = Adapter::open(dir.path()).unwrap().unwrap();
        let found = adapter.correction("model.up", (3, 8)).unwrap().unwrap();
        assert_eq!(found.down.to_f32().unwrap()[15].to_bits(), 15.0f32.to_bits());
        assert_eq!((found.up.shape(), found.scale.to_bits()), (&[3, 2][..], 1.0f32.to_bits()));
        assert!(adapter.correction("model.down", (3, 8)).unwrap().is_none());
        assert!(adapter.correction("model.up", (4, 8)).unwrap_err().to_string().contains("[4, r]"));
        let path = dir.path().join(FOLDER).join(CONFIG);
        for (key, value, part) in [
            ("peft_type", json!("LOHA"), "only LORA"),
            ("use_dora", json!(true), "use_dora is true"),
            ("bias", json!("all"), "bias is \"all\""),
        ] {
            let mut config = read_json(&path).unwrap();
            config[key] = value;
            let good = std::fs::read(&path).unwrap();
            artifact::put_json(&path, &config).unwrap();
            let error = Adapter::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
            std::fs::write(&path, good).unwrap();
        }
    }
}
