//! Reading: the file is mapped, and every length, offset, type and size is checked before it is used.

use std::{collections::HashSet, path::Path, path::PathBuf};

use super::{
    GgmlType,
    value::{Array, Kind, Metadata, Value, number},
};
use crate::{FormatError, brief, mmap::Map};

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 4;
/// Longest name of a tensor or key, bytes.
const MAX_NAME: usize = 65_535;
/// Deepest nesting of lists.
const MAX_DEPTH: usize = 4;
/// Where data begin at a multiple of, when the file does not say.
pub const DEFAULT_ALIGNMENT: usize = 32;
/// Largest alignment that is believed.
const MAX_ALIGNMENT: usize = 1 << 20;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Name in the file.
    pub name: String,
    /// Its type, known or not.
    pub ty: GgmlType,
    /// Dimensions as the file gives them: the row length first.
    pub dims: Vec<usize>,
    /// First byte in the file.
    pub start: usize,
    /// Bytes. For a type that this build does not know: all up to the next tensor or the end of the file.
    pub length: usize,
}

impl Placed {
    /// Shape, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().rev().copied().collect()
    }
}

/// What stands before the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Of the tensors' data.
    pub alignment: usize,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in the order of the file.
    pub tensors: Vec<Placed>,
}

/// Bytes that are taken from the front.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], String> {
        let count = usize::try_from(count).ok().filter(|&count| count <= self.left());
        let count = count.ok_or_else(|| {
            format!("{what} at byte {} reaches beyond the end of the file", self.at)
        })?;
        let bytes = &self.file[self.at..self.at + count];
        self.at += count;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        let bytes = self.take(8, what)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes were taken")))
    }

    fn text(&mut self, what: &str) -> Result<&'a str, String> {
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    /// A count of things that take at least so many bytes each.
    fn count(&mut self, least: usize, what: &str) -> Result<usize, String> {
        let count = self.u64(what)?;
        usize::try_from(count).ok().filter(|&count| count <= self.left() / least).ok_or_else(|| {
            format!("claims {count} {what}, more than the rest of the file can hold")
        })
    }

    fn kind(&mut self, what: &str) -> Result<Kind, String> {
        let kind = self.u32(what)?;
        Kind::ALL
            .into_iter()
            .find(|known| *known as u32 == kind)
            .ok_or_else(|| format!("{what} is of the unknown kind {kind}"))
    }

    fn value(&mut self, kind: Kind, what: &str) -> Result<Value, String> {
        Ok(match kind {
            Kind::String => Value::String(self.text(what)?.to_owned()),
            Kind::Array => Value::Array(self.array(0, what)?),
            kind => {
                let bytes = self.take(kind.least_bytes() as u64, what)?;
                if kind == Kind::Bool && bytes[0] > 1 {
                    return Err(format!("{what} is neither true nor false but {}", bytes[0]));
                }
                number(kind, bytes)
            }
        })
    }

    fn array(&mut self, depth: usize, what: &str) -> Result<Array, String> {
        if depth >= MAX_DEPTH {
            return Err(format!("{what} nests lists deeper than {MAX_DEPTH}"));
        }
        let kind = self.kind(what)?;
        let count = self.count(kind.least_bytes(), &format!("items of {what}"))?;
        Ok(match kind {
            Kind::String => {
                let texts = (0..count).map(|_| self.text(what).map(str::to_owned));
                Array::Strings(texts.collect::<Result<_, _>>()?)
            }
            Kind::Array => {
                let lists = (0..count).map(|_| self.array(depth + 1, what));
                Array::Arrays(lists.collect::<Result<_, _>>()?)
            }
            kind => {
                let bytes = self.take((count * kind.least_bytes()) as u64, what)?;
                if kind == Kind::Bool && bytes.iter().any(|&byte| byte > 1) {
                    return Err(format!("{what} holds bytes that are neither true nor false"));
                }
                Array::Numbers { kind, bytes: bytes.to_vec() }
            }
        })
    }
}

