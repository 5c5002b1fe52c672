"""Shared by the make_*.py scripts: the header of a checkpoint as JSON, without its data."""
import glob, json, struct
from pathlib import Path

def header(directory):
    """{tensor: [dtype, shape]} over all shards, sorted by name."""
    out = {}
    for f in sorted(glob.glob(f"{directory}/*.safetensors")):
        with open(f, "rb") as h:
            j = json.loads(h.read(struct.unpack("<Q", h.read(8))[0]))
        j.pop("__metadata__", None)
        out |= {k: [v["dtype"], v["shape"]] for k, v in j.items()}
    return dict(sorted(out.items()))

def write_case(path, directory, **extra):
    """One golden header: what made it, quantization_config, the dense tensors' names, and every tensor."""
    cfg = json.loads((Path(directory) / "config.json").read_text())
    files = sorted(p.name for p in Path(directory).iterdir() if p.is_file())
    if "meta" in cfg["quantization_config"]:  # free text about the run; no reader looks at it
        cfg["quantization_config"]["meta"] = {"quantizer": cfg["quantization_config"]["meta"]["quantizer"]}
    j = dict(extra, files=files, quantization_config=cfg["quantization_config"], tie_word_embeddings=cfg["tie_word_embeddings"],
             dtype=cfg.get("dtype", cfg.get("torch_dtype")))
    text = json.dumps(j, indent=1, sort_keys=True)[:-2]
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in header(directory).items())
    Path(path).write_text(text + ',\n "tensors": {\n' + rows + "\n }\n}\n")
