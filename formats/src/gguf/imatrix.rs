//! Importance matrices of llama.cpp: for each weight, the sum over tokens of its input's squares.
//!
//! A GGUF file with `general.type` = `imatrix`, the names of the texts, the number and the size of their chunks, and
//! for each weight `NAME` (in GGUF's names) two F32 tensors: `NAME.in_sum2` `[matrices, in_features]`, sums of
//! squares, and `NAME.counts` `[matrices, 1]`, the tokens they are taken over; one matrix but for expert tensors.
//! Source: llama.cpp's `tools/imatrix` and `common/imatrix-loader.cpp`. The older form (`.dat`) has no magic and
//! is refused with a word on how to convert it.

use std::{collections::BTreeMap, path::Path};

use super::{
    Declared, GgmlType, GgufWriter,
    reader::{self, Header},
    value::{Array, Metadata, Value},
};
use crate::{FormatError, brief, read_bounded};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// `general.type` of such a file.
const TYPE: &str = "imatrix";
/// Largest file that is read, bytes; one of 405 B parameters has 50 MB, with hundreds of experts some hundreds.
const MAX_FILE: u64 = 1 << 30;

/// Sums of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// `[matrices, in_features]`, sum of squares over tokens.
    pub sums: Vec<f32>,
    /// Tokens of each matrix.
    pub counts: Vec<f32>,
}

/// A file of importances.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Imatrix {
    /// Names of the texts.
    pub datasets: Vec<String>,
    /// Windows of text.
    pub chunk_count: u32,
    /// Tokens of each.
    pub chunk_size: u32,
    /// By GGUF's name of the weight, e.g. `blk.0.attn_q.weight`.
    pub entries: BTreeMap<String, Entry>,
}

impl Imatrix {
    /// Reads a file; also returns the blake3 of its bytes, hex. Memory taken: as [`Imatrix::parse`], and the file.
    ///
    /// # Errors
    /// When it cannot be read or is not as [`Imatrix::parse`] demands.
    pub fn open(path: &Path) -> Result<(Self, String), FormatError> {
        let bytes = read_bounded(path, MAX_FILE)?;
        let own = Self::parse(&bytes).map_err(|reason| FormatError::invalid(path, reason))?;
        Ok((own, crate::hash_bytes(&bytes)))
    }

    /// Reads a file that is given as a whole. Memory taken: at most 18 bytes for each byte of it.
    ///
    /// # Errors
    /// The older form; a damaged file; a file of another type or without its three facts; sums without counts or
    /// the other way round, of another type than F32, of shapes that do not fit; numbers that are negative or not
    /// finite; no entry at all.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        if file.get(..4).is_some_and(|magic| magic != b"GGUF") {
            return Err(old_form(file));
        }
        let header = reader::parse(file)?;
        let metadata = &header.metadata;
        match metadata.get("general.type").and_then(Value::text) {
            Some(TYPE) => {}
            Some(other) => {
                let other = brief(other);
                return Err(format!("is no importance matrix: its general.type is `{other}`"));
            }
            None => return Err("is no importance matrix: it has no general.type".into()),
        }
        let datasets = match metadata.get("imatrix.datasets") {
            Some(Value::Array(Array::Strings(list))) => list.clone(),
            _ => return Err("has no list of texts imatrix.datasets".into()),
        };
        let number = |key: &str| match metadata.get(key) {
            Some(Value::U32(number)) => Ok(*number),
            _ => Err(format!("has no 32-bit number {key}")),
        };
        let chunk_count = number("imatrix.chunk_count")?;
        let chunk_size = number("imatrix.chunk_size")?;
        let entries = entries(file, &header)?;
        if entries.is_empty() {
            return Err("holds no importances".into());
        }
        Ok(Self { datasets, chunk_count, chunk_size, entries })
    }

    /// Mean square of each input channel of the weight `name`, as sums and the tokens they are taken over.
    ///
    /// # Errors
    /// When it has no entry, one for several matrices, of another width, or over no token.
    pub fn of(&self, name: &str, width: usize) -> Result<(&[f32], f32), String> {
        let Some(entry) = self.entries.get(name) else {
            return Err(format!("has no entry for {name}"));
        };
        let matrices = entry.counts.len();
        if matrices != 1 {
            return Err(format!("{name}: is of {matrices} matrices, the model has one there"));
        }
        if entry.sums.len() != width {
            let own = entry.sums.len();
            return Err(format!("{name}: has {own} channels, the model's weight has {width}"));
        }
        if entry.counts[0] < 1.0 {
            return Err(format!("{name}: is taken over no token"));
        }
        Ok((&entry.sums, entry.counts[0]))
    }

    /// Writes the file, entries sorted by name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        let mut metadata = Metadata::default();
        metadata.put_text("general.type", TYPE);
        let datasets = Array::Strings(self.datasets.clone());
        metadata.put("imatrix.datasets", Value::Array(datasets));
        metadata.put("imatrix.chunk_count", Value::U32(self.chunk_count));
        metadata.put("imatrix.chunk_size", Value::U32(self.chunk_size));
        let mut tensors = Vec::with_capacity(2 * self.entries.len());
        for (name, entry) in &self.entries {
            let matrices = entry.counts.len();
            let mut declare = |end: &str, width: usize| {
                let shape = vec![matrices, width];
                tensors.push(Declared { name: format!("{name}{end}"), ty: GgmlType::F32, shape });
            };
            declare(SUMS, entry.sums.len() / matrices.max(1));
            declare(COUNTS, 1);
        }
        let mut writer = GgufWriter::create(path, &metadata, &tensors)?;
        let bytes = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        };
        for (name, entry) in &self.entries {
            writer.write(&format!("{name}{SUMS}"), &bytes(&entry.sums))?;
            writer.write(&format!("{name}{COUNTS}"), &bytes(&entry.counts))?;
        }
        writer.finish()
    }
}

