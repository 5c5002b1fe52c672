//! The kernels on the CPU: the same sources, compiled by the system's C++ compiler against `simt/simt.hpp` and run as a child
//! process under the address sanitizer.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::device::Device;
use super::geometry::{Generation, Launch};

/// A running shim.
pub(crate) struct Shim {
    child: RefCell<Child>,
    next: Cell<u64>,
    /// Order of threads and blocks: 0 ascending, 1 descending, others random.
    pub(crate) order: Cell<u64>,
    /// Which kernels are chosen; all of them are there.
    pub(crate) generation: Cell<Generation>,
}

/// Why the shim stopped.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ShimError(pub(crate) String);

impl From<std::io::Error> for ShimError {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda")
}

/// Compiles `kernels` (a path) with these definitions and starts them; `None` when there is no C++ compiler, which is said.
pub(crate) fn start(kernels: &Path, definitions: &[&str], name: &str) -> Option<Shim> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    if Command::new(&compiler).arg("--version").output().is_err() {
        eprintln!("SKIPPED: no C++ compiler ({compiler}); CUDA kernels were not run on the shim");
        return None;
    }
    let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-shim");
    std::fs::create_dir_all(&out).unwrap();
    let program = out.join(format!("{name}-{}", sources_hash(kernels)));
    if !program.exists() {
        let part = out.join(format!("{name}-{}.part", std::process::id()));
        let output = Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-fsanitize=address,undefined", "-Wall", "-Werror"])
            .args(["-fno-sanitize-recover=undefined", "-Wno-unknown-pragmas"])
            .arg(format!("-DATTAR_SIMT_KERNELS=\"{}\"", kernels.display()))
            .args(definitions.iter().map(|definition| format!("-D{definition}")))
            .arg(folder().join("simt/main.cpp"))
            .arg("-o")
            .arg(&part)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::rename(part, &program).unwrap();
    }
    let child = Command::new(program)
        .env("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0:abort_on_error=0")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Some(Shim {
        child: RefCell::new(child),
        next: Cell::new(1),
        order: Cell::new(0),
        generation: Cell::new(Generation::Ampere),
    })
}

/// The kernels of this build.
pub(crate) fn kernels() -> Option<Shim> {
    use std::sync::Mutex;
    static COMPILING: Mutex<()> = Mutex::new(());
    let _one = COMPILING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    start(&folder().join("device/attar.cu"), &[], "attar")
}

