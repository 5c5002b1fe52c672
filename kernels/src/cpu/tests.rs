//! Every CPU kernel on every case, and what is promised about bits.

use std::collections::BTreeMap;

use attar_tensor::DType;
use attar_tensor::rng::Rng;
use rayon::prelude::*;

use super::*;
use crate::cases::{self, Input, Judge, TOKENS};
use crate::layout::{CtPacked, Layout};

fn supported() -> Vec<CpuKernel> {
    let kinds = [Activations::F32, Activations::Int8, Activations::Int8PerToken];
    let all = kinds
        .iter()
        .flat_map(|&a| Isa::ALL.iter().map(move |&isa| CpuKernel { isa, activations: a }));
    all.filter(Kernel::supported).collect()
}

fn linear(kernel: CpuKernel, weight: &QuantizedLinear) -> CpuLinear {
    CpuLinear { tiles: Tiles::new(weight, true), kernel }
}

#[test]
fn every_kernel_gets_every_case_right() {
    let kernels = supported();
    let failures: Vec<String> = (cases::all().into_par_iter())
        .flat_map_iter(|case| {
            let weight = case.weight();
            let judge = Judge::new(&weight);
            let (rows, columns) = (case.out_features, case.in_features);
            let most = TOKENS[TOKENS.len() - 1];
            let mut failures = Vec::new();
            for input in Input::ALL {
                let x = input.activations(most, columns, 3);
                let expected = judge.expect(&x);
                for &kernel in &kernels {
                    if !kernel.supports(weight.scheme, columns, 1) {
                        continue;
                    }
                    let bounds = judge.bounds(&x, kernel.activations);
                    let linear = linear(kernel, &weight);
                    for m in TOKENS {
                        // The plain kernels are slow.
                        if kernel.isa == Isa::Scalar && m > 33 {
                            continue;
                        }
                        let mut got = vec![f32::NAN; m * rows];
                        linear.matmul(&x[..m * columns], m, &mut got);
                        let found = judge.compare(&got, &expected, &bounds);
                        if !found.within(kernel.activations, kernel.tolerance()) {
                            let name = kernel.name();
                            failures.push(format!("{name} m {m} {case} {input:?}: {found:?}"));
                        }
                    }
                }
            }
            failures
        })
        .collect();
    let shown = &failures[..failures.len().min(30)];
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), shown.join("\n"));
}

#[test]
fn fast_kernels_give_the_same_bits_everywhere() {
    for case in cases::all().into_iter().filter(|case| case.values == cases::Values::Plain) {
        let weight = case.weight();
        // Enough for AMX, with a tail.
        let m = TILE_TOKENS + 3;
        let x = Input::Outliers.activations(m, case.in_features, 5);
        for activations in [Activations::Int8, Activations::Int8PerToken] {
            let mut expected: Option<Vec<u32>> = None;
            for kernel in supported().into_iter().filter(|k| k.activations == activations) {
                if !kernel.supports(weight.scheme, case.in_features, 1) {
                    continue;
                }
                let linear = linear(kernel, &weight);
                let mut all = vec![0.0f32; m * case.out_features];
                linear.matmul(&x, m, &mut all);
                // Few tokens are multiplied by several tiles at once.
                for few in [2, 4, 8] {
                    let mut got = vec![0.0f32; few * case.out_features];
                    linear.matmul(&x[..few * case.in_features], few, &mut got);
                    assert_eq!(got, all[..got.len()], "{} {few} {case}", kernel.name());
                }
                // One token at a time, too.
                let mut one = vec![0.0f32; case.out_features];
                linear.matmul(&x[18 * case.in_features..19 * case.in_features], 1, &mut one);
                assert_eq!(
                    one,
                    all[18 * case.out_features..19 * case.out_features],
                    "{} {case}",
                    kernel.name()
                );
                let bits: Vec<u32> = all.iter().map(|y| y.to_bits()).collect();
                let expected = expected.get_or_insert_with(|| bits.clone());
                assert!(&bits == expected, "{} {case}", kernel.name());
            }
        }
    }
}

