//! A model as one GGUF file: tensors come by their Hugging Face names and are renamed, reordered and declared
//! here.

use std::{collections::BTreeMap, path::Path};

use attar_tensor::{BlockType, DType, SourceError, TensorHeader, TensorView};

use super::{Declared, GgmlType, GgufWriter, Metadata, Params, names};
use crate::FormatError;

/// Everything that a file needs beside its data.
#[derive(Debug)]
pub struct GgufPlan {
    /// Numbers of the architecture.
    pub params: Params,
    /// All keys.
    pub metadata: Metadata,
    /// Every tensor: `<name>.weight` and `.bias` of plain numbers, `<name>.blocks` of blocks.
    pub headers: Vec<TensorHeader>,
    /// Type of each `<name>.blocks`, by `<name>`.
    pub blocks: BTreeMap<String, BlockType>,
}

/// A file while it is written.
#[derive(Debug)]
pub struct GgufArtifact {
    writer: GgufWriter,
    params: Params,
    headers: BTreeMap<String, TensorHeader>,
}

/// The Hugging Face name of the tensor that a header stores.
fn plain(name: &str) -> String {
    name.strip_suffix(".blocks").map_or_else(|| name.to_owned(), |stem| format!("{stem}.weight"))
}

/// The name in the file of a header's tensor.
///
/// # Errors
/// When GGUF has none.
pub fn name_of(name: &str) -> Result<String, String> {
    names::to_gguf(&plain(name))
        .ok_or_else(|| format!("tensor {name} has no name in GGUF; such a model cannot be written"))
}

/// Embedding, blocks in order, norm, head.
fn order(name: &str) -> (u8, usize, &str) {
    let block = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    match (name, block) {
        ("token_embd.weight", _) => (0, 0, name),
        (_, Some((number, part))) => (1, number.parse().unwrap_or(usize::MAX), part),
        _ => (2, 0, name),
    }
}

impl GgufArtifact {
    pub(crate) fn create(path: &Path, plan: GgufPlan) -> Result<Self, FormatError> {
        let GgufPlan { params, metadata, headers, blocks } = plan;
        let invalid = |reason: String| FormatError::invalid(path, reason);
        let mut declared = Vec::new();
        for header in &headers {
            let mut shape = header.shape.clone();
            let ty = if let Some(stem) = header.name.strip_suffix(".blocks") {
                let block =
                    blocks.get(stem).ok_or_else(|| invalid(format!("{stem} has no type")))?;
                if let Some(last) = shape.last_mut() {
                    *last = *last / block.bytes() * block.size();
                }
                GgmlType::of_block(*block)
            } else {
                GgmlType::of_dtype(header.dtype).ok_or_else(|| {
                    invalid(format!("{}: GGUF has no type for {}", header.name, header.dtype))
                })?
            };
            declared.push(Declared { name: name_of(&header.name).map_err(&invalid)?, ty, shape });
        }
        let divisors = params.rope_divisors();
        if let Some(divisors) = &divisors {
            declared.push(Declared {
                name: names::ROPE_FREQS.into(),
                ty: GgmlType::F32,
                shape: vec![divisors.len()],
            });
        }
        declared.sort_by(|a, b| order(&a.name).cmp(&order(&b.name)));
        let mut writer = GgufWriter::create(path, &metadata, &declared)?;
        if let Some(divisors) = divisors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|value| value.to_le_bytes()).collect();
            writer.write(names::ROPE_FREQS, &bytes)?;
        }
        let headers = headers.into_iter().map(|header| (header.name.clone(), header)).collect();
        Ok(Self { writer, params, headers })
    }

    pub(crate) fn put(&mut self, name: &str, tensor: &TensorView<'_>) -> Result<(), SourceError> {
        let invalid = |reason: String| SourceError::Invalid { name: name.to_owned(), reason };
        let header = self.headers.get(name).ok_or_else(|| SourceError::Missing {
            name: name.to_owned(),
            place: "the declared output".into(),
        })?;
        if header.dtype != tensor.dtype() || header.shape != tensor.shape() {
            return Err(invalid(format!(
                "declared as {} {:?}, written as {} {:?}",
                header.dtype,
                header.shape,
                tensor.dtype(),
                tensor.shape()
            )));
        }
        let to = name_of(name).map_err(&invalid)?;
        let interleaved = self.params.interleaved()
            && [".attn_q.", ".attn_k."].iter().any(|part| to.contains(part));
        let result = if interleaved {
            let rows = header.shape.first().copied().unwrap_or(0);
            let order = names::interleave(rows, self.params.head_dim);
            self.writer.write(&to, &names::permute(tensor.bytes(), &order))
        } else {
            self.writer.write(&to, tensor.bytes())
        };
        result.map_err(|error| invalid(error.to_string()))
    }

    pub(crate) fn finish(self) -> Result<(), FormatError> {
        self.writer.finish()
    }
}

/// `general.file_type` of a file whose linears are mostly of this type.
pub fn file_type(block: Option<BlockType>, dense: DType) -> u32 {
    match block {
        Some(BlockType::Q40) => 2,
        Some(BlockType::Q41) => 3,
        Some(BlockType::Q80) => 7,
        Some(BlockType::Q50) => 8,
        Some(BlockType::Q51) => 9,
        Some(BlockType::Q2K) => 10,
        Some(BlockType::Q3K) => 11,
        Some(BlockType::Q4K) => 14,
        Some(BlockType::Q5K) => 16,
        Some(BlockType::Q6K) => 18,
        Some(BlockType::Iq4Nl) => 25,
        Some(BlockType::Iq4Xs) => 30,
        None => match dense {
            DType::F32 => 0,
            DType::BF16 => 32,
            _ => 1,
        },
    }
}
