//! What a proven plan says of the rank axis: which tensors stand for a factored or corrected weight in an artifact, and
//! what cannot be.
//!
//! A factored linear is two linears of the artifact, `<site>.down [r, in]` and `<site>.up [out, r]` (its bias stays
//! `<site>.bias`), each dense or quantized. A correction is a pair of float tensors in the file of a PEFT adapter beside the
//! checkpoint, `base_model.model.<site>.lora_A.weight [r, in]` and `lora_B.weight [out, r]`.

use attar_tensor::{BlockType, LayoutError, LayoutSpec, LinearSpec, PartHeader};

use super::{
    GGUF,
    check::{ResolvedEmit, SiteState},
};
use crate::{Numeric, Rank, Role, Site};

/// Which part of a site's weight a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaf {
    /// The weight itself.
    Whole,
    /// The factor that reads the input.
    Down,
    /// The factor that makes the output.
    Up,
    /// The correction's factor that reads the input.
    CorrectionDown,
    /// The correction's factor that makes the output.
    CorrectionUp,
}

impl Leaf {
    /// Full name of a tensor with this suffix.
    pub fn name(self, site: &str, suffix: &str) -> String {
        match self {
            Self::Whole => format!("{site}.{suffix}"),
            Self::Down => format!("{site}.down.{suffix}"),
            Self::Up => format!("{site}.up.{suffix}"),
            Self::CorrectionDown => format!("base_model.model.{site}.lora_A.{suffix}"),
            Self::CorrectionUp => format!("base_model.model.{site}.lora_B.{suffix}"),
        }
    }

    /// True for tensors of the adapter.
    pub const fn corrects(self) -> bool {
        matches!(self, Self::CorrectionDown | Self::CorrectionUp)
    }
}

/// A tensor of an artifact that stands for (a part of) a site's weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) leaf: Leaf,
    pub(super) part: PartHeader,
}

/// Suffix of a dense tensor.
const WEIGHT: &str = "weight";

fn refusal(spec: &dyn LayoutSpec, scheme: &str, reason: &'static str) -> LayoutError {
    LayoutError::Scheme { layout: spec.id(), scheme: scheme.to_owned(), reason }
}

/// What an emit stores of a site; `None` leaves the checkpoint's tensor.
pub(super) fn pieces(
    site: &Site,
    state: &SiteState,
    emit: &ResolvedEmit<'_>,
    layouts: &[&dyn LayoutSpec],
) -> Result<Option<Vec<Piece>>, LayoutError> {
    let spec = emit.spec;
    let factored = state.form.rank == Rank::Factored;
    let quantized = state.form.numeric == Numeric::Quantized;
    if factored && emit.merge && quantized {
        let reason = "the product of quantized factors is no quantized weight; leave `merge` away, or write what the \
                      step before quantization made";
        return Err(refusal(spec, "merged factors", reason));
    }
    if factored && !emit.merge && !spec.takes_factors() {
        let reason = "its runtimes know no factored linears; emit `dense` or `compressed-tensors`, or multiply float \
                      factors with `merge = true` (layout dense)";
        return Err(refusal(spec, "factored linears", reason));
    }
    if state.correction.is_some() && emit.container == GGUF {
        let reason = "its file has no place for an adapter; emit a layout in safetensors";
        return Err(refusal(spec, "a low-rank correction", reason));
    }
    if state.correction.is_some() && emit.merge {
        let reason = "codes plus a correction are no codes; leave `merge` away";
        return Err(refusal(spec, "a merged correction", reason));
    }
    let leaves = match state.rank {
        Some(_) if emit.merge => Vec::new(),
        Some(rank) => {
            let [down, up] = site.factors(rank);
            vec![(Leaf::Down, down), (Leaf::Up, up)]
        }
        None if state.scheme.is_some() => vec![(Leaf::Whole, site.clone())],
        None => Vec::new(),
    };
    let mut pieces = Vec::new();
    for (leaf, linear) in &leaves {
        let put = |part: PartHeader| Piece { leaf: *leaf, part };
        if let Some(scheme) = state.scheme {
            let linear = LinearSpec {
                name: linear.name.clone(),
                out_features: linear.out_features,
                in_features: linear.in_features,
                scheme,
                source_dtype: linear.dtype,
            };
            pieces.extend(stored(&linear, spec, layouts)?.into_iter().map(put));
        } else {
            let shape = vec![linear.out_features, linear.in_features];
            pieces.push(put(PartHeader { suffix: WEIGHT, dtype: linear.dtype, shape }));
        }
    }
    if let Some(rank) = state.correction {
        for (leaf, shape) in [
            (Leaf::CorrectionDown, vec![rank, site.in_features]),
            (Leaf::CorrectionUp, vec![site.out_features, rank]),
        ] {
            let part = PartHeader { suffix: WEIGHT, dtype: site.dtype, shape };
            pieces.push(Piece { leaf, part });
        }
    }
    Ok((!pieces.is_empty()).then_some(pieces))
}

