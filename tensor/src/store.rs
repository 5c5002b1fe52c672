//! Named tensors in, named tensors out: how crates that must not know files read and write tensors.

use crate::{DType, Tensor, TensorView};

/// What is known of a stored tensor without reading its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    /// Full name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

impl TensorHeader {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }
}

/// Why a named tensor could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The name is unknown.
    #[error("tensor {name} is missing from {place}")]
    Missing {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        place: String,
    },
    /// The tensor is there but not as promised.
    #[error("tensor {name}: {reason}")]
    Invalid {
        /// Its name.
        name: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("tensor {name}: {source}")]
    Io {
        /// Its name.
        name: String,
        /// The operating system's word.
        source: std::io::Error,
    },
}

/// Named tensors that can be read; sorted by name, so that iteration is deterministic.
pub trait TensorSource: Send + Sync {
    /// Every tensor, sorted by name.
    fn headers(&self) -> &[TensorHeader];

    /// The data of one tensor.
    ///
    /// # Errors
    /// [`SourceError::Missing`] when no such tensor exists, [`SourceError::Io`] when it cannot be read.
    fn read(&self, name: &str) -> Result<TensorView<'_>, SourceError>;

    /// One row of a matrix, `[1, columns]`: of a table of which few rows are used.
    ///
    /// # Errors
    /// As [`TensorSource::read`], and when there is no such row.
    fn read_row(&self, name: &str, row: usize) -> Result<TensorView<'_>, SourceError> {
        self.read(name)?.into_row(row).ok_or_else(|| SourceError::Invalid {
            name: name.to_owned(),
            reason: format!("has no row {row}"),
        })
    }

    /// Tells the source that this tensor's pages will not be used again soon, so that mapped memory
    /// can be given back. Has no effect on the data.
    fn release(&self, _name: &str) {}

    /// The header of one tensor.
    fn header(&self, name: &str) -> Option<&TensorHeader> {
        let headers = self.headers();
        headers.binary_search_by(|h| h.name.as_str().cmp(name)).ok().map(|at| &headers[at])
    }
}

/// Named tensors that can be written, in any order, each once.
pub trait TensorSink: Send {
    /// Writes one tensor whose header was declared before.
    ///
    /// # Errors
    /// [`SourceError::Missing`] when the name was not declared, [`SourceError::Invalid`] when dtype or
    /// shape differ from the declaration, [`SourceError::Io`] when the write fails.
    fn write(&mut self, name: &str, tensor: &Tensor) -> Result<(), SourceError>;
}
