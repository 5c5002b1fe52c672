//! The CUDA part of a kernel bundle: device code cut down to what the artifact needs, and for each linear
//! the launches that repack its own bytes and multiply with them.

use std::{collections::BTreeSet, fs, path::Path};

use attar_kernels::cuda::{
    Description, Device as _, Generation, Gpu, Half, describe, images,
    packed::{CHUNK, CudaWeights, ScaleKind},
    proof::{Prover, UNITS},
    repack,
};
use attar_kernels::{cases::Input, unpack};
use attar_tensor::PackedLinear;
use serde_json::{Value, json};

use super::Status;
use crate::Error;

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
        let (bits, scale_kind) = (packed.scheme.bits, ScaleKind::of_packed(packed));
        let weight = unpack(packed)?;
        let shape = (packed.out_features, packed.in_features);
        let layout = match reader.name {
            "awq" => "Awq",
            "ct" => "CtPacked",
            _ => "Gptq",
        };
        self.macros.insert(format!("ATTAR_REPACK({}, {bits}, {layout})", reader.name));
        let mut entries = Vec::new();
        for half in Half::ALL {
            let g_idx = weight.g_idx.as_deref();
            let of = |generation| {
                let types = (half, scale_kind);
                describe(packed.layout.0, packed.scheme, shape, g_idx, types, generation)
                    .ok_or("a layout that is repacked has kernels")
            };
            let ranges = of(Generation::Ampere)?;
            let first = &ranges[0];
            let name = match half {
                Half::F16 => "F16",
                Half::Bf16 => "Bf16",
            };
            self.macros.insert(format!("ATTAR_MATMUL({bits}, {}, {name})", half.name()));
            self.symbols.extend(first.repack.iter().map(|launch| launch.symbol.clone()));
            self.symbols.extend(ranges.iter().map(|range| range.matmul.launch.symbol.clone()));
            let launches = launches_of(&ranges)?;
            let launches_of_hopper = launches_of(&of(Generation::Hopper)?)?;
            let workspace = ranges.iter().map(|r| r.matmul.partial_bytes + 4 * r.matmul.counters);
            let (status, measured) = self.measure(packed, half, seed)?;
            let [codes_bytes, scales_bytes, zeros_bytes] = first.packed_bytes;
            entries.push(json!({
                "backend": "cuda",
                "kernel": format!("cuda-{}", half.name()),
                "instructions": "sm_80",
                "activations": half.name(),
                "prepare": first.repack[0].symbol,
                "symbol": first.matmul.launch.symbol,
                "source": "attar.cu",
                "packed": {
                    "codes_bytes": codes_bytes,
                    "scales_bytes": scales_bytes,
                    "zeros_bytes": zeros_bytes,
                    "places": first.places,
                    "ordered": first.order.is_some(),
                    "chunks": first.places / CHUNK,
                    "group_halves": first.group_halves,
                    "groups": weight.groups(),
                    "scale_kind": first.scale_kind,
                    "scale_bytes": scale_kind.bytes(),
                    "zero_offset": reader.zero_offset,
                },
                "reads": {
                    "codes": reader.codes, "zeros": reader.zeros, "scales": reader.scales, "g_idx": reader.g_idx,
                },
                "repack": {
                    "codes": first.repack[0],
                    "groups": first.repack[1],
                    "order": first.order.as_ref().map(|(sort, _, _, _)| sort),
                },
                "arrange": first.order.as_ref().map(|(_, _, arrange, _)| arrange),
                "matmul": launches,
                "sm_90a": {
                    "cubin": "attar_sm_90a.cubin",
                    "matmul": launches_of_hopper,
                    // The product that `measured` speaks of ran the kernels of every GPU.
                    "status": Status::Shim.name(),
                },
                "more_tokens": "every 128 tokens begun of the last range take one more of grid[2], and its \
                                partial_bytes and counters once more",
                "workspace_bytes": workspace.max(),
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
        half: Half,
        seed: u64,
    ) -> Result<(Status, Value), Error> {
        let Some(gpu) = &self.gpu else { return Ok((Status::Shim, Value::Null)) };
        let mut linear = repack::repack(gpu, packed)?;
        // The kernels that the bundle describes: those that every GPU runs.
        linear.generation = Generation::Ampere;
        if gpu.download(&linear.codes)? != CudaWeights::new(packed)?.codes {
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

/// Launches with the numbers of tokens that take them.
fn launches_of(ranges: &[Description]) -> Result<Vec<Value>, Error> {
    let one = |range: &Description| {
        let mut launch = serde_json::to_value(&range.matmul)?;
        launch["tokens"] = json!(range.tokens);
        Ok(launch)
    };
    ranges.iter().map(one).collect()
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
