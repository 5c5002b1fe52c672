#!/bin/sh
# run.sh [--light] [OUT]: compresses the demo model to the three layouts and lets the clients judge them.
# Full: transformers loads all three (GPTQ and AWQ through GPTQModel). Light: transformers loads compressed-tensors, the
# independent dequantizer the other two. Environment: ATTAR_INTEROP_VENV (reuse a virtual environment), ATTAR (a built binary).
# Exit 0: every comparison within its bound; 1: not.
set -eu
here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../.." && pwd)
full=yes; [ "${1:-}" = --light ] && { full=no; shift; }
out=${1:-$(mktemp -d)}; mkdir -p "$out"
venv=${ATTAR_INTEROP_VENV:-$out/venv}
if [ ! -x "$venv/bin/python" ]; then
  if [ $full = yes ]; then sh "$here/setup.sh" "$venv" --full; else sh "$here/setup.sh" "$venv"; fi
fi
if [ -z "${ATTAR:-}" ]; then
  (cd "$root" && cargo build --release --quiet)
  ATTAR=${CARGO_TARGET_DIR:-$root/target}/release/attar
fi
model=$root/tests/data/tinystories-656k; calib=$root/tests/data/tinystories_calib.txt; val=$root/tests/data/tinystories_val.txt
failed=0; log=$out/results.jsonl; : > "$log"
py() { PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" "$@" 2>> "$out/clients.log"; }
check() { if py "$@" | tee "$out/last" && grep -q '"passed": true' "$out/last"; then :; else failed=1; echo "FAILED: $*"; fi; cat "$out/last" >> "$log"; }

py "$here/check_golden.py" || failed=1
rm -rf "$out/gptq-w4" "$out/awq-w4" "$out/gptq-w3"
"$ATTAR" compress "$model" --preset gptq-w4 --layout compressed-tensors --layout gptq --layout awq --text "$calib" --context 256 --out "$out/gptq-w4"
"$ATTAR" compress "$model" --preset awq-w4 --layout compressed-tensors --layout awq --text "$calib" --context 256 --out "$out/awq-w4"
"$ATTAR" compress "$model" --preset gptq-w3 --layout compressed-tensors --text "$calib" --context 256 --out "$out/gptq-w3"
for a in gptq-w4/compressed-tensors gptq-w4/gptq gptq-w4/awq awq-w4/compressed-tensors awq-w4/awq gptq-w3; do
  d=$out/$a; tag=$(echo "$a" | tr / _); report=$out/$tag.json; dump=$out/$tag.safetensors
  "$ATTAR" eval "$d" --text "$val" --context 256 --dump-logits "$dump" --json > "$report"
  check "$here/check_logits.py" "$d" "$dump" --text "$val" --native
  check "$here/check_ppl.py" "$d" "$report" --text "$val" --native
  case $a in
    */awq) [ $full = no ] || check "$here/check_logits.py" "$d" "$dump" --text "$val" --dtype bfloat16 ;;
    */gptq) [ $full = no ] || check "$here/check_logits.py" "$d" "$dump" --text "$val" ;;
    *) check "$here/check_logits.py" "$d" "$dump" --text "$val"; check "$here/check_ppl.py" "$d" "$report" --text "$val" ;;
  esac
done
[ $failed = 0 ] && echo "interop: all comparisons within their bounds ($out)" || echo "interop: FAILED, see $log and $out/clients.log"
exit $failed
