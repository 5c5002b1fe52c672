#!/bin/sh
# Files of attar in llama.cpp, one command:
#   LLAMACPP=~/llama.cpp tests/interop/llamacpp/run.sh MODEL TEXT [OUT]
# LLAMACPP is a tree built with llama-quantize, llama-perplexity and shared libraries (build/bin); PYTHON has numpy,
# gguf and safetensors. OUT keeps the files; what is there is not made again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
attar=${ATTAR:-$root/target/release/attar}
exec "${PYTHON:-python3}" "$here/check.py" "$attar" "$LLAMACPP" "$1" "$2" "${3:-$(mktemp -d)}"
