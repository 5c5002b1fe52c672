//! attar-model
