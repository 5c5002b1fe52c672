//! An importance matrix in the place of calibration: what of a plan reads it, and as which statistics.

use std::path::{Path, PathBuf};

use attar_formats::gguf::{Imatrix, names};
use attar_ir::{Block, Given, InputStats, ModelGraph, Needs, Plan, Upstream};

use crate::Error;

/// A file of llama.cpp's `imatrix`, read and checked.
#[derive(Debug)]
pub(crate) struct Importances {
    own: Imatrix,
    path: PathBuf,
    /// blake3 of the file, hex.
    pub(crate) hash: String,
    /// GGUF's name of the weight that multiplies with the epilogue's input.
    head: &'static str,
}

/// GGUF's name of a site's weight; a tied head and the embedding are one tensor there.
pub(crate) fn name_of(block: &Block, site: &str, tied: bool) -> Option<String> {
    if block.attention.is_none() {
        return Some(head_of(tied).to_owned());
    }
    names::to_gguf(&format!("{site}.weight"))
}

const fn head_of(tied: bool) -> &'static str {
    if tied { "token_embd.weight" } else { "output.weight" }
}

impl Importances {
    /// Reads the file; no weight of the model is looked at.
    pub(crate) fn open(path: &Path, graph: &ModelGraph) -> Result<Self, Error> {
        let (own, hash) = Imatrix::open(path)?;
        Ok(Self { own, path: path.to_path_buf(), hash, head: head_of(graph.tied) })
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the plan may count on.
    pub(crate) fn given(&self) -> Given {
        Given { needs: Needs::SQUARE_SUM, head: self.own.entries.contains_key(self.head) }
    }

    /// Every input that the plan reads from the file must be there, as wide as the model's.
    ///
    /// # Errors
    /// All that is missing or does not fit, by name.
    pub(crate) fn check(&self, plan: &Plan) -> Result<(), Error> {
        let (mut wrong, mut found) = (Vec::new(), 0);
        for block in plan.graph.all_blocks() {
            for round in plan.rounds(block.index) {
                for (input, needs) in round.needs.iter().enumerate() {
                    if round.upstream == Upstream::Given && !needs.is_empty() {
                        match self.input(block, input, plan.graph.tied) {
                            Ok(_) => found += 1,
                            Err(reason) => wrong.push(reason),
                        }
                    }
                }
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let more = wrong.len().saturating_sub(6);
        wrong.truncate(6);
        let more = if more > 0 { format!(" (and {more} more)") } else { String::new() };
        let hint = if found == 0 { "; is it of another model?" } else { "" };
        Err(format!("{}: {}{more}{hint}", self.path.display(), wrong.join("; ")).into())
    }

    /// Sums of squares of one input: those of the weights that read it, which must agree.
    fn input(&self, block: &Block, input: usize, tied: bool) -> Result<(&[f32], f32), String> {
        let group = &block.inputs[input];
        let mut first: Option<(&[f32], f32, String)> = None;
        for &site in &group.sites {
            let site = &block.sites[site].name;
            let name = name_of(block, site, tied).ok_or_else(|| format!("{site}: has no name"))?;
            let (sums, count) = self.own.of(&name, group.width)?;
            match &first {
                None => first = Some((sums, count, name)),
                Some((own, tokens, other)) => {
                    let same = own.iter().zip(sums).all(|(a, b)| a.to_bits() == b.to_bits());
                    if !same || tokens.to_bits() != count.to_bits() {
                        return Err(format!(
                            "{other} and {name} read the same input, but their sums differ"
                        ));
                    }
                }
            }
        }
        first.map(|(sums, count, _)| (sums, count)).ok_or_else(|| "nobody reads it".to_owned())
    }

    /// Statistics of one input.
    ///
    /// # Errors
    /// None after [`Importances::check`].
    pub(crate) fn stats(&self, block: &Block, input: usize) -> Result<InputStats, Error> {
        let tied = self.head == head_of(true);
        let (sums, count) = self.input(block, input, tied)?;
        let square_sum = Some(sums.iter().map(|&sum| f64::from(sum)).collect());
        Ok(InputStats { tokens: count as usize, square_sum, ..InputStats::default() })
    }
}
