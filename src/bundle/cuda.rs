//! The CUDA part of a kernel bundle: device code cut down to what the artifact needs, and for each linear
//! the launches that repack its own bytes and multiply with them.

use std::{collections::BTreeSet, fs, path::Path};

use attar_kernels::cuda::{
    Device as _, Gpu, Half, Problem,
    geometry::arrange_launch,
    images,
    packed::CudaWeights,
    proof::{Prover, UNITS},
    repack,
};
use attar_kernels::{cases::Input, unpack};
use attar_tensor::PackedLinear;
use serde_json::{Value, json};

use super::Status;
use crate::Error;

/// Numbers of tokens for which the table states a launch: the largest of each tile, and a few larger ones.
const TOKENS: [usize; 7] = [1, 8, 16, 32, 64, 128, 4096];

/// What all linears of the artifact need together.
#[derive(Debug, Default)]
pub(super) struct Needed {
    symbols: BTreeSet<String>,
    /// Arguments of the macros of `attar.cu` that make them.
    macros: BTreeSet<String>,
    gpu: Option<Gpu>,
}

impl Needed {
    /// With the GPU of this machine, when there is one that runs the kernels.
    pub(super) fn new() -> Self {
        Self { gpu: Gpu::open().ok(), ..Self::default() }
    }

    /// The entries of one linear; empty when no CUDA kernel eats its layout.
    pub(super) fn describe(
        &mut self,
        packed: &PackedLinear,
        seed: u64,
    ) -> Result<Vec<Value>, Error> {
        let Some(reader) = repack::repack_of(packed.layout.0) else { return Ok(Vec::new()) };
        let weights = CudaWeights::new(packed)?;
        let (bits, rows, places) = (weights.bits, weights.rows, &weights.places);
        let codes = reader.codes_launch(bits, rows, places.chunks);
        let groups = reader.groups_launch(bits, rows, places);
        let order = places.order.as_ref().map(|_| repack::order_launch(places.chunks));
        self.macros.insert(format!(
            "ATTAR_REPACK({}, {bits}, {})",
            reader.name,
            match reader.name {
                "awq" => "Awq",
                "ct" => "CtPacked",
                _ => "Gptq",
            }
        ));
        self.symbols.extend([codes.symbol.clone(), groups.symbol.clone()]);
        let mut entries = Vec::new();
        for half in Half::ALL {
            let name = match half {
                Half::F16 => "F16",
                Half::Bf16 => "Bf16",
            };
            self.macros.insert(format!("ATTAR_MATMUL({bits}, {}, {name})", half.name()));
            let mut launches = Vec::new();
            let mut workspace = 0;
            for m in TOKENS {
                let launch = Problem::new(&weights, half, m).launch();
                workspace = workspace.max(launch.partial_bytes + 4 * launch.counters);
                self.symbols.insert(launch.launch.symbol.clone());
                launches.push(json!({"m": m, "launch": launch}));
            }
            let (status, measured) = self.measure(packed, &weights, half, seed)?;
            let arrange = places.order.as_ref().map(|_| arrange_launch(places.places(), 1));
            entries.push(json!({
                "backend": "cuda",
                "kernel": format!("cuda-{}", half.name()),
                "instructions": "sm_80",
                "activations": half.name(),
                "prepare": codes.symbol,
                "symbol": launches[0]["launch"]["launch"]["symbol"],
                "source": "attar.cu",
                "packed": {
                    "codes_bytes": weights.codes.len(),
                    "scales_bytes": weights.scales.len(),
                    "zeros_bytes": weights.zeros.as_ref().map_or(0, Vec::len),
                    "places": places.places(),
                    "ordered": places.order.is_some(),
                    "chunks": places.chunks,
                    "group_halves": places.group_halves,
                    "groups": places.groups,
                    "scale_kind": weights.scale_kind as i32,
                    "scale_bytes": weights.scale_kind.bytes(),
                    "zero_offset": reader.zero_offset,
                },
                "reads": {
                    "codes": reader.codes, "zeros": reader.zeros, "scales": reader.scales, "g_idx": reader.g_idx,
                },
                "repack": {"codes": codes, "groups": groups, "order": order},
                "arrange": arrange,
                "matmul": launches,
                "workspace_bytes": workspace,
                "tolerance": {"units_in_last_place": UNITS, "and": "twice the bound of f32 sums"},
                "measured": measured,
                "status": status.name(),
            }));
        }
        Ok(entries)
    }

