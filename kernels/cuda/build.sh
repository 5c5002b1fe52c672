#!/usr/bin/env bash
# Makes kernels/cuda/attar.images (cubins and PTX) and kernels/cuda/report.txt from kernels/src/cuda/device/attar.cu.
#   build.sh            makes them
#   build.sh --check    makes them under target/ and compares; also compiles with nvcc 13 for sm_80, sm_90, sm_90a
# The compilers are PyPI wheels, pinned below and installed into a virtual environment under target/. NVRTC 12.0 makes one
# PTX text, which any driver of CUDA 12 or later accepts; ptxas 12.9 makes the cubins from that very text. No CUDA, no
# driver and no GPU is needed. `--check` with the same pins makes the same bytes. Exit 77: the wheels cannot be installed here.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/cuda-venv
pins="nvidia-cuda-nvrtc-cu12==12.0.140 nvidia-cuda-nvcc-cu12==12.9.86 zstandard==0.25.0"
[ "${1:-}" = --check ] && pins="$pins nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-cuda-runtime==13.5.37 nvidia-cuda-cccl==13.3.5.0.6"
if [ "$(cat $venv/pins 2>/dev/null)" != "$pins" ]; then
  rm -f $venv/pins
  if ! { python3 -m venv $venv && $venv/bin/pip install --quiet --no-deps $pins; }; then
    echo "SKIPPED: kernels/cuda (its pinned compilers could not be installed here)"
    exit 77
  fi
  echo "$pins" > $venv/pins
fi
exec $venv/bin/python kernels/cuda/build.py "$@"
