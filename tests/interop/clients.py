"""Loading an artifact for the checks of this folder, and the windows they run on."""
import functools, json, os, tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "8")  # GPTQModel refuses to start, or hangs, with the two workers of a two-core machine
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM


@functools.lru_cache(maxsize=1)
def load(directory, dtype="float32", native=False):
    """The artifact as a torch model: through the runtime that transformers picks, or dense through dequantize.py."""
    if not native:
        adapter, more = Path(directory) / "adapter", {}
        if adapter.is_dir():  # PEFT looks for `weight`, which compressed-tensors has only when it decompresses
            from transformers import CompressedTensorsConfig
            more = dict(quantization_config=CompressedTensorsConfig(run_compressed=False))
        # The code that a factored artifact brings is ours (modeling_attar.py); other artifacts bring none.
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), device_map="cpu", trust_remote_code=True, **more)
        if adapter.is_dir():
            from peft import PeftModel
            model = PeftModel.from_pretrained(model, str(adapter))
        return model.eval()
    from dequantize import dense_state, round_inputs
    config, state, _ = dense_state(directory)
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "config.json").write_text(json.dumps(config))
        c = AutoConfig.from_pretrained(d)
    model = AutoModelForCausalLM.from_config(c, dtype=torch.float32)
    tied = getattr(c, "tie_word_embeddings", False)
    if tied and "model.embed_tokens.weight" not in state:
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    left = model.load_state_dict(state, strict=False)
    missing = [k for k in left.missing_keys if not (tied and k == "lm_head.weight")]
    if missing or left.unexpected_keys:
        raise ValueError(f"{directory}: missing {missing[:5]}, unexpected {left.unexpected_keys[:5]}")
    model.tie_weights()
    round_inputs(model, directory)
    return model.eval()


def token_ids(directory, text=None, ids=None):
    """All token ids: of a text through the artifact's own tokenizer.json (no special token), or of a file of {"input_ids": [...]}."""
    if ids:
        return [i for line in open(ids) if line.strip() for i in json.loads(line)["input_ids"]]
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    return tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False).ids


@torch.no_grad()
def logits(model, window):
    return model(torch.tensor([window])).logits[0].float()
