#!/usr/bin/env python3
"""Each family of tests/golden/families as an F32 file in llama.cpp, against the logits of transformers.

usage: families.py ATTAR LLAMACPP OUT
Cases with sliding windows are run with a context inside of the window only when the file says one; llama.cpp reads none
for these architectures, which `attar convert` tells.
"""
import json, shutil, subprocess, sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

attar, tree, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
here = Path(__file__).resolve().parent
golden = here.parent.parent / "golden/families"
helper = out / "logits"
binaries = tree / "build/bin"
subprocess.run(["cc", "-O2", "-o", helper, here / "logits.c", f"-I{tree}/include", f"-I{tree}/ggml/include", f"-L{binaries}", "-lllama",
                "-lggml", "-lggml-base", f"-Wl,-rpath,{binaries}"], check=True)
print("| family | logits against transformers, relative | top-1 | attar says |\n|---|---|---|---|")
failed = []
for case in sorted(path for path in golden.iterdir() if (path / "golden.safetensors").exists() and (path / "config.json").exists()):
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case, folder)
    config = json.load(open(case / "config.json"))
    vocabulary = config["vocab_size"]
    if not list(folder.glob("*.safetensors*")) or vocabulary != 64:
        continue
    tokens = [chr(33 + at) for at in range(vocabulary)]
    json.dump({"added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
               "post_processor": None, "decoder": {"type": "ByteLevel"},
               "model": {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": []}},
              open(folder / "tokenizer.json", "w"))
    target = out / (case.name + "-gguf")
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run([attar, "convert", folder, "--layout", "f32", "--out", target], capture_output=True, text=True)
    if done.returncode:
        print(f"| {case.name} | refused | | {done.stderr.strip()[-150:]} |")
        continue
    notes = "; ".join(line for line in done.stdout.splitlines() if line.startswith("note"))
    expected = load_file(case / "golden.safetensors")
    ids, logits = expected["input_ids"].reshape(-1), expected["logits"].reshape(-1, vocabulary)
    (out / "ids.txt").write_text(" ".join(map(str, ids)) + "\n")
    subprocess.run([helper, target / "model.gguf", out / "ids.txt", out / "theirs.bin"], check=True, stderr=subprocess.DEVNULL)
    theirs = np.fromfile(out / "theirs.bin", np.float32).reshape(len(ids), -1)
    error = np.linalg.norm(theirs - logits) / np.linalg.norm(logits)
    good = error <= 1e-3 or bool(notes)
    if not good:
        failed.append(case.name)
    print(f"| {case.name} | {error:.2e} {'ok' if error <= 1e-3 else 'DIFFERS'} | {np.mean(theirs.argmax(1) == logits.argmax(1)):.3f} | {notes} |")
if failed:
    sys.exit("missed: " + ", ".join(failed))
