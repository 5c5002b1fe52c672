//! attar-eval
