//! Writing: everything is declared first, then the data are taken in any order.

use std::{
    fs::File,
    io::{BufWriter, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    GgmlType,
    reader::DEFAULT_ALIGNMENT,
    value::{Array, Metadata, Value},
};
use crate::FormatError;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    /// Name in the file.
    pub name: String,
    /// Its type.
    pub ty: GgmlType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    start: u64,
    length: usize,
    written: usize,
}

/// Writes a GGUF file of version 3.
#[derive(Debug)]
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    slots: Vec<Slot>,
}

fn text(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(text.as_bytes())
}

fn array(out: &mut impl Write, array: &Array) -> std::io::Result<()> {
    let head = |out: &mut dyn Write, kind: u32| {
        out.write_all(&kind.to_le_bytes())?;
        out.write_all(&(array.len() as u64).to_le_bytes())
    };
    match array {
        Array::Strings(items) => {
            head(out, 8)?;
            items.iter().try_for_each(|item| text(out, item))
        }
        Array::Arrays(items) => {
            head(out, 9)?;
            items.iter().try_for_each(|item| self::array(out, item))
        }
        Array::Numbers { kind, bytes } => {
            head(out, *kind as u32)?;
            out.write_all(bytes)
        }
    }
}

fn value(out: &mut impl Write, value: &Value) -> std::io::Result<()> {
    out.write_all(&(value.kind() as u32).to_le_bytes())?;
    match value {
        Value::U8(v) => out.write_all(&[*v]),
        Value::I8(v) => out.write_all(&v.to_le_bytes()),
        Value::U16(v) => out.write_all(&v.to_le_bytes()),
        Value::I16(v) => out.write_all(&v.to_le_bytes()),
        Value::U32(v) => out.write_all(&v.to_le_bytes()),
        Value::I32(v) => out.write_all(&v.to_le_bytes()),
        Value::F32(v) => out.write_all(&v.to_le_bytes()),
        Value::Bool(v) => out.write_all(&[u8::from(*v)]),
        Value::U64(v) => out.write_all(&v.to_le_bytes()),
        Value::I64(v) => out.write_all(&v.to_le_bytes()),
        Value::F64(v) => out.write_all(&v.to_le_bytes()),
        Value::String(v) => text(out, v),
        Value::Array(v) => array(out, v),
    }
}

impl GgufWriter {
    /// Creates the file with its header; data will lie in the order of `tensors`.
    ///
    /// # Errors
    /// When rows are no whole blocks, a name stands twice, or the file cannot be written.
    pub fn create(
        path: &Path,
        metadata: &Metadata,
        tensors: &[Declared],
    ) -> Result<Self, FormatError> {
        let invalid = |reason: String| FormatError::invalid(path, reason);
        let mut slots: Vec<Slot> = Vec::with_capacity(tensors.len());
        let mut offset = 0usize;
        let mut infos = Vec::new();
        for tensor in tensors {
            let Declared { name, ty, shape } = tensor;
            if slots.iter().any(|slot| slot.name == *name) {
                return Err(invalid(format!("tensor {name} is declared twice")));
            }
            let row =
                *shape.last().ok_or_else(|| invalid(format!("tensor {name} has no shape")))?;
            let bytes = ty.row_bytes(row).ok_or_else(|| {
                invalid(format!("tensor {name} has rows of {row}, no whole blocks of {ty}"))
            })?;
            let length = bytes * shape[..shape.len() - 1].iter().product::<usize>();
            text(&mut infos, name).map_err(FormatError::io(path))?;
            infos.extend((shape.len() as u32).to_le_bytes());
            for &dim in shape.iter().rev() {
                infos.extend((dim as u64).to_le_bytes());
            }
            infos.extend(ty.0.to_le_bytes());
            infos.extend((offset as u64).to_le_bytes());
            slots.push(Slot { name: name.clone(), start: offset as u64, length, written: 0 });
            offset = (offset + length).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        let file = File::create(path).map_err(FormatError::io(path))?;
        let write = || -> std::io::Result<u64> {
            let mut out = BufWriter::new(&file);
            out.write_all(b"GGUF")?;
            out.write_all(&3u32.to_le_bytes())?;
            out.write_all(&(tensors.len() as u64).to_le_bytes())?;
            out.write_all(&(metadata.0.len() as u64).to_le_bytes())?;
            for (key, item) in &metadata.0 {
                text(&mut out, key)?;
                value(&mut out, item)?;
            }
            out.write_all(&infos)?;
            out.flush()?;
            let start = file.metadata()?.len().next_multiple_of(DEFAULT_ALIGNMENT as u64);
            // Gaps between tensors are zeros; the last one is padded too, as other writers do.
            file.set_len(start + offset as u64)?;
            Ok(start)
        };
        let start = write().map_err(FormatError::io(path))?;
        for slot in &mut slots {
            slot.start += start;
        }
        Ok(Self { path: path.to_path_buf(), file, slots })
    }

    /// Writes the data of a tensor.
    ///
    /// # Errors
    /// When it was not declared, was written before, has another size, or the disk refuses.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let invalid = |reason: String| FormatError::invalid(&self.path, reason);
        let slot = self
            .slots
            .iter_mut()
            .find(|slot| slot.name == name)
            .ok_or_else(|| invalid(format!("tensor {name} was not declared")))?;
        if slot.length != bytes.len() || slot.written > 0 {
            let again = if slot.written > 0 { " for the second time" } else { "" };
            let (declared, got) = (slot.length, bytes.len());
            return Err(invalid(format!(
                "tensor {name} is declared with {declared} bytes and written with {got}{again}"
            )));
        }
        self.file.write_all_at(bytes, slot.start).map_err(FormatError::io(&self.path))?;
        slot.written = bytes.len();
        Ok(())
    }

    /// Checks that every tensor was written, and brings the file to the disk.
    ///
    /// # Errors
    /// When one was not, or the disk refuses.
    pub fn finish(self) -> Result<(), FormatError> {
        if let Some(slot) = self.slots.iter().find(|slot| slot.written != slot.length) {
            let reason = format!("tensor {} was never written", slot.name);
            return Err(FormatError::invalid(&self.path, reason));
        }
        self.file.sync_all().map_err(FormatError::io(&self.path))
    }
}
