//! Packing, unpacking and the CPU kernels at a size of the field, 4096 x 4096, group 128.

use std::hint::black_box;

use attar_kernels::{Backend, Kernel, LAYOUTS};
use attar_tensor::rng::Rng;
use attar_tensor::{DType, Granularity, QuantScheme, QuantizedLinear, ScaleGrid};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const FEATURES: usize = 4096;
const GROUP: usize = 128;

fn quantized(bits: u8) -> QuantizedLinear {
    let scheme = QuantScheme {
        bits,
        granularity: Granularity::Group(GROUP),
        symmetric: false,
        scale_grid: ScaleGrid::F16,
        zero_min: 1,
        activations: attar_tensor::ActivationScheme::Float,
    };
    let mut rng = Rng::new(1);
    let levels = usize::from(scheme.max_code()) + 1;
    let groups = FEATURES * FEATURES / GROUP;
    QuantizedLinear {
        scheme,
        out_features: FEATURES,
        in_features: FEATURES,
        codes: (0..FEATURES * FEATURES).map(|_| rng.below(levels) as u8).collect(),
        scales: (0..groups).map(|_| ScaleGrid::F16.project(0.01 + 0.01 * rng.uniform())).collect(),
        zeros: (0..groups).map(|_| 1 + rng.below(levels - 1) as u16).collect(),
        g_idx: None,
    }
}

fn layouts(c: &mut Criterion) {
    let weight = quantized(4);
    let mut group = c.benchmark_group("layout");
    group.sample_size(10).throughput(Throughput::Elements((FEATURES * FEATURES) as u64));
    for layout in LAYOUTS.iter().filter(|layout| layout.block_type().is_none()) {
        let packed = layout.pack(&weight, DType::F16).expect("every layout stores 4 bits");
        group.bench_function(BenchmarkId::new("pack", layout.id()), |b| {
            b.iter(|| black_box(layout.pack(&weight, DType::F16)));
        });
        group.bench_function(BenchmarkId::new("unpack", layout.id()), |b| {
            b.iter(|| black_box(layout.unpack(&packed)));
        });
    }
}

fn matmul(c: &mut Criterion) {
    let layout = attar_kernels::layout("compressed-tensors").expect("the layout is listed");
    let x = Rng::new(2).normals(256 * FEATURES);
    let mut out = vec![0.0f32; 256 * FEATURES];
    for bits in [2, 3, 4, 8] {
        let packed = layout.pack(&quantized(bits), DType::F16).expect("the layout stores this");
        let mut group = c.benchmark_group(format!("matmul-w{bits}"));
        group.sample_size(10);
        let usable = |kernel: &&dyn Kernel| {
            let fits = kernel.supports(packed.scheme, FEATURES, 1);
            kernel.backend() == Backend::Cpu && kernel.supported() && fits
        };
        for kernel in layout.kernels().iter().map(|kernel| &**kernel).filter(usable) {
            let prepared = kernel.prepare(&packed).expect("the packed bytes are sound");
            for m in [1, 4, 16, 256] {
                let (x, out) = (&x[..m * FEATURES], &mut out[..m * FEATURES]);
                group.throughput(Throughput::Bytes(prepared.resident_bytes() as u64));
                group.bench_function(BenchmarkId::new(kernel.name(), m), |b| {
                    b.iter(|| prepared.matmul(black_box(x), m, out));
                });
            }
        }
    }
}

criterion_group!(benches, layouts, matmul);
criterion_main!(benches);
