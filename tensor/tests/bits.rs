//! The same bits of products and sums on every instruction set but AMX's, and on every architecture. A process of its own,
//! since the instruction set is pinned: to the best but AMX, or to the one that `ATTAR_TEST_ISA` names.
//!
//! What faer computes in f64 (Cholesky factors, eigenvectors) is not among them: its sums run in another order on aarch64
//! than on x86-64.

use attar_tensor::linalg::{
    GramAccumulator, Level, dot, exp_in_place, gemm_nn, gemm_nt, gemm_tn, pin, silu_mul,
    softmax_row_in_place,
};
use attar_tensor::rng::Rng;

/// What [`results`] gave when this was written, on an x86-64 with AVX-512.
const EXPECTED: [(&str, u64); 7] = [
    ("gemm_nt", 0x3386_12c0_ccd1_af40),
    ("gemm_nn", 0x8941_715f_f0f7_7fc1),
    ("gemm_tn", 0xcf7b_b312_e2c2_a12c),
    ("gram", 0x353b_708d_2b9f_5328),
    ("dot", 0x096c_d574_ec91_3dfb),
    ("exp", 0x9573_f942_a817_9292),
    ("softmax, silu", 0x9c10_a452_77ee_47e6),
];

/// FNV-1a.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn floats(values: &[f32]) -> u64 {
    hash(values.iter().flat_map(|v| v.to_bits().to_le_bytes()))
}

fn doubles(values: &[f64]) -> u64 {
    hash(values.iter().flat_map(|v| v.to_bits().to_le_bytes()))
}

/// Of numbers that exact steps make from integers, no function of a mathematical library.
fn results() -> [(&'static str, u64); 7] {
    let (m, n, k) = (37, 83, 700);
    let mut rng = Rng::new(5);
    let mut numbers =
        |count: usize| -> Vec<f32> { (0..count).map(|_| rng.uniform() - 0.5).collect() };
    let (a, b) = (numbers(m * k), numbers(n * k));
    let mut out = vec![0.0f32; m * n];
    gemm_nt((m, n, k), 0.75, (&a, k), (&b, k), false, (&mut out, n));
    let nt = floats(&out);
    gemm_nn((m, n, k), 1.0, (&a, k), (&b, n), true, (&mut out, n));
    let nn = floats(&out);
    gemm_tn((m, n, k), 1.0, (&a, m), (&b, n), false, (&mut out, n));
    let tn = floats(&out);
    let mut gram = GramAccumulator::new(n);
    gram.add(&b).expect("in memory");
    let gram = gram.finish_f64(2.0).expect("in memory");
    let of_gram = doubles(&gram);
    let mut x = numbers(m * k);
    let of_dot = dot(&x, &a);
    let mut e: Vec<f32> = x.iter().map(|x| x * 40.0).collect();
    exp_in_place(&mut e);
    softmax_row_in_place(&mut x);
    silu_mul(&mut x, &a);
    [
        ("gemm_nt", nt),
        ("gemm_nn", nn),
        ("gemm_tn", tn),
        ("gram", of_gram),
        ("dot", floats(&[of_dot])),
        ("exp", floats(&e)),
        ("softmax, silu", floats(&x)),
    ]
}

#[test]
fn bits_are_those_of_every_other_machine() {
    let best = || {
        let known = |level: &Level| *level != Level::Amx && level.supported();
        Level::ALL.into_iter().rfind(known).expect("scalar is one")
    };
    let asked = std::env::var("ATTAR_TEST_ISA");
    let level = asked.map_or_else(|_| best(), |name| name.parse().expect("a name"));
    pin(level).expect("nothing was computed before");
    let found = results();
    assert_eq!(found, EXPECTED, "{level}");
}