/// Of the shim and of all files that kernels include.
fn sources_hash(kernels: &Path) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut paths = vec![kernels.to_owned()];
    paths.extend(["simt.hpp", "main.cpp"].map(|name| folder().join("simt").join(name)));
    paths.extend(std::fs::read_dir(folder().join("device")).unwrap().map(|e| e.unwrap().path()));
    paths.extend(
        ["gptq", "awq", "ct_packed"]
            .map(|layout| folder().join("../layout").join(layout).join("repack.cuh")),
    );
    paths.sort();
    for path in paths {
        for byte in std::fs::read(path).unwrap() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

impl Shim {
    fn send(&self, bytes: &[u8]) -> Result<(), ShimError> {
        let sent = self.child.borrow_mut().stdin.as_mut().unwrap().write_all(bytes);
        sent.map_err(|_| self.died())
    }

    fn receive(&self, bytes: &mut [u8]) -> Result<(), ShimError> {
        self.child.borrow_mut().stdin.as_mut().unwrap().flush()?;
        let got = self.child.borrow_mut().stdout.as_mut().unwrap().read_exact(bytes);
        got.map_err(|_| self.died())
    }

    /// What it said last.
    fn died(&self) -> ShimError {
        let mut text = String::new();
        let _ = self.child.borrow_mut().stderr.as_mut().unwrap().read_to_string(&mut text);
        ShimError(text)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.borrow_mut().kill();
        let _ = self.child.borrow_mut().wait();
    }
}

impl Device for Shim {
    /// Number and size.
    type Buffer = (u64, usize);
    type Error = ShimError;

    fn generation(&self) -> Generation {
        self.generation.get()
    }

    fn upload(&self, bytes: &[u8]) -> Result<Self::Buffer, ShimError> {
        let id = self.next.get();
        self.next.set(id + 1);
        self.send(&[1])?;
        self.send(&id.to_le_bytes())?;
        self.send(&(bytes.len() as u64).to_le_bytes())?;
        self.send(bytes)?;
        Ok((id, bytes.len()))
    }

    fn zeros(&self, bytes: usize) -> Result<Self::Buffer, ShimError> {
        self.upload(&vec![0; bytes])
    }

    fn download(&self, &(id, bytes): &Self::Buffer) -> Result<Vec<u8>, ShimError> {
        self.send(&[2])?;
        self.send(&id.to_le_bytes())?;
        let mut out = vec![0; bytes];
        self.receive(&mut out)?;
        Ok(out)
    }

    fn launch(
        &self,
        launch: &Launch,
        argument: &[u8],
        links: &[(usize, &Self::Buffer)],
    ) -> Result<(), ShimError> {
        let mut command = vec![4];
        let word = |command: &mut Vec<u8>, word: u32| command.extend(word.to_le_bytes());
        word(&mut command, launch.symbol.len() as u32);
        command.extend(launch.symbol.bytes());
        word(&mut command, argument.len() as u32);
        command.extend(argument);
        word(&mut command, links.len() as u32);
        for &(offset, (id, _)) in links {
            word(&mut command, offset as u32);
            command.extend(id.to_le_bytes());
        }
        launch.grid.iter().for_each(|&size| word(&mut command, size));
        word(&mut command, launch.threads);
        command.extend(u64::from(launch.shared).to_le_bytes());
        command.extend(self.order.get().to_le_bytes());
        word(&mut command, launch.cluster);
        self.send(&command)?;
        let mut found = [0];
        self.receive(&mut found)?;
        if found == [1] { Ok(()) } else { Err(ShimError(format!("no {}", launch.symbol))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{self, Input};
    use crate::cuda::images;
    use crate::cuda::proof::{Prover, pack};
    use crate::cuda::{DeviceLinear, Generation, Half};

    /// Runs few and many tokens in several orders with lines of the sources replaced; what was noticed first.
    fn plant(name: &str, edits: &[(&str, &str)]) -> Option<String> {
        let mut source = images::source();
        for (line, bug) in edits {
            assert_eq!(source.matches(line).count(), 1, "{name}: {line}");
            source = source.replace(line, bug);
        }
        let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cuda-shim");
        std::fs::create_dir_all(&out).unwrap();
        let path = out.join(format!("planted-{name}.cu"));
        std::fs::write(&path, source).unwrap();
        let ampere = ["ATTAR_ONLY=ATTAR_MATMUL(4, f16, F16)", "ATTAR_SIMT_AMPERE"];
        let hopper = [
            "ATTAR_ONLY=ATTAR_STREAM(4, f16, F16) ATTAR_TILES(4, f16, F16, 16) ATTAR_TILES(4, f16, F16, 64) ATTAR_TILES(4, f16, F16, 128)",
        ];
        let hopper_bug = name.starts_with("hopper");
        let definitions: &[&str] = if hopper_bug { &hopper } else { &ampere };
        let device = start(&path, definitions, name)?;
        let generation = if hopper_bug { Generation::Hopper } else { Generation::Ampere };
        device.generation.set(generation);
        // On Hopper 14 stages: more than any block has room for.
        let in_features = if hopper_bug { 1728 } else { 1024 };
        let case = cases::Case { bits: 4, in_features, group: 32, ..cases::all()[0] };
        let (weight, packed) = pack(&case);
        let prover = Prover::new(&weight);
        let linear = DeviceLinear::upload(&device, &packed).unwrap();
        // What warps multiply by themselves, all kernels of Hopper, those of Ampere.
        let tokens: &[usize] = match hopper_bug {
            true if name.starts_with("hopper-warps") => &[12],
            true => &[3, 12, 40, 80],
            false => &[3, 40],
        };
        for order in 0..4 {
            for &m in tokens {
                device.order.set(order);
                let mut launch = linear.matmul_launch(Half::F16, m);
                if hopper_bug {
                    // All stages of a tile in one block, and all rows in turn.
                    (launch.splits, launch.launch.grid[1], launch.launch.cluster) = (1, 1, 1);
                    if m == 3 && (name.contains("turns") || name.contains("none")) {
                        launch.launch.grid[0] = 1;
                    }
                }
                let run = (Half::F16, m, Input::Gaussian);
                match prover.run_launch(&device, (&linear, &launch), run, 1) {
                    Ok((proof, _)) if proof.worst > 1.0 => return Some(format!("{proof:?}")),
                    Ok(_) => {}
                    Err(error) => return Some(error.to_string()),
                }
            }
        }
        Some("nothing".to_owned())
    }

    #[test]
    fn planted_bugs_are_noticed() {
        let wait = "    copies_wait<STAGES - 2>();\n";
        let late = "    copies_wait<0>();\n    float* partial = p.partial + (long long)tile * p.splits * (8 ";
        let barrier = "    __syncthreads();\n    const int next = stage";
        let sums = "  __syncthreads();\n  float sum[NT];";
        let full = "    barrier_wait(full + 8 * slot, (u32)n / S::COUNT & 1);\n";
        let arrive = "    if (lane == 0) barrier_arrive(empty + 8 * slot);\n";
        let registers = "fewer_registers<56>();";
        let landed = "      barrier_wait(barriers + 8 * slot, parity);\n";
        let complete = "      barrier_wait(complete, phase);\n";
        let added = "      if (lane == 0) barrier_arrive(added);\n";
        let made = "        products_wait<0>();\n";
        let before = "        products_wait<1>();\n        add(";
        let free_early = format!("{full}{arrive}");
        let bugs: [(&str, &[(&str, &str)], &str); 19] = [
            ("hopper-none", &[], "nothing"),
            ("hopper-no-wait", &[(full, "")], "never waited for"),
            ("hopper-never-free", &[(arrive, "")], "never come"),
            (
                "hopper-registers",
                &[(registers, "fewer_registers<64>();\n    more_registers<72>();")],
                "never come",
            ),
            ("hopper-stream-no-wait", &[(landed, "")], "never waited for"),
            ("hopper-sums", &[(complete, "")], "Proof"),
            ("hopper-turns-no-room", &[(added, "")], "never come"),
            ("hopper-products-not-made", &[(made, "")], "Proof"),
            ("hopper-unit-not-made", &[(before, "        add(")], "Proof"),
            ("hopper-warps-place", &[("((unit ^ k) << 4)", "(unit << 4)")], "Proof"),
            ("hopper-warps-step", &[("(x ^ (s << 5))", "(x + (s << 5))")], "Proof"),
            ("hopper-warps-free", &[(arrive, ""), (full, &free_early)], "Proof"),
            ("none", &[], "nothing"),
            ("no-wait", &[(wait, "")], "never waited for"),
            (
                "late-wait",
                &[
                    (wait, ""),
                    ("    float* partial = p.partial + (long long)tile * p.splits * (8 ", late),
                ],
                "Proof",
            ),
            ("no-barrier", &[(barrier, "    const int next = stage")], "Proof"),
            ("no-barrier-of-sums", &[(sums, "  float sum[NT];")], "Proof"),
            (
                "out-of-bounds",
                &[("if (first + d < end) load_codes", "if (first + d <= end) load_codes")],
                "AddressSanitizer",
            ),
            (
                "divergence",
                &[(sums, "  if (threadIdx.x > 99) return;\n  __syncthreads();\n  float sum[NT];")],
                "wait at a barrier",
            ),
        ];
        std::thread::scope(|scope| {
            for (name, edits, notice) in bugs {
                scope.spawn(move || {
                    if let Some(seen) = plant(name, edits) {
                        assert!(seen.contains(notice), "{name}: {seen}");
                    }
                });
            }
        });
    }
}