/// The older form begins with the number of entries and the length of the first name; whatever else has no magic is
/// something else.
fn old_form(file: &[u8]) -> String {
    let number = |at: usize| {
        let bytes = file.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(i32::from_le_bytes(bytes)).ok()
    };
    let name = number(0)
        .filter(|&entries| entries > 0)
        .and_then(|_| file.get(8..8 + number(4).filter(|&length| length < 256)?));
    if name.is_some_and(|name| name.ends_with(b".weight")) {
        return "is an importance matrix in the older form (.dat), which is not read; convert it: \
                llama-imatrix --in-file OLD -o NEW.gguf"
            .into();
    }
    "is no importance matrix: it does not begin with GGUF".into()
}

fn entries(file: &[u8], header: &Header) -> Result<BTreeMap<String, Entry>, String> {
    let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
    let mut counts: BTreeMap<&str, Vec<f32>> = BTreeMap::new();
    let mut widths: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in &header.tensors {
        let shown = brief(&tensor.name);
        let sums = tensor.name.strip_suffix(SUMS);
        let Some(name) = sums.or_else(|| tensor.name.strip_suffix(COUNTS)) else {
            return Err(format!("tensor {shown} is neither {SUMS} nor {COUNTS} of a weight"));
        };
        if tensor.ty != GgmlType::F32 {
            return Err(format!("tensor {shown} is {}; sums and counts are F32", tensor.ty));
        }
        let bytes = file.get(tensor.start..tensor.start + tensor.length).unwrap_or_default();
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let values: Vec<f32> = values.collect();
        if let Some(at) = values.iter().position(|v| !v.is_finite() || *v < 0.0) {
            return Err(format!(
                "tensor {shown} holds {} at {at}; sums of squares and counts are neither negative nor NaN",
                values[at]
            ));
        }
        if sums.is_some() {
            widths.insert(name, tensor.dims[0]);
            entries.insert(name.to_owned(), Entry { sums: values, counts: Vec::new() });
        } else {
            counts.insert(name, values);
        }
    }
    if let Some(name) = counts.keys().find(|name| !entries.contains_key(**name)) {
        return Err(format!("{} has counts, but no sums", brief(name)));
    }
    for (name, entry) in &mut entries {
        let own = counts.remove(name.as_str());
        entry.counts = own.ok_or_else(|| format!("{} has sums, but no counts", brief(name)))?;
        let (sums, matrices) = (entry.sums.len(), entry.counts.len());
        if matrices.checked_mul(widths[name.as_str()]) != Some(sums) {
            return Err(format!("{}: {sums} sums do not fit {matrices} counts", brief(name)));
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Imatrix {
        let entry =
            |sums: &[f32], counts: &[f32]| Entry { sums: sums.into(), counts: counts.into() };
        let entries = [
            ("blk.0.attn_q.weight", entry(&[1.0, 0.0, 2.5, 4.0], &[8.0])),
            ("blk.0.ffn_up_exps.weight", entry(&[1.0, 2.0, 3.0, 4.0], &[3.0, 0.0])),
        ];
        Imatrix {
            datasets: vec!["calib.txt".into()],
            chunk_count: 2,
            chunk_size: 4,
            entries: entries.into_iter().map(|(name, e)| (name.to_owned(), e)).collect(),
        }
    }

    fn bytes_of(own: &Imatrix) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.gguf");
        own.write(&path).unwrap();
        let (again, hash) = Imatrix::open(&path).unwrap();
        assert_eq!(again, *own);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(hash, crate::hash_bytes(&bytes));
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let own = sample();
        bytes_of(&own);
        assert_eq!(own.of("blk.0.attn_q.weight", 4), Ok((&[1.0, 0.0, 2.5, 4.0][..], 8.0)));
    }

    #[test]
    fn weights_that_do_not_fit_are_named() {
        let mut own = sample();
        let error = |own: &Imatrix, name: &str, width| own.of(name, width).unwrap_err();
        let missing = error(&own, "blk.1.attn_q.weight", 4);
        assert_eq!(missing, "has no entry for blk.1.attn_q.weight");
        let narrow = error(&own, "blk.0.attn_q.weight", 8);
        assert!(narrow.contains("attn_q") && narrow.contains("4 channels"), "{narrow}");
        let experts = error(&own, "blk.0.ffn_up_exps.weight", 2);
        assert!(experts.contains("2 matrices"), "{experts}");
        own.entries.get_mut("blk.0.attn_q.weight").unwrap().counts[0] = 0.0;
        let none = error(&own, "blk.0.attn_q.weight", 4);
        assert!(none.contains("no token"), "{none}");
    }

    /// Replaces the first occurrence of a text by another of the same length.
    fn with(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        let mut out = bytes.to_vec();
        out[at..at + to.len()].copy_from_slice(to);
        out
    }

    #[test]
    fn damaged_files_are_refused() {
        let bytes = bytes_of(&sample());
        let refused = |bytes: &[u8], words: &str| {
            let error = Imatrix::parse(bytes).unwrap_err();
            assert!(error.contains(words), "{error} lacks {words}");
        };
        for end in 0..bytes.len() - 32 {
            assert!(Imatrix::parse(&bytes[..end]).is_err(), "cut at {end}");
        }
        refused(&with(&bytes, b"imatrix", b"imetrix"), "general.type is `imetrix`");
        refused(&with(&bytes, b"general.type", b"general.typo"), "no general.type");
        for key in ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"] {
            let other = key.replace("imatrix.", "imatriy.");
            refused(&with(&bytes, key.as_bytes(), other.as_bytes()), key);
        }
        refused(&with(&bytes, b"q.weight.in_sum2", b"q.weight.in_summ"), "neither");
        refused(&with(&bytes, b"q.weight.counts", b"k.weight.counts"), "no sums");
        let value = |v: f32| v.to_le_bytes();
        refused(
            &with(&bytes, &value(2.5), &value(f32::NAN)),
            "attn_q.weight.in_sum2 holds NaN at 2",
        );
        refused(&with(&bytes, &value(2.5), &value(-2.5)), "holds -2.5");
        refused(&with(&bytes, &value(8.0), &value(f32::INFINITY)), "counts holds inf");
        let mut odd = sample();
        odd.entries.get_mut("blk.0.ffn_up_exps.weight").unwrap().counts.push(1.0);
        let folder = tempfile::tempdir().unwrap();
        odd.entries.get_mut("blk.0.ffn_up_exps.weight").unwrap().sums.truncate(3);
        odd.write(&folder.path().join("odd")).unwrap();
        odd.entries.clear();
        odd.write(&folder.path().join("none")).unwrap();
        refused(&std::fs::read(folder.path().join("none")).unwrap(), "holds no importances");
        refused(b"safetensors", "does not begin with GGUF");
        refused(b"GG", "beyond the end");
    }

    #[test]
    fn the_older_form_is_told_what_it_is() {
        let name = b"blk.0.attn_q.weight";
        let mut old = Vec::new();
        old.extend(1i32.to_le_bytes());
        old.extend((name.len() as i32).to_le_bytes());
        old.extend(name);
        old.extend([0; 32]);
        let error = Imatrix::parse(&old).unwrap_err();
        assert!(error.contains(".dat") && error.contains("llama-imatrix"), "{error}");
    }
}