/// Reads the header of a file that is given as a whole. Memory taken: at most 16 bytes for each byte of the
/// header.
///
/// # Errors
/// Whatever is not as the format says: another magic or version, big-endian numbers, lengths and counts beyond
/// the file, keys or tensors that stand twice, dimensions that overflow or are no whole blocks, data that are
/// misaligned, beyond the file or overlap.
pub fn parse(file: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { file, at: 0 };
    let magic = cursor.take(4, "the magic")?;
    if magic != b"GGUF" {
        return Err(format!("is no GGUF file: it begins with {magic:02x?}"));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => {
            return Err(
                "is of GGUF version 1, which nothing writes any more; convert it again".into()
            );
        }
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err("has big-endian numbers, which are not read".into());
        }
        other => return Err(format!("is of GGUF version {other}; versions 2 and 3 are read")),
    }
    // A tensor takes a length, a number of dimensions, one dimension, a type and an offset.
    let tensor_count = cursor.count(32, "tensors")?;
    let key_count = cursor.count(13, "metadata keys")?;
    let mut metadata = Metadata::default();
    let mut keys = HashSet::new();
    for _ in 0..key_count {
        let key = cursor.text("a metadata key")?;
        if key.is_empty() || key.len() > MAX_NAME {
            return Err(format!("has a metadata key of {} bytes", key.len()));
        }
        if !keys.insert(key) {
            return Err(format!("metadata key {} stands twice", brief(key)));
        }
        let what = format!("metadata {}", brief(key));
        let kind = cursor.kind(&what)?;
        let value = cursor.value(kind, &what)?;
        metadata.0.push((key.to_owned(), value));
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => {
            let number = value.integer().and_then(|value| usize::try_from(value).ok());
            number.filter(|n| n.is_power_of_two() && *n <= MAX_ALIGNMENT).ok_or_else(|| {
                format!("general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
            })?
        }
    };
    let mut tensors = Vec::with_capacity(tensor_count);
    let mut offsets = Vec::with_capacity(tensor_count);
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let name = cursor.text("the name of a tensor")?;
        let fail = |reason: String| format!("tensor {}: {reason}", brief(name));
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(format!("has a tensor with a name of {} bytes", name.len()));
        }
        if !names.insert(name) {
            return Err(fail("stands twice".into()));
        }
        let rank = cursor.u32("a number of dimensions")? as usize;
        if rank == 0 || rank > MAX_DIMS {
            return Err(fail(format!("has {rank} dimensions, not 1 to {MAX_DIMS}")));
        }
        let mut dims = Vec::with_capacity(rank);
        let mut elements = 1usize;
        for _ in 0..rank {
            let dim = usize::try_from(cursor.u64("a dimension")?).ok().filter(|&dim| dim > 0);
            let dim =
                dim.ok_or_else(|| fail("has a dimension of 0 or beyond this machine".into()))?;
            elements = elements
                .checked_mul(dim)
                .filter(|&n| isize::try_from(n).is_ok())
                .ok_or_else(|| fail("has dimensions whose product overflows".into()))?;
            dims.push(dim);
        }
        let ty = GgmlType(cursor.u32("a type")?);
        let length = match ty.block_size() {
            None => 0,
            Some((size, _)) => {
                let row = ty.row_bytes(dims[0]).ok_or_else(|| {
                    fail(format!("has rows of {}, no multiple of the {size} of {ty}", dims[0]))
                })?;
                row.checked_mul(elements / dims[0])
                    .filter(|&n| isize::try_from(n).is_ok())
                    .ok_or_else(|| fail("takes more bytes than there can be".into()))?
            }
        };
        let offset = cursor.u64("an offset")?;
        let offset = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(alignment));
        offsets
            .push(offset.ok_or_else(|| {
                fail(format!("lies at no multiple of the alignment {alignment}"))
            })?);
        tensors.push(Placed { name: name.to_owned(), ty, dims, start: 0, length });
    }
    let data = cursor.at.next_multiple_of(alignment);
    place(&mut tensors, &offsets, data, file.len())?;
    Ok(Header { version, alignment, metadata, tensors })
}

/// Puts every tensor at its place in the file, which begins its data at `data` and has `end` bytes.
fn place(tensors: &mut [Placed], offsets: &[usize], data: usize, end: usize) -> Result<(), String> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&at| (offsets[at], at));
    for (place, &at) in order.iter().enumerate() {
        let next = order.get(place + 1).map(|&next| offsets[next].saturating_add(data));
        let tensor = &mut tensors[at];
        let fail = |reason: &str| format!("tensor {}: {reason}", brief(&tensor.name));
        let start = offsets[at]
            .checked_add(data)
            .filter(|&start| start <= end)
            .ok_or_else(|| fail("begins beyond the end of the file; it may be cut off"))?;
        let limit = next.unwrap_or(end).min(end);
        let length = if tensor.ty.block_size().is_none() {
            limit.saturating_sub(start)
        } else {
            let stop = start.checked_add(tensor.length);
            if stop.is_none_or(|stop| stop > end) {
                return Err(fail("reaches beyond the end of the file; it may be cut off"));
            }
            if stop.is_some_and(|stop| stop > limit) {
                return Err(fail("overlaps the next tensor"));
            }
            tensor.length
        };
        (tensor.start, tensor.length) = (start, length);
    }
    Ok(())
}

/// A mapped file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Map,
    header: Header,
}

impl GgufFile {
    /// Maps a file and reads its header; memory as [`parse`].
    ///
    /// # Errors
    /// When it cannot be opened or is not as the format says.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = crate::open_regular(path)?;
        let map = Map::open(&file).map_err(FormatError::io(path))?;
        let header = parse(map.bytes()).map_err(|reason| FormatError::invalid(path, reason))?;
        Ok(Self { path: path.to_path_buf(), map, header })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What stands before the data.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The data of a tensor.
    pub fn bytes(&self, tensor: &Placed) -> &[u8] {
        self.map.bytes().get(tensor.start..tensor.start + tensor.length).unwrap_or_default()
    }

    /// Asks the system to read a tensor ahead.
    pub(crate) fn prefetch(&self, tensor: &Placed) {
        self.map.prefetch(tensor.start, tensor.length);
    }

    /// Gives a tensor's pages back.
    pub(crate) fn release(&self, tensor: &Placed) {
        self.map.release(tensor.start, tensor.length);
    }
}
