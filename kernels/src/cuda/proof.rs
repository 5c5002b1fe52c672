//! How far a result of half precision may lie from the reference, and the cases run on a device.
//!
//! The reference multiplies the activations as rounded to half precision, in f64. A result may be off by
//!
//! - 2 units in the last place of its type at the reference: one rounding, half a unit, and room for the sums below;
//! - twice the bound of f32 sums ([`Judge::bounds`]: `(columns + 16) · 2^-24 · Σ_groups scale · 2^bits · Σ|x|`): tensor cores
//!   align products before they add them and cut off what is below the last place of the largest, an error of up to a whole
//!   unit of f32 per addition where a rounding would make half of one.

use super::device::{Device, DeviceLinear};
use super::geometry::{Half, MatmulLaunch};
use super::packed::{CudaWeights, ScaleKind};
use super::repack::{RepackError, repack};
use crate::cases::{Input, Judge};
use attar_tensor::{PackedLinear, QuantizedLinear};

/// Units in the last place that a result may be off, beside the bound of the sums.
pub const UNITS: f64 = 2.0;

/// What a device was found to compute for one weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Proof {
    /// Largest difference in units of what is allowed; more than 1 is an error, so is NaN.
    pub worst: f64,
    /// Largest `‖got − reference‖² / ‖reference‖²` where the reference is finite in the type.
    pub nmse: f64,
}

/// A weight and its reference.
#[derive(Debug)]
pub struct Prover {
    judge: Judge,
    columns: usize,
    rows: usize,
}

impl Prover {
    /// Of this weight.
    pub fn new(weight: &QuantizedLinear) -> Self {
        let (rows, columns) = (weight.out_features, weight.in_features);
        Self { judge: Judge::new(weight), columns, rows }
    }

    /// Multiplies `m` tokens on the device with the kernel that is chosen for them and compares.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn run<D: Device>(
        &self,
        device: &D,
        linear: &DeviceLinear<D::Buffer>,
        (half, m, input): (Half, usize, Input),
        seed: u64,
    ) -> Result<(Proof, Vec<u16>), D::Error> {
        let launch = linear.matmul_launch(half, m);
        self.run_launch(device, (linear, &launch), (half, m, input), seed)
    }

    /// The same with one of the kernels that multiply so many tokens.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn run_launch<D: Device>(
        &self,
        device: &D,
        (linear, launch): (&DeviceLinear<D::Buffer>, &MatmulLaunch),
        (half, m, input): (Half, usize, Input),
        seed: u64,
    ) -> Result<(Proof, Vec<u16>), D::Error> {
        let x: Vec<u16> =
            (input.activations(m, self.columns, seed).into_iter()).map(|x| half.round(x)).collect();
        let got = linear.multiply(device, launch, &x, m)?;
        let x: Vec<f32> = x.into_iter().map(|x| half.value(x)).collect();
        let reference = self.judge.expect(&x).reference;
        let bounds = self.judge.bounds(&x, crate::Activations::F32);
        let mut proof = Proof { worst: 0.0, nmse: 0.0 };
        let (mut error, mut norm) = (0.0, 0.0);
        for ((&got, &want), &bound) in got.iter().zip(&reference).zip(&bounds) {
            let got = f64::from(half.value(got));
            let allowed = 2.0 * bound + UNITS * half.unit(want);
            // A sum beyond the type's range must become infinite, and nothing else may.
            let largest = f64::from(half.value(match half {
                Half::F16 => 0x7bff,
                Half::Bf16 => 0x7f7f,
            }));
            if want.abs() + allowed > largest {
                let fits = got.is_infinite() || (got - want).abs() <= allowed;
                if got.is_nan() || got.signum() != want.signum() || !fits {
                    proof.worst = f64::INFINITY;
                }
                continue;
            }
            let off = (got - want).abs() / allowed;
            proof.worst = if off.is_nan() { f64::INFINITY } else { proof.worst.max(off) };
            error += (got - want).powi(2);
            norm += want * want;
        }
        proof.nmse = if error > 0.0 { error / norm.max(f64::MIN_POSITIVE) } else { 0.0 };
        assert_eq!(got.len(), m * self.rows, "a result of every row and token");
        Ok((proof, got))
    }
}

/// The packed form of a case's weight, scales in the type of the case.
pub fn pack(case: &crate::cases::Case) -> (QuantizedLinear, CudaWeights) {
    let weight = case.weight();
    let kind = ScaleKind::of(case.source).expect("cases have float scales");
    let packed = CudaWeights::pack(&weight, kind);
    (weight, packed)
}

/// What was found of one kernel.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KernelLine {
    /// Its symbol.
    pub kernel: String,
    /// Products compared.
    pub runs: usize,
    /// Largest difference in units of what is allowed.
    pub worst: f64,
    /// Largest normalised mean squared error.
    pub nmse: f64,
    /// The first product that was wrong.
    pub failure: Option<String>,
}

