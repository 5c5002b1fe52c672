//! attar-kernels
