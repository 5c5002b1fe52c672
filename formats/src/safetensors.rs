//! The safetensors container: 8 bytes of header length, a JSON header, data. Reading maps the file and
//! checks every length, offset and shape before use; writing declares all tensors first and then takes
//! them in any order with positioned writes.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use attar_tensor::{DType, SourceError, Tensor, TensorHeader, TensorSink, TensorView};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map as JsonMap, json};

use crate::{FormatError, brief, mmap::Map};

/// Largest header that is believed, bytes.
const MAX_HEADER: u64 = 100_000_000;
/// Data begins at a multiple of this, so that mapped tensors are aligned.
const ALIGN: usize = 64;

/// Most dimensions of a tensor.
pub(crate) const MAX_RANK: usize = 16;

/// A tensor found in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Name, dtype, shape.
    pub header: TensorHeader,
    /// First byte in the file.
    pub start: usize,
    /// Bytes in the file.
    pub length: usize,
}

/// What a header says of one tensor; keys beyond these three are ignored.
#[derive(Deserialize)]
struct Entry {
    dtype: Option<String>,
    shape: Option<Dims<MAX_RANK>>,
    data_offsets: Option<Dims<2>>,
}

/// A list of at most `N` sizes.
struct Dims<const N: usize>(Vec<usize>);

impl<'de, const N: usize> Deserialize<'de> for Dims<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct List<const N: usize>;
        impl<'de, const N: usize> Visitor<'de> for List<N> {
            type Value = Vec<usize>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a shape or offsets: a list of at most {N} non-negative integers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = list.next_element::<u64>().map_err(|error| {
                    A::Error::custom(format!(
                        "in a list of shape or data_offsets: {}",
                        brief(error)
                    ))
                })? {
                    if sizes.len() == N {
                        return Err(A::Error::invalid_length(N + 1, &self));
                    }
                    sizes.push(usize::try_from(size).map_err(A::Error::custom)?);
                }
                Ok(sizes)
            }
        }
        from.deserialize_seq(List::<N>).map(Self)
    }
}

/// The tensors of a header as they stand in it, `__metadata__` left out.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Table;
        impl<'de> Visitor<'de> for Table {
            type Value = Vec<(String, Entry)>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a table of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    match map.next_value() {
                        Ok(entry) => entries.push((name, entry)),
                        Err(error) => {
                            let (name, error) = (brief(name), brief(error));
                            return Err(A::Error::custom(format!("tensor {name}: {error}")));
                        }
                    }
                }
                Ok(entries)
            }
        }
        from.deserialize_map(Table).map(Self)
    }
}

/// The tensors of a safetensors file whose bytes are `file`, sorted by name. Every length, offset and
/// shape is checked; the data are not touched. Memory taken: at most 64 bytes for each byte of the header
/// plus 16 KiB, whatever the numbers in it say.
///
/// # Errors
/// Truncated files, lying headers, names that stand twice, overlapping or uncovered data, unknown dtypes.
pub fn parse(file: &[u8]) -> Result<Vec<Placed>, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!(
            "{} bytes are too few for a safetensors file; it is truncated",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(format!(
            "the header claims {length} bytes, but the file has {}; it is truncated or not safetensors",
            file.len()
        ));
    }
    let start = 8 + length as usize;
    let data = file.len() - start;
    let Entries(entries) = serde_json::from_slice(&file[8..start])
        .map_err(|error| format!("the header is not valid JSON of tensors: {}", brief(error)))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, Entry { dtype, shape, data_offsets }) in entries {
        let wrong = |what: &str| format!("tensor {}: {what}", brief(&name));
        let dtype = dtype.ok_or_else(|| wrong("no dtype"))?;
        let dtype = DType::from_safetensors_name(&dtype)
            .ok_or_else(|| wrong(&format!("dtype {} is not supported", brief(&dtype))))?;
        let Dims(shape) = shape.ok_or_else(|| wrong("no shape"))?;
        let Dims(offsets) = data_offsets.ok_or_else(|| wrong("no data_offsets"))?;
        let &[begin, end] = offsets.as_slice() else {
            return Err(wrong("data_offsets is not a pair"));
        };
        let expected = shape
            .iter()
            .try_fold(dtype.size(), |size, &dim| size.checked_mul(dim))
            .ok_or_else(|| wrong("the shape overflows"))?;
        if begin > end || end > data {
            return Err(wrong(&format!(
                "data_offsets {begin}..{end} lie outside the file's {data} bytes of data; the file is truncated"
            )));
        }
        if end - begin != expected {
            return Err(wrong(&format!(
                "{dtype} {shape:?} takes {expected} bytes, but data_offsets span {}",
                end - begin
            )));
        }
        let header = TensorHeader { name, dtype, shape };
        tensors.push(Placed { header, start: start + begin, length: expected });
    }
    tensors.sort_by_key(|tensor| (tensor.start, tensor.length));
    let mut at = start;
    for Placed { header, start, length } in &tensors {
        if *start < at {
            return Err(format!(
                "tensor {}: its data overlaps another tensor's",
                brief(&header.name)
            ));
        }
        if *start > at {
            return Err(format!(
                "{} bytes before tensor {} belong to no tensor",
                start - at,
                brief(&header.name)
            ));
        }
        at = start + length;
    }
    if at != file.len() {
        return Err(format!("{} bytes at the end belong to no tensor", file.len() - at));
    }
    tensors.sort_by(|a, b| a.header.name.cmp(&b.header.name));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].header.name == pair[1].header.name) {
        return Err(format!("tensor {} stands twice in the header", brief(&pair[0].header.name)));
    }
    Ok(tensors)
}

