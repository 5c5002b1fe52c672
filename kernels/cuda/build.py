"""Called by build.sh, which installs the compilers. See there."""

import ctypes
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

import zstandard

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
ENTRY = HERE.parent / "src/cuda/device/attar.cu"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a"]
PTX_OF = {"sm_90a": "compute_90a"}  # others: compute_80
WHEELS = next((ROOT / "target/cuda-venv/lib").glob("python3*")) / "site-packages/nvidia"


def source(path=ENTRY):
    """The text with its includes put in; the same as `attar_kernels::cuda::source()`."""
    lines = []
    for line in path.read_text().splitlines(keepends=True):
        include = re.match(r'#include "(.*)"\n', line)
        lines.append(source(path.parent / include[1]) if include else line)
    return "".join(lines)


def fnv(text):
    """64-bit FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def nvrtc_ptx(text, architecture):
    library = next((WHEELS / "cuda_nvrtc/lib").glob("libnvrtc.so.12"))
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"attar.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        sys.exit(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.raw[: size.value].rstrip(b"\0")


def usage(log):
    """Kernel, registers, bytes spilled, from ptxas -v."""
    pattern = r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {name: (int(registers), int(spill)) for name, spill, registers in re.findall(pattern, log, re.S)}


def ptxas(ptx, architecture, folder):
    (folder / "attar.ptx").write_bytes(ptx)
    tool = WHEELS / "cuda_nvcc/bin/ptxas"
    tool.chmod(0o755)
    out = folder / f"{architecture}.cubin"
    command = [tool, "-v", "-O3", f"-arch={architecture}", folder / "attar.ptx", "-o", out]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return out.read_bytes(), usage(result.stderr)


def nvcc13(architecture, folder):
    tree = WHEELS / "cu13"
    for tool in [*(tree / "bin").iterdir(), *(tree / "nvvm/bin").iterdir()]:
        tool.chmod(0o755)
    out = folder / "nvcc.cubin"
    command = [tree / "bin/nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", ENTRY, "-o", out]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return usage(result.stderr)


def main():
    check = "--check" in sys.argv
    text = source()
    images, report = [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        ptx = {name: nvrtc_ptx(text, name) for name in ["compute_80", *PTX_OF.values()]}
        for architecture in ARCHITECTURES:
            cubin, report[architecture] = ptxas(ptx[PTX_OF.get(architecture, "compute_80")], architecture, folder)
            images.append((architecture, cubin))
        if check:
            for architecture in ["sm_80", "sm_90", "sm_90a"]:
                found = nvcc13(architecture, folder)
                spills = [name for name, (_, spill) in found.items() if spill]
                print(f"nvcc 13.5 {architecture}: {len(found)} kernels, spills in {spills or 'none'}")
    images.append(("ptx", ptx["compute_80"]))
    header = b"ATTARCU1" + struct.pack("<QQ", fnv(text), len(images))
    header += b"".join(struct.pack("<8sQ", name.encode(), len(body)) for name, body in images)
    body = zstandard.ZstdCompressor(level=19, compression_params=zstandard.ZstdCompressionParameters.from_level(
        19, window_log=25, enable_ldm=True)).compress(b"".join(body for _, body in images))

    lines = [f"# registers of each kernel, by ptxas 12.9.86; source {fnv(text):016x}; made by kernels/cuda/build.sh\n"]
    lines.append("# attar_hopper: at the start; its warps then give and take (setmaxnreg)\n")
    lines.append("kernel".ljust(36) + "".join(name.rjust(8) for name in ARCHITECTURES) + "\n")
    spilled = []
    for kernel in sorted(set().union(*report.values())):
        found = [report[a].get(kernel) for a in ARCHITECTURES]
        lines.append(kernel.ljust(36) + "".join(str(one[0] if one else "-").rjust(8) for one in found) + "\n")
        spilled += [f"{kernel} {a}: {one[1]} bytes" for a, one in zip(ARCHITECTURES, found) if one and one[1]]
    if spilled:
        sys.exit("registers are spilled: " + ", ".join(spilled))
    lines.append("# no kernel spills a register\n")
    out = ROOT / "target/cuda-check" if check else HERE
    out.mkdir(parents=True, exist_ok=True)
    (out / "attar.images").write_bytes(header + body)
    (out / "report.txt").write_text("".join(lines))
    sizes = ", ".join(f"{name} {len(body) >> 10} KiB" for name, body in images)
    print(f"{out}/attar.images: {len(header + body)} bytes; {sizes}")
    if check:
        for name in ["attar.images", "report.txt"]:
            if (out / name).read_bytes() != (HERE / name).read_bytes():
                sys.exit(f"kernels/cuda/{name} is not what kernels/cuda/build.sh makes of these sources")
        print("kernels/cuda/attar.images and report.txt are what these sources make")


main()