/// FNV-1a of all outputs of the fast kernels below. The weights and activations hang on integers and exact steps alone, no
/// function of a mathematical library, so that every machine makes the same ones.
const FAST_BITS: u64 = 0x70db_37b9_3e5d_8b8b;

#[test]
fn fast_kernels_give_the_same_bits_on_every_architecture() {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for case in cases::all().into_iter().filter(|case| case.values == cases::Values::Plain) {
        let (weight, m) = (case.weight(), 3);
        let mut rng = Rng::new(11);
        let mut x: Vec<f32> = (0..m * case.in_features).map(|_| rng.uniform() - 0.5).collect();
        x.iter_mut().step_by(97).for_each(|x| *x *= 16.0);
        for activations in [Activations::Int8, Activations::Int8PerToken] {
            // The best of this machine; that the others agree with it is the test above.
            let mut all = supported().into_iter().filter(|k| k.activations == activations);
            let best = all.next_back().expect("the plain kernel is one");
            if best.supports(weight.scheme, case.in_features, 1) {
                let mut out = vec![0.0f32; m * case.out_features];
                linear(best, &weight).matmul(&x, m, &mut out);
                for byte in out.iter().flat_map(|y| y.to_bits().to_le_bytes()) {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
        }
    }
    assert_eq!(hash, FAST_BITS, "{hash:#x}");
}

#[test]
fn dequantized_panels_are_the_weights_to_the_bit() {
    for case in cases::all() {
        let weight = case.weight();
        let expected = weight.dequantize();
        for kernel in supported().into_iter().filter(|k| k.activations == Activations::F32) {
            let linear = linear(kernel, &weight);
            let shape = &linear.tiles.shape;
            let stride = ROWS + 3;
            let mut to = vec![0.0f32; shape.places() * stride];
            for tile in 0..shape.tiles() {
                // SAFETY: `to` is `[places, stride]`, and a stride is more than sixteen.
                unsafe { linear.dequantize(tile, to.as_mut_ptr(), stride) };
                for place in 0..shape.places() {
                    let column = shape.order.as_ref().map_or(place, |o| o[place] as usize);
                    for row in (0..ROWS).filter(|row| tile * ROWS + row < shape.out_features) {
                        if column < shape.in_features {
                            let want = expected[[tile * ROWS + row, column]];
                            let got = to[place * stride + row];
                            assert_eq!(got.to_bits(), want.to_bits(), "{} {case}", kernel.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn no_activation_that_is_not_finite_is_lost() {
    let weight = cases::all()[1].weight();
    for kernel in supported() {
        if !kernel.supports(weight.scheme, weight.in_features, 1) {
            continue;
        }
        let linear = linear(kernel, &weight);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0f32; weight.in_features];
            x[3] = bad;
            let mut out = vec![0.0f32; weight.out_features];
            linear.matmul(&x, 1, &mut out);
            assert!(out.iter().any(|y| !y.is_finite()), "{} {bad}", kernel.name());
        }
        let mut out = vec![1.0f32; weight.out_features];
        linear.matmul(&vec![1e-38; weight.in_features], 1, &mut out);
        assert!(out.iter().all(|y| y.abs() < 1e-30), "{}", kernel.name());
    }
}

#[test]
fn minima_are_subtracted() {
    let case = cases::all()[0];
    let weight = case.weight();
    let minima: Vec<f32> = weight.scales.iter().map(|scale| scale * 8.0).collect();
    let x = Input::Gaussian.activations(17, case.in_features, 5);
    let mut fast = BTreeMap::new();
    for kernel in supported() {
        if !kernel.supports(weight.scheme, case.in_features, 1) {
            continue;
        }
        let with_minima = CpuLinear {
            tiles: Tiles::from_affine(&tiles::Affine {
                bits: case.bits,
                sparse: true,
                out_features: case.out_features,
                in_features: case.in_features,
                codes: &weight.codes,
                scales: &weight.scales,
                offsets: tiles::Offsets::Minima(&minima),
                group_of: &|column| weight.group_of(column),
            }),
            kernel,
        };
        for m in [1, 17] {
            let judge = Judge::new(&QuantizedLinear {
                zeros: vec![8; weight.zeros.len()],
                ..weight.clone()
            });
            let x = &x[..m * case.in_features];
            let mut got = vec![0.0f32; m * case.out_features];
            with_minima.matmul(x, m, &mut got);
            let bounds = judge.bounds(x, kernel.activations);
            let found = judge.compare(&got, &judge.expect(x), &bounds);
            assert!(found.worst < 1.0, "{} {found:?}", kernel.name());
            if kernel.activations != Activations::F32 {
                let bits: Vec<u32> = got.iter().map(|y| y.to_bits()).collect();
                let first =
                    fast.entry((kernel.activations.name(), m)).or_insert_with(|| bits.clone());
                assert!(&bits == first, "{} m {m}", kernel.name());
            }
        }
    }
}

#[test]
fn act_order_reads_the_packed_file() {
    let case = cases::all().into_iter().find(|case| case.act_order).unwrap();
    let packed = CtPacked.pack(&case.weight(), DType::F16).unwrap();
    let x = Input::Gaussian.activations(2, case.in_features, 5);
    let (mut a, mut b) = (vec![0.0; 2 * case.out_features], vec![0.0; 2 * case.out_features]);
    crate::select(&packed).unwrap().matmul(&x, 2, &mut a);
    prepare(&case.weight()).matmul(&x, 2, &mut b);
    assert_eq!(a, b);
}

#[test]
fn fast_kernels_give_the_same_bits_without_the_zeros() {
    let mut seen = 0;
    for case in cases::all().into_iter().filter(|case| case.bits == 4 && !case.act_order) {
        let weight = case.weight();
        let x = Input::Outliers.activations(TILE_TOKENS + 3, case.in_features, 5);
        for kernel in supported() {
            if !kernel.supports(weight.scheme, case.in_features, 1) {
                continue;
            }
            let linear = linear(kernel, &weight);
            assert_eq!(linear.without_zeros(), case.pruned, "{case}");
            let Some(other) = linear.with_zeros() else { continue };
            assert!(!other.without_zeros());
            // Three bits for four; scales stay.
            let saved = other.resident_bytes() - linear.resident_bytes();
            let shape = &linear.tiles.shape;
            assert_eq!(8 * saved, shape.tiles() * ROWS * shape.places());
            seen += 1;
            for m in [1, 2, 4, 8, TILE_TOKENS + 3] {
                let x = &x[..m * case.in_features];
                let (mut a, mut b) =
                    (vec![0.0; m * case.out_features], vec![1.0; m * case.out_features]);
                linear.matmul(x, m, &mut a);
                other.matmul(x, m, &mut b);
                let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                // Exact kernels take the places of a block in another order.
                let exact = kernel.activations == Activations::F32;
                let same = bits(&a) == bits(&b);
                assert!(exact || same, "{} m {m} {case}", kernel.name());
            }
        }
    }
    assert!(seen >= 13 * 2, "{seen}");
}

#[test]
fn three_of_four_and_another_order_keep_every_code() {
    let case = cases::all().into_iter().find(|case| case.pruned).unwrap();
    let mut weight = case.weight();
    let zero = weight.zeros[0] as u8;
    assert!(Tiles::new(&weight, true).shape.sparse && !Tiles::new(&weight, false).shape.sparse);
    for code in &mut weight.codes[8..11] {
        *code = zero ^ 1;
    }
    assert!(!Tiles::new(&weight, true).shape.sparse);
}
