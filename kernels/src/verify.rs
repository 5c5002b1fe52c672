//! Every kernel against the reference, on random activations. Kernels that round activations just as the
//! scheme of the weight says (W8A8) are held to the oracle of that scheme, as tightly as exact ones.

use attar_tensor::compare::Tolerance;
use attar_tensor::{ActivationScheme, LayoutError, PackedLinear};
use serde::Serialize;

use crate::cases::{Expected, Finding, Input, Judge};
use crate::layout::Layout;
use crate::reference;
use crate::spec::{Activations, Backend};

/// How one kernel compares with the reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KernelReport {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Where it runs.
    pub backend: Backend,
    /// What it does to activations.
    pub activations: Activations,
    /// Largest normalised mean squared error over inputs and numbers of tokens; with rounded activations over
    /// those that are many enough to be judged by it ([`crate::cases::AVERAGED`]), over all when none are.
    pub nmse: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Largest difference of an element in units of its bound ([`Judge::bounds`]).
    pub worst: f64,
    /// True when within the tolerance for every number of tokens.
    pub ok: bool,
    /// The kernel's tolerance.
    pub tolerance: Tolerance,
}

/// Numbers of tokens: one, the few that are multiplied directly, tiles and panels, with tails.
pub const TOKENS: [usize; 5] = [1, 2, 7, 17, 65];

/// Runs every kernel of the layout that this machine supports, with [`TOKENS`].
///
/// # Errors
/// Whatever the layout finds wrong with the bytes.
pub fn verify(
    layout: &dyn Layout,
    packed: &PackedLinear,
    seed: u64,
) -> Result<Vec<KernelReport>, LayoutError> {
    verify_tokens(layout, packed, seed, &TOKENS)
}