/// What was found of all kernels, one line each.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Table {
    /// By name.
    pub kernels: Vec<KernelLine>,
}

impl Table {
    /// True when every product was right.
    pub fn ok(&self) -> bool {
        self.kernels.iter().all(|line| line.failure.is_none())
    }

    fn add(&mut self, kernel: &str, proof: Proof, what: impl FnOnce() -> String) {
        let at = match self.kernels.binary_search_by(|line| line.kernel.as_str().cmp(kernel)) {
            Ok(at) => at,
            Err(at) => {
                let (runs, worst, nmse, failure) = (0, 0.0, 0.0, None);
                let kernel = kernel.to_owned();
                self.kernels.insert(at, KernelLine { kernel, runs, worst, nmse, failure });
                at
            }
        };
        let line = &mut self.kernels[at];
        line.runs += 1;
        line.worst = line.worst.max(proof.worst);
        line.nmse = line.nmse.max(proof.nmse);
        if proof.worst > 1.0 && line.failure.is_none() {
            line.failure = Some(what());
        }
    }

    /// Runs every shared case.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn run_cases<D: Device>(&mut self, device: &D) -> Result<(), D::Error> {
        for case in crate::cases::all() {
            let (weight, packed) = pack(&case);
            let prover = Prover::new(&weight);
            let linear = DeviceLinear::upload(device, &packed)?;
            for m in crate::cases::TOKENS {
                self.run(device, &prover, &linear, m, &case.to_string())?;
            }
        }
        Ok(())
    }

    /// Packs a linear of an artifact on the device, compares the bytes with those of the host, and multiplies.
    ///
    /// # Errors
    /// Whatever the layout or the device says.
    pub fn run_linear<D: Device>(
        &mut self,
        device: &D,
        packed: &PackedLinear,
        name: &str,
    ) -> Result<(), RepackError<D::Error>> {
        let linear = repack(device, packed)?;
        let host = CudaWeights::new(packed)?;
        let got = |buffer| device.download(buffer).map_err(RepackError::Device);
        let zeros = linear.zeros.as_ref().map(got).transpose()?;
        let order = linear.order.as_ref().map(got).transpose()?;
        let host_order = host.places.order.as_ref().map(|o| bytemuck::cast_slice(o).to_vec());
        let same = got(&linear.codes)? == host.codes
            && got(&linear.scales)? == host.scales
            && (zeros, order) == (host.zeros, host_order);
        let worst = if same { 0.0 } else { f64::INFINITY };
        let layout = packed.layout;
        let kernel = format!("attar_repack ({layout}, {} bits)", packed.scheme.bits);
        self.add(&kernel, Proof { worst, nmse: 0.0 }, || {
            format!("{name}: other bytes than the host's")
        });
        let prover = Prover::new(&crate::layout::unpack(packed)?);
        for m in [1, 7, 16, 17, 33, 130] {
            self.run(device, &prover, &linear, m, name).map_err(RepackError::Device)?;
        }
        Ok(())
    }

    fn run<D: Device>(
        &mut self,
        device: &D,
        prover: &Prover,
        linear: &DeviceLinear<D::Buffer>,
        m: usize,
        name: &str,
    ) -> Result<(), D::Error> {
        for half in Half::ALL {
            for launch in linear.matmul_launches(half, m) {
                for (seed, input) in Input::ALL.into_iter().enumerate() {
                    let run = (half, m, input);
                    let (proof, _) =
                        prover.run_launch(device, (linear, &launch), run, seed as u64)?;
                    self.add(&launch.launch.symbol, proof, || {
                        format!("{name}, {m} tokens: {proof:?}")
                    });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{self, TOKENS};
    use crate::cuda::{Generation, shim};

    /// Every case, each with part of the token counts, types and inputs; all of them with `ATTAR_SHIM_ALL` set (minutes).
    fn cases_on_the_shim(generation: Generation, kernels: usize) {
        let Some(device) = shim::kernels() else { return };
        device.generation.set(generation);
        if std::env::var_os("ATTAR_SHIM_ALL").is_some() {
            for order in 0..3 {
                device.order.set(order);
                let mut table = Table::default();
                table.run_cases(&device).unwrap();
                println!("order {order}: {table:#?}");
                assert!(table.ok(), "{table:#?}");
                assert_eq!(table.kernels.len(), kernels);
            }
            return;
        }
        for (at, case) in cases::all().iter().enumerate() {
            let (weight, packed) = pack(case);
            let prover = Prover::new(&weight);
            let linear = DeviceLinear::upload(&device, &packed).unwrap();
            for (i, &m) in TOKENS.iter().enumerate() {
                if m > 33 && (at + i) % (if m > 128 { 12 } else { 4 }) != 0 {
                    continue;
                }
                let (half, input) = (Half::ALL[(at + i) % 2], Input::ALL[(at / 2 + i) % 2]);
                device.order.set((at + i) as u64 % 4);
                let run = (half, m, input);
                for launch in linear.matmul_launches(half, m) {
                    let of = (&linear, &launch);
                    let (proof, _) = prover.run_launch(&device, of, run, at as u64).unwrap();
                    let kernel = &launch.launch.symbol;
                    assert!(proof.worst <= 1.0, "{case} {kernel} m {m}: {proof:?}");
                }
            }
        }
    }

    #[test]
    fn cases_on_the_shim_of_ampere() {
        cases_on_the_shim(Generation::Ampere, 40);
    }

    #[test]
    fn cases_on_the_shim_of_hopper() {
        cases_on_the_shim(Generation::Hopper, 96);
    }

    /// Shapes that the shared cases are too small for: several blocks of rows per block of threads, clusters, odd chunks.
    #[test]
    fn hopper_shares_rows_and_columns_among_blocks() {
        let Some(device) = shim::kernels() else { return };
        device.generation.set(Generation::Hopper);
        let base = cases::all()[0];
        // 265 blocks of rows are one more than blocks of threads; cluster: that of the tiles of `hopper.cuh`.
        for (rows, columns, group, m, cluster) in [
            (8480, 64, 64, 2, 1),
            (8200, 1024, 128, 6, 2),
            (40, 2112, 64, 3, 4),
            (300, 1088, 32, 5, 2),
            (300, 1088, 32, 12, 2),
            (150, 1024, 64, 20, 2),
            (150, 1024, 128, 40, 2),
            (300, 1536, 128, 100, 3),
        ] {
            let case =
                cases::Case { bits: 4, out_features: rows, in_features: columns, group, ..base };
            let (weight, packed) = pack(&case);
            let prover = Prover::new(&weight);
            let linear = DeviceLinear::upload(&device, &packed).unwrap();
            let mut launches = linear.matmul_launches(Half::Bf16, m);
            let tiles = launches.iter().rposition(|l| l.launch.symbol.contains("hopper")).unwrap();
            assert_eq!(launches[tiles].launch.cluster, cluster, "{case} m {m}");
            // All rows in two blocks: more turns than there is room for their sums.
            if launches[0].launch.symbol.contains("stream") && rows < 8000 {
                let mut two = launches[0].clone();
                two.launch.grid[0] = 2;
                launches.push(two);
            }
            // All columns in one block: more stages than it has room for, of the longest rows.
            if columns == 2112 {
                let mut one = launches[tiles].clone();
                (one.splits, one.launch.grid[1], one.launch.cluster) = (1, 1, 1);
                launches.push(one);
            }
            for launch in launches {
                for order in if rows > 8000 { 2..3 } else { 0..3 } {
                    device.order.set(order);
                    let (run, of) = ((Half::Bf16, m, Input::Gaussian), (&linear, &launch));
                    let (proof, _) = prover.run_launch(&device, of, run, 1).unwrap();
                    assert!(proof.worst <= 1.0, "{case} {launch:?} order {order}: {proof:?}");
                }
            }
        }
    }

    #[test]
    fn the_order_of_threads_and_blocks_does_not_change_a_bit() {
        let Some(device) = shim::kernels() else { return };
        let case = cases::Case { bits: 4, in_features: 1024, out_features: 40, ..cases::all()[0] };
        let (weight, packed) = pack(&case);
        let prover = Prover::new(&weight);
        for generation in [Generation::Ampere, Generation::Hopper] {
            device.generation.set(generation);
            let linear = DeviceLinear::upload(&device, &packed).unwrap();
            for (m, launch) in [1, 12, 20, 40, 100].into_iter().flat_map(|m| {
                linear.matmul_launches(Half::F16, m).into_iter().map(move |launch| (m, launch))
            }) {
                assert_eq!(launch.splits > 1, !launch.launch.symbol.contains("stream"), "{m}");
                let mut first = None;
                for order in 0..5 {
                    device.order.set(order);
                    let (run, of) = ((Half::F16, m, Input::Outliers), (&linear, &launch));
                    let (proof, got) = prover.run_launch(&device, of, run, 1).unwrap();
                    assert!(proof.worst <= 1.0, "{launch:?}: {proof:?}");
                    assert_eq!(&got, first.get_or_insert(got.clone()), "m {m}, order {order}");
                }
            }
        }
    }

    #[test]
    fn a_linear_of_an_artifact_is_packed_and_multiplied() {
        use crate::layout::{Gptq, Layout};
        let Some(device) = shim::kernels() else { return };
        let case = cases::Case { bits: 4, out_features: 64, ..cases::all()[0] };
        let packed = Gptq::V2.pack(&case.weight(), case.source).unwrap();
        let mut table = Table::default();
        table.run_linear(&device, &packed, "a linear").unwrap();
        assert!(table.ok(), "{table:?}");
        assert_eq!(table.kernels.len(), 11, "five kernels of each type, and packing");
        let wrong = Proof { worst: 1.5, nmse: 0.0 };
        table.add("attar_gemm_w4_f16_64", wrong, || "planted".to_owned());
        assert!(!table.ok());
    }
}