/// One mapped file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Map,
    tensors: Vec<Placed>,
}

impl SafetensorsFile {
    /// Maps and checks a file; memory as [`parse`].
    ///
    /// # Errors
    /// As [`parse`], and when it is no regular file.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let map = Map::open(&crate::open_regular(path)?).map_err(FormatError::io(path))?;
        let tensors = parse(map.bytes()).map_err(|reason| FormatError::invalid(path, reason))?;
        Ok(Self { path: path.to_path_buf(), map, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Headers, sorted by name.
    pub fn headers(&self) -> impl Iterator<Item = &TensorHeader> {
        self.tensors.iter().map(|tensor| &tensor.header)
    }

    fn find(&self, name: &str) -> Option<&Placed> {
        let at = self.tensors.binary_search_by(|t| t.header.name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[at])
    }

    /// First byte and number of bytes of a tensor in the file.
    pub fn place(&self, name: &str) -> Option<(usize, usize)> {
        self.find(name).map(|tensor| (tensor.start, tensor.length))
    }

    /// The mapped data of one tensor.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let Placed { header, start, length } = self.find(name)?;
        let bytes = &self.map.bytes()[*start..start + length];
        TensorView::new(header.dtype, header.shape.clone(), bytes).ok()
    }

    /// Asks the system to read the tensor ahead.
    pub fn prefetch(&self, name: &str) {
        if let Some(tensor) = self.find(name) {
            self.map.prefetch(tensor.start, tensor.length);
        }
    }

    /// Gives the tensor's mapped pages back.
    pub fn release(&self, name: &str) {
        if let Some(tensor) = self.find(name) {
            self.map.release(tensor.start, tensor.length);
        }
    }
}

#[derive(Debug)]
struct Slot {
    header: TensorHeader,
    shard: usize,
    offset: u64,
    written: bool,
}

/// Writes declared tensors into one or several safetensors files.
#[derive(Debug)]
pub struct SafetensorsWriter {
    slots: Vec<Slot>,
    shards: Vec<(PathBuf, File)>,
}

impl SafetensorsWriter {
    /// Creates `model.safetensors` (or numbered shards and an index when the data exceed `shard_bytes`)
    /// in `folder`, with every tensor declared.
    ///
    /// # Errors
    /// When a name is declared twice or a file cannot be created.
    pub fn create(
        folder: &Path,
        mut headers: Vec<TensorHeader>,
        shard_bytes: usize,
    ) -> Result<Self, FormatError> {
        headers.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = headers.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(FormatError::invalid(
                folder,
                format!("tensor {} is declared twice", pair[0].name),
            ));
        }
        let mut groups: Vec<Vec<TensorHeader>> = vec![Vec::new()];
        let (mut filled, mut total) = (0usize, 0usize);
        for header in headers {
            let bytes = header.bytes();
            if filled > 0 && filled + bytes > shard_bytes {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            total += bytes;
            groups.last_mut().expect("the list begins with one group").push(header);
        }
        let count = groups.len();
        let (mut slots, mut shards, mut index) = (Vec::new(), Vec::new(), JsonMap::new());
        for (shard, headers) in groups.into_iter().enumerate() {
            let name = if count == 1 {
                "model.safetensors".to_owned()
            } else {
                format!("model-{:05}-of-{count:05}.safetensors", shard + 1)
            };
            let path = folder.join(&name);
            // Data in the order dtype size, then name: every tensor stays aligned to its dtype.
            let mut order: Vec<usize> = (0..headers.len()).collect();
            order.sort_by(|&a, &b| {
                headers[b].dtype.size().cmp(&headers[a].dtype.size()).then(a.cmp(&b))
            });
            let mut offsets = vec![0usize; headers.len()];
            let mut at = 0;
            for &i in &order {
                offsets[i] = at;
                at += headers[i].bytes();
            }
            let mut json = JsonMap::new();
            json.insert("__metadata__".into(), json!({"format": "pt"}));
            for (header, &offset) in headers.iter().zip(&offsets) {
                json.insert(
                    header.name.clone(),
                    json!({
                        "dtype": header.dtype.safetensors_name(),
                        "shape": header.shape,
                        "data_offsets": [offset, offset + header.bytes()],
                    }),
                );
                index.insert(header.name.clone(), json!(name));
            }
            let mut text = serde_json::to_vec(&json).expect("a JSON map serializes");
            text.resize((text.len() + 8).next_multiple_of(ALIGN) - 8, b' ');
            let file = File::create(&path).map_err(FormatError::io(&path))?;
            let start = 8 + text.len() as u64;
            file.set_len(start + at as u64).map_err(FormatError::io(&path))?;
            file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)
                .map_err(FormatError::io(&path))?;
            file.write_all_at(&text, 8).map_err(FormatError::io(&path))?;
            for (header, offset) in headers.into_iter().zip(offsets) {
                slots.push(Slot { header, shard, offset: start + offset as u64, written: false });
            }
            shards.push((path, file));
        }
        if count > 1 {
            let path = folder.join("model.safetensors.index.json");
            let text = json!({"metadata": {"total_size": total}, "weight_map": index});
            let text = serde_json::to_vec_pretty(&text).expect("a JSON map serializes");
            std::fs::write(&path, text).map_err(FormatError::io(&path))?;
        }
        slots.sort_by(|a, b| a.header.name.cmp(&b.header.name));
        Ok(Self { slots, shards })
    }

