//! Seeded quantized linears for tests.

use attar_tensor::rng::Rng;
use attar_tensor::{Granularity, QuantScheme, QuantizedLinear, ScaleGrid};

/// Group 0 is one group per channel.
pub(crate) fn scheme(bits: u8, group: usize, symmetric: bool) -> QuantScheme {
    let granularity = if group == 0 { Granularity::Channel } else { Granularity::Group(group) };
    QuantScheme {
        bits,
        granularity,
        symmetric,
        scale_grid: ScaleGrid::F16,
        zero_min: 1,
        activations: attar_tensor::ActivationScheme::Float,
    }
}

/// Codes and asymmetric zero points uniform, scales positive on the scheme's grid, no column order.
pub(crate) fn quantized(
    scheme: QuantScheme,
    out_features: usize,
    in_features: usize,
    seed: u64,
) -> QuantizedLinear {
    let mut rng = Rng::new(seed);
    let groups = in_features / scheme.group_size(in_features);
    let levels = usize::from(scheme.max_code()) + 1;
    let low = usize::from(scheme.zero_min);
    QuantizedLinear {
        scheme,
        out_features,
        in_features,
        codes: (0..out_features * in_features).map(|_| rng.below(levels) as u8).collect(),
        scales: (0..out_features * groups)
            .map(|_| scheme.scale_grid.project(0.001 + 0.02 * rng.uniform()))
            .collect(),
        zeros: (0..out_features * groups)
            .map(|_| {
                if scheme.symmetric {
                    u16::from(scheme.mid_code())
                } else {
                    (low + rng.below(levels - low)) as u16
                }
            })
            .collect(),
        g_idx: None,
    }
}

/// Gives the columns groups in a random order, unless there is one group only.
pub(crate) fn shuffle_groups(weight: &mut QuantizedLinear, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut g_idx: Vec<u32> =
        (0..weight.in_features).map(|column| weight.group_of(column) as u32).collect();
    for i in (1..g_idx.len()).rev() {
        g_idx.swap(i, rng.below(i + 1));
    }
    if weight.groups() > 1 {
        weight.g_idx = Some(g_idx);
    }
}
