#!/bin/sh
# setup.sh DIR [--full]: makes a virtual environment in DIR with the pinned clients.
# Light (default): torch, transformers, compressed-tensors. Full: GPTQModel and optimum as well (a source build, some minutes).
# ATTAR_PIP_ARGS is handed to every `pip install` (for example an index that has the CPU build of torch); PYTHON names the interpreter.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: setup.sh DIR [--full]}
[ -x "$dir/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir"
pip() { "$dir/bin/python" -m pip install -q ${ATTAR_PIP_ARGS:-} "$@"; }
pip -r "$here/requirements-ci.txt"
if [ "${2:-}" = --full ]; then
  pip -r "$here/requirements-gptqmodel.txt"
  BUILD_CUDA_EXT=0 "$dir/bin/python" -m pip install -q ${ATTAR_PIP_ARGS:-} --no-build-isolation --no-deps GPTQModel==7.7.0
  pip --no-deps optimum==2.3.0
fi
echo "ready: $dir"
