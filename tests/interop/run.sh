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
failed=0; list=$out/checks; : > "$list"
py() { PYTHONPATH="$here" PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" "$@" 2>> "$out/clients.log"; }
check() { echo "$1 '$d' '$2' --text '$val' $3" >> "$list"; }

py "$here/check_golden.py" > "$out/golden.txt" || { failed=1; grep DIFFERENT "$out/golden.txt" || echo "check_golden.py could not run, see $out/clients.log"; }
rm -rf "$out/gptq-w4" "$out/awq-w4" "$out/gptq-w3" "$out/w8a8"
"$ATTAR" compress "$model" --preset gptq-w4 --layout compressed-tensors --layout gptq --layout awq --text "$calib" --context 256 --out "$out/gptq-w4"
"$ATTAR" compress "$model" --preset awq-w4 --layout compressed-tensors --layout awq --text "$calib" --context 256 --out "$out/awq-w4"
"$ATTAR" compress "$model" --preset gptq-w3 --layout compressed-tensors --text "$calib" --context 256 --out "$out/gptq-w3"
"$ATTAR" compress "$model" --preset w8a8 --text "$calib" --context 256 --out "$out/w8a8"
# W8A8: transformers rounds activations with another step (max/127.5, not max/127), so logits agree to the rounding itself.
d=$out/w8a8; "$ATTAR" eval "$d" --text "$val" --context 256 --dump-logits "$out/w8a8.safetensors" --json > "$out/w8a8.json"
check check_logits "$out/w8a8.safetensors" "--native --bound 5e-3"
check check_ppl "$out/w8a8.json" --native
check check_logits "$out/w8a8.safetensors" "--bound 4e-2"
check check_ppl "$out/w8a8.json" ""
for a in gptq-w4/compressed-tensors gptq-w4/gptq gptq-w4/awq awq-w4/compressed-tensors awq-w4/awq gptq-w3; do
  d=$out/$a; tag=$(echo "$a" | tr / _); report=$out/$tag.json; dump=$out/$tag.safetensors
  "$ATTAR" eval "$d" --text "$val" --context 256 --dump-logits "$dump" --json > "$report"
  check check_logits "$dump" --native
  check check_ppl "$report" --native
  case $a in
    */awq) [ $full = no ] || check check_logits "$dump" "--dtype bfloat16" ;;
    */gptq) [ $full = no ] || { check check_logits "$dump" ""; check check_ppl "$report" ""; } ;;
    *) check check_logits "$dump" ""; check check_ppl "$report" "" ;;
  esac
done
# Factored linears load through the modeling_attar.py beside them, corrections through PEFT.
for a in svd-llm-gptq svd-llm-merged gptq-w3-eora; do
  d=$out/$a; rm -rf "$d"
  "$ATTAR" compress "$model" --recipe "$root/examples/$a.toml" --text "$calib" --context 256 --out "$d"
  "$ATTAR" eval "$d" --text "$val" --context 256 --dump-logits "$out/$a.safetensors" --json > "$out/$a.json"
  check check_logits "$out/$a.safetensors" ""
  check check_ppl "$out/$a.json" ""
done
py "$here/check_all.py" < "$list" > "$out/check_all.log" || failed=1
grep '^{"check"' "$out/check_all.log" > "$out/results.jsonl" || failed=1  # the rest is GPTQModel talking
cat "$out/results.jsonl"
[ $failed = 0 ] && echo "interop: all comparisons within their bounds ($out)" || echo "interop: FAILED, see $out/clients.log"
exit $failed
