//! attar-ir
