#!/bin/sh
# Files of attar in llama.cpp, one command:
#   LLAMACPP=~/llama.cpp tests/interop/llamacpp/run.sh MODEL TEXT [OUT]
# LLAMACPP is a tree built with llama-quantize, llama-perplexity and shared libraries (build/bin); PYTHON has numpy,
# gguf and safetensors. OUT keeps the files; what is there is not made again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
attar=${ATTAR:-$root/target/release/attar}
out=${3:-$(mktemp -d)}
# Every family of the golden checkpoints, then the types on one model; both are run whatever the first finds.
families=0
"${PYTHON:-python3}" "$here/families.py" "$attar" "$LLAMACPP" "$out/families" || families=$?
echo
"${PYTHON:-python3}" "$here/check.py" "$attar" "$LLAMACPP" "$1" "$2" "$out"
exit "$families"