    /// Runs the kernels where there is a GPU; on the shim they were run by the tests of this source.
    fn measure(
        &self,
        packed: &PackedLinear,
        weights: &CudaWeights,
        half: Half,
        seed: u64,
    ) -> Result<(Status, Value), Error> {
        let Some(gpu) = &self.gpu else { return Ok((Status::Shim, Value::Null)) };
        let linear = repack::repack(gpu, packed)?;
        if gpu.download(&linear.codes)? != weights.codes {
            return Err("the GPU's repacking kernel gave other bytes than the host's".into());
        }
        let prover = Prover::new(&unpack(packed)?);
        let (mut worst, mut nmse) = (0.0f64, 0.0f64);
        for m in [1, 16, 33] {
            let case = (half, m, Input::Outliers);
            let (proof, _) = prover.run(gpu, &linear, case, seed)?;
            worst = worst.max(proof.worst);
            nmse = nmse.max(proof.nmse);
        }
        if worst > 1.0 {
            return Err(format!(
                "the CUDA kernels are off by {worst} times what is allowed on {}",
                gpu.info().name
            )
            .into());
        }
        let measured = json!({"nmse": nmse, "worst_in_bounds": worst, "device": gpu.info().name});
        Ok((Status::Hardware, measured))
    }

    /// Writes source and machine code; returns the names of the files. Nothing is written when no linear
    /// has a CUDA kernel.
    pub(super) fn write(&self, folder: &Path) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        if self.symbols.is_empty() {
            return Ok(names);
        }
        let mut symbols = self.symbols.clone();
        symbols.extend(["attar_arrange".to_owned(), "attar_order".to_owned()]);
        let wanted: Vec<&str> = self.macros.iter().map(String::as_str).collect();
        let source = format!("#define ATTAR_ONLY {}\n{}", wanted.join(" "), images::source());
        let mut put = |name: String, bytes: &[u8]| -> Result<(), Error> {
            let path = folder.join(&name);
            fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
            names.push(name);
            Ok(())
        };
        put("attar.cu".into(), source.as_bytes())?;
        for image in images::images() {
            if image.name == "ptx" {
                let text = std::str::from_utf8(&image.bytes)?;
                put("attar.ptx".into(), cut(text, &symbols)?.as_bytes())?;
            } else {
                put(format!("attar_{}.cubin", image.name), &image.bytes)?;
            }
        }
        Ok(names)
    }
}

/// The kernels `wanted` of a PTX text, with everything that stands before the first kernel.
fn cut(ptx: &str, wanted: &BTreeSet<String>) -> Result<String, Error> {
    const ENTRY: &str = ".visible .entry ";
    let mut parts = ptx.split(ENTRY);
    let mut text = parts.next().unwrap_or_default().to_owned();
    let mut found = 0;
    for part in parts {
        let name = part.split(['(', ' ', '\n']).next().unwrap_or_default();
        if wanted.contains(name) {
            // What follows the last brace announces the next kernel.
            let end = part.rfind('}').ok_or("a kernel of the PTX has no end")? + 1;
            text.push_str(ENTRY);
            text.push_str(&part[..end]);
            text.push_str("\n\n");
            found += 1;
        }
    }
    if found == wanted.len() {
        Ok(text)
    } else {
        Err(format!("the PTX of this binary holds {found} of {} kernels", wanted.len()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ptx_is_cut_to_whole_kernels() {
        let ptx = ".version 7.8\n.visible .entry a(\n){\n{ x; }\n}\n\t// .globl b\n.visible .entry b(\n){ y; }\n";
        let wanted = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        assert_eq!(
            cut(ptx, &wanted(&["a"])).unwrap(),
            ".version 7.8\n.visible .entry a(\n){\n{ x; }\n}\n\n"
        );
        assert!(cut(ptx, &wanted(&["a", "c"])).is_err());
    }
}
