//! attar-formats
