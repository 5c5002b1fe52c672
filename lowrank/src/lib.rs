//! Low-rank passes. Those that factor ([`PASSES`]: svd, asvd, fwsvd, svd_llm) put two thin matrices in the place of one and take
//! parameters away; svd_update fits one of the two again; those that correct (eora, lorc) put a product of thin matrices
//! beside a quantized weight.

mod asvd;
mod common;
mod eora;
mod fwsvd;
mod lorc;
mod options;
mod svd;
mod svd_llm;
mod svd_update;

use attar_ir::PassDef;

/// Every pass of this crate on one block after the other.
pub const PASSES: &[PassDef] =
    &[svd::DEF, asvd::DEF, fwsvd::DEF, svd_llm::DEF, svd_update::DEF, eora::DEF, lorc::DEF];
