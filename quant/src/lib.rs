//! attar-quant
