"""Writes the files of this folder: `python make_pytorch.py`, see PROVENANCE.md."""

import collections
import os
import pathlib
import zipfile

import torch
from safetensors.torch import save_file

here = pathlib.Path(__file__).parent
torch.manual_seed(7)


class System:
    """What a malicious file does: a call of the system when it is loaded by `pickle`."""

    def __reduce__(self):
        return os.system, ("exit 1",)


base = torch.randn(6, 4)
linear = torch.nn.Linear(4, 3)
state = collections.OrderedDict(
    f32=base,
    tied=base,
    f16=torch.randn(5).half(),
    bf16=torch.randn(2, 3, 2).bfloat16(),
    f64=torch.randn(2).double(),
    i64=torch.arange(3),
    i32=torch.arange(3, dtype=torch.int32),
    i16=torch.arange(3, dtype=torch.int16),
    i8=torch.arange(3, dtype=torch.int8),
    u8=torch.arange(3, dtype=torch.uint8),
    u16=torch.arange(3, dtype=torch.int16).view(torch.uint16),
    bool=torch.tensor([True, False]),
    f8=torch.randn(4).to(torch.float8_e4m3fn),
    scalar=torch.tensor(2.5),
    empty=torch.zeros(0, 3),
    rows=base[2:4],
    transposed=base.t(),
    columns=base[:, 1:3],
    parameter=linear.weight,
)
state._metadata = collections.OrderedDict({"": {"version": 1}})
torch.save(state, here / "state.bin")
torch.save(dict(state), here / "state_protocol4.bin", pickle_protocol=4)
save_file({k: v.detach().clone().contiguous() for k, v in state.items()}, here / "state.safetensors", metadata={"format": "pt"})
torch.save({"w": base, "v": base[0]}, here / "legacy.bin", _use_new_zipfile_serialization=False)
torch.save(linear, here / "module.bin")
torch.save({"w": base, "x": System()}, here / "system.bin")
torch.save({"model": {"w": base}}, here / "nested.bin")
torch.save({"w": base, "step": 3}, here / "number.bin")
torch.save({"wide": torch.zeros(4).expand(1000, 4)}, here / "expanded.bin")
with zipfile.ZipFile(here / "state.bin") as old, zipfile.ZipFile(here / "compressed.bin", "w", zipfile.ZIP_DEFLATED) as new:
    for name in old.namelist():
        new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)