/// Parts of a quantized linear. A file of blocks holds several types; each linear is stored in that of its scheme.
fn stored(
    linear: &LinearSpec,
    spec: &dyn LayoutSpec,
    layouts: &[&dyn LayoutSpec],
) -> Result<Vec<PartHeader>, LayoutError> {
    let of = |block: BlockType| layouts.iter().find(|layout| layout.block_type() == Some(block));
    match (linear.scheme.block(), spec.block_type()) {
        (Some(block), Some(_)) => of(block).map_or(spec, |layout| *layout).parts(linear),
        (Some(block), None) => {
            Err(refusal(spec, block.name(), "block types go into container gguf only"))
        }
        (None, _) => spec.parts(linear),
    }
}

/// Why a site cannot be given factors of this rank, or a correction.
pub(super) fn check_rank(site: &Site, rank: usize, factors: bool) -> Result<(), String> {
    if site.role == Role::Head {
        return Err("the output head is the embedding of tied models, and no runtime knows a factored one; \
                    `keep` it"
            .to_owned());
    }
    let (out, inner) = (site.out_features, site.in_features);
    let full = out.min(inner);
    if rank == 0 || rank > full {
        return Err(format!(
            "rank {rank} is out of range, {out} x {inner} has ranks from 1 to {full}"
        ));
    }
    let (thin, whole) = (rank * (out + inner), out * inner);
    if factors && thin >= whole {
        let largest = (whole - 1) / (out + inner);
        let remedy = match largest {
            0 => "no rank makes it smaller; `keep` it".to_owned(),
            _ => format!("the largest rank that makes it smaller is {largest}"),
        };
        return Err(format!(
            "rank {rank} takes {thin} weights where {out} x {inner} has {whole}: {remedy}"
        ));
    }
    Ok(())
}

/// What runtimes have to be told of factors and corrections.
pub(super) fn notes(table: &[super::SitePlan], emits: &[ResolvedEmit<'_>]) -> Vec<String> {
    let factored = table.iter().filter(|site| site.rank.is_some()).count();
    let corrected = table.iter().filter(|site| site.correction.is_some()).count();
    let mut notes = Vec::new();
    if factored > 0 && emits.iter().any(|emit| !emit.merge) {
        notes.push(format!(
            "{factored} linears are written as two: transformers loads them with the modeling_attar.py that lies beside \
             them (trust_remote_code=True), other runtimes need `merge = true`"
        ));
    }
    if corrected > 0 {
        notes.push(format!(
            "{corrected} linears have a correction of low rank, written to adapter/ for PEFT: runtimes that load no adapter \
             compute without it"
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_tensor::DType;

    #[test]
    fn ranks_that_cannot_be_are_refused_with_the_largest() {
        let site = |role| Site {
            name: "up".into(),
            role,
            out_features: 64,
            in_features: 192,
            bias: false,
            dtype: DType::F32,
        };
        let up = site(Role::Up);
        assert_eq!(check_rank(&up, 47, true), Ok(()));
        let grows = check_rank(&up, 48, true).unwrap_err();
        assert!(grows.contains("12288 weights") && grows.ends_with("smaller is 47"), "{grows}");
        assert_eq!(check_rank(&up, 64, false), Ok(()));
        assert!(check_rank(&up, 65, false).unwrap_err().contains("from 1 to 64"));
        assert!(check_rank(&up, 0, true).unwrap_err().contains("rank 0 is out of range"));
        assert!(check_rank(&site(Role::Head), 1, true).unwrap_err().contains("`keep` it"));
    }
}