    /// Writes raw bytes of a declared tensor.
    ///
    /// # Errors
    /// As [`TensorSink::write`].
    pub fn write_view(&mut self, name: &str, view: &TensorView<'_>) -> Result<(), SourceError> {
        let at = self.slots.binary_search_by(|slot| slot.header.name.as_str().cmp(name)).map_err(
            |_| SourceError::Missing { name: name.into(), place: "the declared output".into() },
        )?;
        let slot = &mut self.slots[at];
        if slot.header.dtype != view.dtype() || slot.header.shape != view.shape() || slot.written {
            return Err(SourceError::Invalid {
                name: name.into(),
                reason: format!(
                    "declared as {} {:?}, written as {} {:?}{}",
                    slot.header.dtype,
                    slot.header.shape,
                    view.dtype(),
                    view.shape(),
                    if slot.written { " for the second time" } else { "" }
                ),
            });
        }
        let (path, file) = &self.shards[slot.shard];
        file.write_all_at(view.bytes(), slot.offset).map_err(|source| SourceError::Io {
            name: format!("{name} (to {})", path.display()),
            source,
        })?;
        slot.written = true;
        Ok(())
    }

    /// Checks that every declared tensor was written and flushes the files to disk.
    ///
    /// # Errors
    /// When a tensor is missing or the disk refuses.
    pub fn finish(self) -> Result<(), FormatError> {
        for (path, file) in &self.shards {
            file.sync_all().map_err(FormatError::io(path))?;
        }
        self.close()
    }

    /// As [`SafetensorsWriter::finish`], but leaves it to the system when the bytes reach the disk.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn close(self) -> Result<(), FormatError> {
        if let Some(slot) = self.slots.iter().find(|slot| !slot.written) {
            let path = &self.shards[slot.shard].0;
            return Err(FormatError::invalid(
                path,
                format!("tensor {} was never written", slot.header.name),
            ));
        }
        Ok(())
    }

    /// Writes a part of a declared tensor, `offset` bytes from its beginning; the whole counts as written
    /// with its last byte.
    ///
    /// # Errors
    /// As [`TensorSink::write`], or when the part reaches beyond the tensor.
    pub fn write_part(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), SourceError> {
        let at = self.slots.binary_search_by(|slot| slot.header.name.as_str().cmp(name)).map_err(
            |_| SourceError::Missing { name: name.into(), place: "the declared output".into() },
        )?;
        let slot = &mut self.slots[at];
        let (end, size) = (offset + bytes.len() as u64, slot.header.bytes() as u64);
        if end > size {
            return Err(SourceError::Invalid {
                name: name.into(),
                reason: format!("a part ends at byte {end} of {size}"),
            });
        }
        let (path, file) = &self.shards[slot.shard];
        file.write_all_at(bytes, slot.offset + offset).map_err(|source| SourceError::Io {
            name: format!("{name} (to {})", path.display()),
            source,
        })?;
        slot.written |= end == size;
        Ok(())
    }
}

