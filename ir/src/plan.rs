//! The typed pass graph and its proof.
