//! GFLOP/s of the GEMM and Gram update on one thread: `cargo run --release -p attar-tensor --example gemm_rate
//! [scalar|neon|avx2|avx512|amx]`.
#![allow(clippy::print_stdout, reason = "an example prints its result")]
use attar_tensor::{
    linalg::{GramAccumulator, InverseFactor, PackedRows, gemm_nt, gemm_tn},
    rng::Rng,
};
use std::time::Instant;

fn main() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("first pool");
    if let Some(name) = std::env::args().nth(1) {
        let isa = name.parse().expect("an instruction set");
        attar_tensor::linalg::pin(isa).expect("this CPU has it");
    }
    println!("{}", attar_tensor::linalg::level());
    for (m, n, k) in [
        (1, 4096, 4096),
        (4, 4096, 4096),
        (512, 1024, 1024),
        (512, 256, 1024),
        (512, 2816, 1024),
        (512, 1024, 2816),
        (2048, 2816, 1024),
        (2048, 2048, 2048),
    ] {
        let mut rng = Rng::new(1);
        let (a, b) = (rng.normals(m * k), rng.normals(n * k));
        let mut out = vec![0.0f32; m * n];
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            let start = Instant::now();
            gemm_nt((m, n, k), 1.0, (&a, k), (&b, k), false, (&mut out, n));
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("nt {m}x{n}x{k}: {:.1} GFLOP/s", 2.0 * (m * n * k) as f64 / best / 1e9);
        // Codes of four bits times a scale in bf16, packed once.
        let b: Vec<f32> = b.iter().map(|v| v.mul_add(2.0, 0.5).floor() * 0.01171875).collect();
        let packed = PackedRows::new((&b, k), n, k);
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            let start = Instant::now();
            packed.gemm_nt(m, (&a, k), (&mut out, n));
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("packed {m}x{n}x{k}: {:.1} GFLOP/s", 2.0 * (m * n * k) as f64 / best / 1e9);
    }
    for (m, n, k) in [(1024, 256, 1024), (2816, 256, 2816), (2816, 256, 128)] {
        let mut rng = Rng::new(1);
        let (a, b) = (rng.normals(m * k), rng.normals(n * k));
        let mut out = vec![0.0f32; m * n];
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            let start = Instant::now();
            gemm_tn((m, n, k), 1.0, (&a, m), (&b, n), true, (&mut out, n));
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("tn {m}x{n}x{k}: {:.1} GFLOP/s", 2.0 * (m * n * k) as f64 / best / 1e9);
    }
    for n in [2816, 5632] {
        let mut gram = GramAccumulator::new(n);
        gram.add(&Rng::new(3).normals((n + 64) * n)).expect("memory is no file");
        let a = gram.finish_f64(1.0).expect("memory is no file");
        let start = Instant::now();
        let row = |i: usize, out: &mut [f64]| out.copy_from_slice(&a[i * n + i..(i + 1) * n]);
        let factor = InverseFactor::new(n, row, None).expect("XᵀX with more rows than columns");
        let seconds = start.elapsed().as_secs_f64();
        let upper = factor.into_upper(128, None).expect("memory is no file");
        let rate = 2.0 / 3.0 * (n as f64).powi(3) / seconds / 1e9;
        println!(
            "factor {n}: {seconds:.2} s, {rate:.1} GFLOP/s, in panels of {} {:.2} s",
            upper.rows(),
            start.elapsed().as_secs_f64()
        );
    }
    for n in [1024, 2816] {
        let x = Rng::new(2).normals(2048 * n);
        let mut gram = GramAccumulator::new(n);
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            let start = Instant::now();
            gram.add(&x).expect("memory is no file");
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("gram {n}: {:.1} GFLOP/s (n² per row)", (2048 * n * n) as f64 / best / 1e9);
    }
}
