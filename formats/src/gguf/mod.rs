//! GGUF, the container of llama.cpp: a magic, metadata, tensor infos, aligned data.
//!
//! Reader and writer are ours. `gguf-rs` sizes BF16, the integer types, IQ4_NL and MXFP4 wrongly and panics on
//! types that it does not know; it serves as a second reader in tests for the rest.

pub mod artifact;
pub mod imatrix;
pub mod names;
pub mod params;
pub mod reader;
pub mod source;
pub mod types;
pub mod value;
pub mod vocab;
pub mod writer;

pub use imatrix::Imatrix;
pub use params::Params;
pub use reader::{GgufFile, Header, Placed};
pub use source::Gguf;
pub use types::GgmlType;
pub use value::{Array, Metadata, Value};
pub use writer::{Declared, GgufWriter};

#[cfg(test)]
mod tests;
