#!/usr/bin/env python3
"""Files of attar in llama.cpp: loading, tensors, logits, perplexity, and bytes of llama-quantize.

usage: check.py ATTAR LLAMACPP MODEL TEXT OUT     (see run.sh)
LLAMACPP is a tree with build/bin; needs numpy, gguf, safetensors. Ends with 1 when a bar is missed.
"""
import ctypes, json, os, re, subprocess, sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file

attar, tree, model, text, out = sys.argv[1:]
tree, out = Path(tree), Path(out)
out.mkdir(parents=True, exist_ok=True)
binaries = tree / "build/bin"
ggml = ctypes.CDLL(binaries / "libggml-base.so")
BLOCKS = ["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_xs", "iq4_nl", "q3_k", "q2_k"]
DATA_FREE = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
CONTEXT, WINDOWS = 256, 40
LOGITS_F32, LOGITS_QUANTIZED, PERPLEXITY = 1e-3, 5e-2, 5e-3
failed = []

def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr

def bar(what, good):
    if not good:
        failed.append(what)
    return "ok" if good else "MISSED"

def make(name):
    folder = out / name
    if not folder.exists():
        if name in ("f32", "f16", "bf16"):
            run(attar, "convert", model, "--layout", name, "--out", folder)
        else:
            run(attar, "compress", model, "--preset", "rtn", "--layout", name, "--out", folder)
    return folder / "model.gguf"

def dequantize(tensor):
    """ggml's own numbers of a tensor."""
    name = tensor.tensor_type.name.lower().replace("_k", "_K")
    data = np.ascontiguousarray(tensor.data)
    count = int(np.prod(tensor.shape))
    if name in ("f32", "f16"):
        return data.astype(np.float32).reshape(-1)
    values = np.zeros(count, np.float32)
    if name == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1)
    function = getattr(ggml, "dequantize_row_" + name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(data.ctypes.data, values.ctypes.data, count)
    return values

def perplexity(file):
    log = run(binaries / "llama-perplexity", "-m", file, "-f", cut, "-c", CONTEXT, "-b", CONTEXT, "-ub", CONTEXT, "-t", 1,
              "-ngl", 0, "--chunks", WINDOWS, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    found = re.findall(r"PPL = ([0-9.]+)", log) or re.findall(r"\[\d+\]([0-9.]+)", log)
    return float(found[-1])

def ours(path, *more):
    return json.loads(run(attar, "eval", path, "--score", "second-half", "--context", CONTEXT, "--json", *more))

cut = out / "text.txt"
cut.write_text(Path(text).read_text()[:200_000])

# Logits: the same token ids on both sides.
helper = out / "logits"
run("cc", "-O2", "-o", helper, Path(__file__).with_name("logits.c"), f"-I{tree}/include", f"-I{tree}/ggml/include", f"-L{binaries}",
    "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{binaries}")
vocabulary = json.load(open(Path(model) / "config.json"))["vocab_size"]
rng = np.random.default_rng(3)
ids = rng.integers(3, vocabulary, CONTEXT)
(out / "ids.jsonl").write_text(json.dumps({"input_ids": ids.tolist()}) + "\n")
(out / "ids.txt").write_text(" ".join(map(str, ids)) + "\n")

def logits(file):
    run(helper, file, out / "ids.txt", out / "theirs.bin")
    theirs = np.fromfile(out / "theirs.bin", np.float32).reshape(CONTEXT, -1)
    run(attar, "eval", file, "--ids", out / "ids.jsonl", "--context", CONTEXT, "--dump-logits", out / "ours.safetensors", "--json")
    own = load_file(out / "ours.safetensors")["logits"]
    error = np.linalg.norm(own - theirs) / np.linalg.norm(theirs)
    return error, np.mean(own.argmax(1) == theirs.argmax(1))

print("| file | logits, relative | top-1 | perplexity llama.cpp | attar | tensors by ggml |")
print("|---|---|---|---|---|---|")
for name in ["f32", "f16", "bf16"] + BLOCKS:
    file = make(name)
    error, same = logits(file)
    theirs = perplexity(file)
    # llama-perplexity puts the beginning-of-sequence token into the first slot of each window when the file asks for it.
    adds = GGUFReader(file).fields["tokenizer.ggml.add_bos_token"].contents()
    own = ours(file, "--text", cut, "--max-windows", WINDOWS, *(["--bos"] if adds else []))["perplexity"]
    # What llama.cpp's own dequantizer makes of each tensor is what `attar convert` to f32 writes.
    plain = out / f"{name}-f32"
    if not plain.exists():
        run(attar, "convert", file, "--layout", "f32", "--out", plain)
    theirs_by_name = {t.name: t for t in GGUFReader(file).tensors}
    equal = all(np.array_equal(dequantize(theirs_by_name[t.name]).view(np.uint32), dequantize(t).view(np.uint32))
                for t in GGUFReader(plain / "model.gguf").tensors)
    limit = LOGITS_F32 if name == "f32" else LOGITS_QUANTIZED
    print(f"| {name} | {error:.2e} {bar(name + ' logits', error <= limit)} | {same:.4f} | {theirs:.4f} | {own:.4f} "
          f"{bar(name + ' perplexity', abs(own / theirs - 1) <= PERPLEXITY)} | {bar(name + ' tensors', equal)} |", flush=True)

print("\n| type | tensors | equal bytes to llama-quantize --pure |")
print("|---|---|---|")
for name in BLOCKS:
    theirs = out / f"quantize-{name}.gguf"
    source = make("f32")
    if not theirs.exists():
        run(binaries / "llama-quantize", "--pure", "--token-embedding-type", "f32", "--output-tensor-type", "f32", source, theirs, name.upper() if not name.endswith("_k") else
            {"q2_k": "Q2_K", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S", "q6_k": "Q6_K"}[name], 1)
    a = {t.name: t for t in GGUFReader(make(name)).tensors}
    b = {t.name: t for t in GGUFReader(theirs).tensors}
    pairs = [(a[n], b[n]) for n in b if b[n].tensor_type.name not in ("F32", "F16", "BF16")]
    equal = sum(x.tensor_type == y.tensor_type and np.array_equal(x.data, y.data) for x, y in pairs)
    good = equal == len(pairs) and len(pairs) > 0
    print(f"| {name} | {len(pairs)} | {equal} {bar(name + ' bytes', good) if name in DATA_FREE else ('all' if good else 'not all')} |")

if failed:
    sys.exit("missed: " + ", ".join(failed))
