#!/usr/bin/env python3
"""check_golden.py: dequantize.py against the tensors that the reference tools packed (tests/golden). Exit 1 on any difference."""
import json, sys
from pathlib import Path
import numpy as np
from dequantize import awq, compressed_tensors, gptq, tensors

golden, bad = Path(__file__).resolve().parent.parent / "golden", 0
for folder in ("compressed_tensors", "gptq", "awq"):
    t = tensors(golden / folder)
    for name, c in json.loads((golden / folder / "cases.json").read_text()).items():
        got = (compressed_tensors(t, name, c["bits"]) if folder == "compressed_tensors" else
               awq(t, name) if folder == "awq" else gptq(t, name, c["bits"], c["checkpoint_format"] == "gptq"))
        want = t[name + ".weight"]
        tolerance = {"bfloat16": 2**-8, "float16": 2**-11}.get(c.get("scale_dtype"), 0)  # there the oracle rounded its product
        ok = bool(np.all(np.abs(got - want) <= tolerance * np.abs(want)))
        bad += not ok
        print(f"{folder:20}{name:28}{'same' if ok else 'DIFFERENT'}")
sys.exit(bad > 0)
