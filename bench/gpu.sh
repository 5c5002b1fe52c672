#!/usr/bin/env bash
# What the CUDA kernels do on this GPU, in one command of a few minutes: correctness first, then the bars, then peers.
#   bench/gpu.sh [OUT_DIR]          ATTAR=path of a prebuilt binary (default: target/release/attar, built when absent)
#   bench/gpu.sh --list             the commands, without running them
# Writes OUT_DIR/verify.json, bars.json, peers.json and table.txt (default OUT_DIR: target/gpu). Needs an NVIDIA driver.
# Peers: cuBLAS through libcublas.so.12 or, found in Python's packages, of another major; torch (its int4 product) and
# Marlin through Python, or through ATTAR_MARLIN=libmarlin.so. What is absent is named as missing. Making that library of
# github.com/IST-DASLab/marlin, with any nvcc, needs three lines behind its kernel:
#   printf '%s\n' '#include "marlin_cuda_kernel.cu"' 'extern "C" int marlin_mul(const void* a, const void* b, void* c, void* s, int m,
#     int n, int k, void* locks, int group, cudaStream_t stream) { return marlin_cuda(a, b, c, s, m, n, k, locks, group, 0, stream); }' > w.cu
#   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -arch=sm_90 -shared -Xcompiler -fPIC w.cu -o libmarlin.so
set -euo pipefail
cd "$(dirname "$0")/.."
attar=${ATTAR:-target/release/attar}
if [ "${1:-}" = --list ]; then
  echo "$attar demo; $attar verify --backend cuda; $attar gpu --json; python3 bench/gpu_peers.py"
  exit 0
fi
out=${1:-target/gpu}
[ -x "$attar" ] || cargo build --release
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# cuBLAS of a Python package, when the system has none.
libraries=$(python3 bench/gpu_peers.py --libraries 2>/dev/null || true)
for library in $libraries; do ln -sf "$library" "$work/$(basename "$library" | sed 's/\.so\..*/.so/')"; done
export LD_LIBRARY_PATH="$work:$(dirname "${libraries%% *}" 2>/dev/null || true):${LD_LIBRARY_PATH:-}"

"$attar" demo --out "$work/demo" > "$work/demo.log" 2>&1 || { cat "$work/demo.log" >&2; exit 2; }
echo "== correctness"
status=0
timeout 180 "$attar" verify "$work/demo/gptq-w4" --backend cuda --json > "$out/verify.json" || status=$?
if [ "$status" = 2 ]; then exit 2; fi
if [ "$status" = 1 ]; then
  echo "kernels are WRONG on this GPU (see $out/verify.json); no timing is worth anything" >&2
  exit 1
fi
echo "every kernel is right (see $out/verify.json)"
echo "== speed"
timeout 240 "$attar" gpu --json > "$out/bars.json"
timeout 180 python3 bench/gpu_peers.py "$out/bars.json" "$out/peers.json" | tee "$out/table.txt"