impl TensorSink for SafetensorsWriter {
    fn write(&mut self, name: &str, tensor: &Tensor) -> Result<(), SourceError> {
        self.write_view(name, &tensor.view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn every_lie_of_a_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let t = |dtype: &str, shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        let two = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
        let cases: Vec<(&str, Vec<u8>, &str)> = vec![
            ("empty", vec![], "truncated"),
            ("huge header", u64::MAX.to_le_bytes().to_vec(), "truncated"),
            ("not JSON", file("{]", &[]), "not valid JSON"),
            ("beyond the end", file(&t("F32", "[2]", "[0,8]"), &[0; 4]), "truncated"),
            ("shape lies", file(&t("F32", "[3]", "[0,8]"), &[0; 8]), "takes 12 bytes"),
            ("overflow", file(&t("F32", "[18446744073709551615,8]", "[0,8]"), &[0; 8]), "overflow"),
            ("backwards", file(&t("F32", "[2]", "[8,0]"), &[0; 8]), "outside"),
            ("dtype", file(&t("F7", "[2]", "[0,8]"), &[0; 8]), "F7"),
            ("overlap", file(two, &[0; 12]), "overlaps"),
            ("hole", file(&t("F32", "[2]", "[4,12]"), &[0; 12]), "belong to no tensor"),
            ("tail", file(&t("F32", "[2]", "[0,8]"), &[0; 9]), "belong to no tensor"),
            ("negative", file(&t("F32", "[-1]", "[0,8]"), &[0; 8]), "shape"),
            ("fraction", file(&t("F32", "[2.0]", "[0,8]"), &[0; 8]), "tensor a: "),
            ("rank", file(&t("F32", &format!("{:?}", [1; 17]), "[0,4]"), &[0; 4]), "at most 16"),
            ("three offsets", file(&t("F32", "[2]", "[0,4,8]"), &[0; 8]), "at most 2"),
            (
                "no shape",
                file(r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, &[0; 4]),
                "no shape",
            ),
            ("twice", file(twice, &[0; 8]), "tensor a stands twice"),
            ("deep", file(&format!("{{\"a\":{}", "[".repeat(100_000)), &[]), "not valid JSON"),
            ("list", file("[]", &[]), "a table of tensors"),
        ];
        for (name, bytes, expected) in cases {
            std::fs::write(&path, bytes).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
    }

    #[test]
    fn shards_written_in_any_order_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let header = |name: &str, n: usize| TensorHeader {
            name: name.into(),
            dtype: DType::F32,
            shape: vec![n],
        };
        let headers = vec![header("c", 8), header("a", 4), header("b", 6)];
        let mut writer = SafetensorsWriter::create(dir.path(), headers, 48).unwrap();
        for (name, n) in [("b", 6), ("c", 8), ("a", 4)] {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            writer.write(name, &Tensor::from_f32(DType::F32, vec![n], &values).unwrap()).unwrap();
        }
        let wrong = Tensor::from_f32(DType::F32, vec![1], &[0.0]).unwrap();
        assert!(writer.write("a", &wrong).is_err());
        assert!(writer.write("z", &wrong).is_err());
        writer.finish().unwrap();
        let first =
            SafetensorsFile::open(&dir.path().join("model-00001-of-00002.safetensors")).unwrap();
        assert_eq!(first.view("b").unwrap().to_i64(), None);
        assert!((first.view("b").unwrap().to_f32().unwrap()[5] - 5.0).abs() < 1e-6);
        first.release("b");
        assert_eq!(first.view("b").unwrap().to_i64(), None);
        assert!((first.view("b").unwrap().to_f32().unwrap()[5] - 5.0).abs() < 1e-6);
        let bytes = std::fs::read(first.path()).unwrap();
        assert!(
            safetensors::SafeTensors::deserialize(&bytes).is_ok(),
            "the reference reader agrees"
        );

        let lost = SafetensorsWriter::create(dir.path(), vec![header("a", 1)], 48).unwrap();
        assert!(lost.finish().unwrap_err().to_string().contains("never written"));
    }
}
