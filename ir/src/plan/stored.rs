//! What a plan leaves in the work directory: results, statistics that a later run could read again, and the
//! activations that a killed run goes on from.

use serde::Serialize;

use super::Plan;
use crate::{Block, Needs, Site, Touches, Upstream};

/// Bytes in the work directory when the last block is done, headers of files excluded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// Results of steps.
    pub results: usize,
    /// Statistics.
    pub statistics: usize,
    /// The newest activations, and those before them while these are written.
    pub streams: usize,
}

impl Stored {
    /// All of it.
    pub const fn total(&self) -> usize {
        self.results + self.statistics + self.streams
    }
}

impl Plan {
    /// What a run of this plan keeps in its work directory; nothing when no step reads statistics, since
    /// such a run has no work directory.
    pub fn stored(&self) -> Stored {
        let mut stored = Stored {
            results: self.model.iter().map(super::ModelStep::made_bytes).sum(),
            ..Stored::default()
        };
        let reads = self.steps.iter().any(|step| !step.contract.needs.is_empty());
        let surveys = self.passes.iter().any(|pass| pass.surveys().is_some());
        if !(reads || surveys || self.last.is_some()) || !self.calibrates() {
            return stored;
        }
        for block in self.graph.all_blocks() {
            for (step, targets) in self.steps.iter().map(|step| (step, &step.targets[block.index]))
            {
                if targets.is_empty() {
                    continue;
                }
                if step.contract.needs.contains(Needs::TEACHER) {
                    let norms: usize = block.norms.iter().map(|norm| 4 * norm.width).sum();
                    stored.results += norms;
                }
                if step.contract.touches == Touches::Folds {
                    // Folds reach into neighbours: all that they may have changed, in f32.
                    stored.results += 4 * block.sites.iter().map(Site::weights).sum::<usize>();
                    continue;
                }
                for target in targets {
                    let site = &block.sites[target.site];
                    stored.results += match target.scheme {
                        Some(scheme) if step.contract.produces.numeric.is_some() => {
                            let groups = scheme.groups(site.in_features).unwrap_or(1);
                            // Codes, then scale and zero point of 4 bytes each.
                            (site.weights() * usize::from(scheme.bits)).div_ceil(8)
                                + 8 * groups * site.out_features
                        }
                        _ => 4 * site.weights(),
                    };
                }
            }
            stored.statistics += self.stored_statistics(block);
        }
        if let Some(crate::Work::Train(train)) = self.last.as_ref().map(|step| step.pass.work()) {
            // The scales, and two states while it works.
            stored.results += train.state_bytes(&self.graph) / 3;
        }
        if !reads {
            return stored;
        }
        stored.streams = 2 * 4 * self.calibration_tokens * self.graph.hidden;
        stored
    }

    fn stored_statistics(&self, block: &Block) -> usize {
        let rounds = self.rounds(block.index);
        let mut bytes = 0;
        for (at, input) in block.inputs.iter().enumerate() {
            let mut original = Needs::empty();
            for round in &rounds {
                if round.upstream == Upstream::Original {
                    original |= round.needs[at];
                } else if round.observes() && block.index == 0 && (at == 0 || round.whole) {
                    bytes += size(input.width, round.needs[at]);
                }
            }
            bytes += size(input.width, original);
        }
        bytes
    }
}

fn size(width: usize, needs: Needs) -> usize {
    needs
        .iter()
        .map(|need| match need {
            Needs::HESSIAN => 4 * width * (width + 1) / 2,
            Needs::SQUARE_SUM => 8 * width,
            _ => 4 * width,
        })
        .sum()
}