/// As [`fn@verify`], with these numbers of tokens.
///
/// # Errors
/// Whatever the layout finds wrong with the bytes.
pub fn verify_tokens(
    layout: &dyn Layout,
    packed: &PackedLinear,
    seed: u64,
    tokens: &[usize],
) -> Result<Vec<KernelReport>, LayoutError> {
    let all = tokens;
    let says = packed.scheme.activations;
    let (judge, w8a8) = if layout.block_type().is_some() {
        (Judge::of_blocks(&layout.unpack_blocks(packed)?), None)
    } else {
        let weight = layout.unpack(packed)?;
        let judge = Judge::new(&weight);
        (judge, (says == ActivationScheme::Int8PerToken).then_some(weight))
    };
    let (rows, columns) = (packed.out_features, packed.in_features);
    let most = all.iter().copied().max().unwrap_or(0);
    let inputs: Vec<_> = (Input::ALL.iter())
        .map(|input| {
            let x = input.activations(most, columns, seed);
            let expected = judge.expect(&x);
            let as_said = w8a8.as_ref().map(|weight| Expected {
                reference: reference::w8a8(weight, &x),
                powers: expected.powers.clone(),
            });
            (x, expected, as_said)
        })
        .collect();
    let mut reports = Vec::new();
    for kernel in layout.kernels().iter().filter(|kernel| kernel.supported()) {
        let tokens = all.iter().copied().filter(|&m| kernel.supports(packed.scheme, columns, m));
        let tokens: Vec<usize> = tokens.collect();
        if tokens.is_empty() {
            continue;
        }
        let prepared = kernel.prepare(packed)?;
        // Rounding that the scheme asks for is no error.
        let as_said = w8a8.is_some() && kernel.activations() == Activations::Int8PerToken;
        let judged = if as_said { Activations::F32 } else { kernel.activations() };
        let tolerance = judged.tolerance();
        let mut report = KernelReport {
            kernel: kernel.name(),
            backend: kernel.backend(),
            activations: kernel.activations(),
            nmse: 0.0,
            max_abs: 0.0,
            worst: 0.0,
            ok: true,
            tolerance,
        };
        let mut few = 0.0f64;
        let mut averaged = judged == Activations::F32;
        for (x, exact, rounded) in &inputs {
            let expected = rounded.as_ref().filter(|_| as_said).unwrap_or(exact);
            let bounds = judge.bounds(x, judged);
            for &m in &tokens {
                let mut got = vec![f32::NAN; m * rows];
                prepared.matmul(&x[..m * columns], m, &mut got);
                let found: Finding = judge.compare(&got, expected, &bounds);
                few = few.max(found.nmse);
                if judged == Activations::F32 || found.averaged {
                    averaged = true;
                    report.nmse = report.nmse.max(found.nmse);
                }
                report.max_abs = report.max_abs.max(found.max_abs);
                report.worst = report.worst.max(found.worst);
                report.ok &= found.within(judged, tolerance);
            }
        }
        // Never a zero that nobody measured.
        if !averaged {
            report.nmse = few;
        }
        reports.push(report);
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use attar_tensor::DType;
    use attar_tensor::compare::distance;
    use attar_tensor::rng::Rng;
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

    use super::*;
    use crate::layout::{CtInt, CtPacked, Gptq, affine_layouts};
    use crate::spec::Prepared;
    use crate::testing::{quantized, scheme, shuffle_groups};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_kernel_agrees_with_the_reference(
            bits in prop::sample::select(vec![2u8, 3, 4, 8]),
            out in 1usize..80,
            (group, groups) in prop::sample::select(vec![
                (0usize, 1usize), (8, 5), (24, 3), (32, 4), (64, 3), (128, 2)
            ]),
            symmetric in any::<bool>(),
            act_order in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let columns = if group == 0 { 77 } else { group * groups };
            let mut weight = quantized(scheme(bits, group, symmetric), out, columns, seed);
            if act_order {
                shuffle_groups(&mut weight, seed);
            }
            let packed = CtPacked.pack(&weight, DType::F32).unwrap();
            for report in verify(&CtPacked, &packed, seed).unwrap() {
                // Few rows do not average what rounding does: their elements are judged one by one.
                let exact = report.activations == Activations::F32;
                prop_assert!(if exact { report.ok } else { report.worst <= 1.0 }, "{:?}", report);
            }
        }
    }

    #[test]
    fn each_layout_runs_and_says_which_kernels() {
        let weight = quantized(scheme(4, 32, false), 64, 128, 4);
        for layout in affine_layouts() {
            let packed = layout.pack(&weight, DType::F16).unwrap();
            let reports = verify(layout, &packed, 1).unwrap();
            assert_eq!(reports[0].kernel, "cpu-scalar");
            assert!(reports.iter().all(|report| report.ok), "{reports:?}");
        }
    }

    /// The same kernel on the same bytes: 10 % off the exact product is allowed, 1e-11 off what W8A8 says.
    #[test]
    fn kernels_of_w8a8_are_held_to_what_the_scheme_says() {
        let mut weight = quantized(scheme(8, 0, true), 48, 384, 4);
        weight.scheme.activations = ActivationScheme::Int8PerToken;
        let packed = CtInt.pack(&weight, DType::F16).unwrap();
        let reports = verify(&CtInt, &packed, 1).unwrap();
        assert!(reports.iter().all(|report| report.ok), "{reports:?}");
        let per_token = |report: &&KernelReport| report.activations == Activations::Int8PerToken;
        assert!(reports.iter().filter(per_token).count() >= 1);
        for report in reports.iter().filter(per_token) {
            assert!(report.nmse < 1e-11 && report.tolerance == Activations::F32.tolerance());
        }
    }

    #[test]
    fn a_kernel_on_other_bytes_is_found_out() {
        let weight = quantized(scheme(4, 32, true), 32, 64, 4);
        let packed = Gptq::V1.pack(&weight, DType::F16).unwrap();
        let mut other = weight.clone();
        other.codes[0] ^= 1;
        let other = Gptq::V1.pack(&other, DType::F16).unwrap();
        let x = Rng::new(1).normals(64);
        let (mut a, mut b) = (vec![0.0; 32], vec![0.0; 32]);
        crate::reference::Reference::new(&packed).unwrap().matmul(&x, 1, &mut a);
        crate::select(&other).unwrap().matmul(&x, 1, &mut b);
        assert!(distance(&b, &a).nmse > Activations::F32.tolerance().max_nmse);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let mut weight = quantized(scheme(4, 64, false), 300, 1024, 4);
        shuffle_groups(&mut weight, 8);
        let packed = CtPacked.pack(&weight, DType::F32).unwrap();
        let x = Rng::new(1).normals(100 * 1024);
        for kernel in CtPacked.kernels().iter().filter(|kernel| kernel.supported()) {
            let run = |threads: usize, m: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let mut out = vec![0.0f32; m * 300];
                    kernel.prepare(&packed).unwrap().matmul(&x[..m * 1024], m, &mut out);
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                })
            };
            for m in [1, 5, 33, 100] {
                assert_eq!(run(1, m), run(3, m), "{} m {m}", kernel.name());
            }
        }
    }
}
