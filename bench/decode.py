#!/usr/bin/env python3
"""decode.py --attar BINARY --artifact DIR --llama-bench BINARY --gguf FILE [--preload LIB.so] [--also "NAME BINARY ARGUMENTS"]...
          [--threads 1] [--rounds 3] [--name SUFFIX] [--results DIR]

Decoding (tg64) and prefill (pp512) of one model by Attar and by a llama.cpp (or ik_llama.cpp) llama-bench, in turn, on the same
cores and threads, and the bytes of weights that each reads for a token: all tensors but the embedding's rows. The two files
should hold the same bytes; the script says how far apart they are. Then `attar bench` on the artifact with m = 1: bandwidth of
the kernels beside the read bandwidth of the same run. Writes <results>/<date>-<cpu>/decode-<gguf>.json and prints a table.
Needs only the standard library. --also: another llama-bench in the same rounds, e.g. "ik_llama.cpp BINARY -rtr 1". --preload: a library for LD_PRELOAD of llama-bench, e.g. a repaired libggml-cpu.so; say why.
"""
import argparse, datetime, json, os, platform, re, struct, subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--attar", required=True); p.add_argument("--artifact", required=True)
    p.add_argument("--llama-bench", required=True); p.add_argument("--gguf", required=True); p.add_argument("--preload"); p.add_argument("--peer", default="llama.cpp")
    p.add_argument("--threads", type=int, default=1); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--prefill", type=int, default=512); p.add_argument("--decode", type=int, default=64)
    p.add_argument("--also", action="append", default=[]); p.add_argument("--name", default="")
    p.add_argument("--isa"); p.add_argument("--no-bench", action="store_true")
    p.add_argument("--results", default=str(HERE / "results"))
    return p.parse_args()

def gguf_bytes(path):
    """Bytes of all tensors, and of the embedding, from the header: sizes are distances of offsets."""
    with open(path, "rb") as f:
        u32, u64 = (lambda: struct.unpack("<I", f.read(4))[0]), (lambda: struct.unpack("<Q", f.read(8))[0])
        text = lambda: f.read(u64()).decode()
        assert f.read(4) == b"GGUF" and u32() >= 2, "a GGUF file of version 2 or later"
        tensors, pairs = u64(), u64()
        size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        align = 32
        def skip(kind):
            if kind == 8: text()
            elif kind == 9:
                inner, count = u32(), u64()
                if inner in size: f.seek(size[inner] * count, 1)
                else:
                    for _ in range(count): skip(inner)
            else: f.seek(size[kind], 1)
        for _ in range(pairs):
            key, kind = text(), u32()
            if key == "general.alignment": align = u32()
            else: skip(kind)
        at = []
        for _ in range(tensors):
            name = text(); [u64() for _ in range(u32())]; u32(); at.append((u64(), name))
        data = -(-f.tell() // align) * align
    at.sort(); ends = [offset for offset, _ in at[1:]] + [os.path.getsize(path) - data]
    sizes = {name: end - offset for (offset, name), end in zip(at, ends)}
    return sum(sizes.values()), sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0

def run(command, env=None):
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout

def main():
    a = arguments()
    attar = [a.attar, "--threads", str(a.threads)] + (["--isa", a.isa] if a.isa else [])
    env = dict(os.environ, **({"LD_PRELOAD": a.preload} if a.preload else {}))
    total, embedding = gguf_bytes(a.gguf)
    peers = [(a.peer, [a.llama_bench], env)] + [(name, rest, None) for name, *rest in (also.split() for also in a.also)]
    rows = {who: {"decode": [], "prefill": []} for who in ["attar"] + [name for name, _, _ in peers]}
    last = {}
    for _ in range(a.rounds):
        for what, prefill, decode in (("decode", 0, a.decode), ("prefill", a.prefill, 0)):
            for name, command, env in peers:
                out = json.loads(run(command + ["-m", a.gguf, "-t", str(a.threads), "-p", str(prefill), "-n", str(decode), "-r", "1", "-o", "json"], env))
                rows[name][what].append(out[0]["avg_ts"]); last[name] = out[0]
            out = json.loads(run(attar + ["run", a.artifact, "--bench", f"{prefill},{decode}", "--repeat", "1", "--json"]))
            rows["attar"][what].append(out[what]["tokens_per_second"]); last["attar"] = out
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    result = dict(cpu=cpu, date=datetime.date.today().isoformat(), threads=a.threads, peer=a.peer, preload=bool(a.preload), tokens_per_second=rows,
                  bytes_per_token={"attar": last["attar"]["bytes_per_token"], **{name: total - embedding for name, _, _ in peers}}, kernels=last["attar"]["kernels"],
                  isa=last["attar"]["isa"], peer_build={name: {k: last[name].get(k) for k in ("build_commit", "build_number", "cpu_info", "model_type")} for name, _, _ in peers}, also=[" ".join([name] + command[1:]) for name, command, _ in peers[1:]],
                  command=f"bench/decode.py --gguf {Path(a.gguf).name} --threads {a.threads} --rounds {a.rounds}")
    print(f"{cpu}, {a.threads} threads; best of {a.rounds}")
    best = {who: {what: max(values) for what, values in row.items()} for who, row in rows.items()}
    for who, row in best.items():
        mb = result["bytes_per_token"][who] / 1e6
        print(f"{who:16} decode {row['decode']:7.2f} tokens/s ({mb:.1f} MB a token, {mb * row['decode'] / 1e3:.2f} GB/s)   prefill {row['prefill']:8.2f} tokens/s")
    result["ratios"] = {name: {what: best["attar"][what] / best[name][what] for what in ("decode", "prefill")} for name, _, _ in peers}
    result["bytes_ratio"] = result["bytes_per_token"]["attar"] / result["bytes_per_token"][a.peer]
    for name, ratios in result["ratios"].items(): print("attar over", name, {k: round(v, 3) for k, v in ratios.items()}, "bytes", round(result["bytes_ratio"], 4))
    if not a.no_bench:
        result["bench"] = json.loads(run(attar + ["bench", a.artifact, "--m", "1", "--json"]))
        for line in result["bench"]["lines"]:
            if line["chosen"]: print(f"{line['out_features']}x{line['in_features']} {line['kernel']}: {line['gb_per_s']:.2f} of {result['bench']['roofline']['read_gb_per_s']:.2f} GB/s, {100 * line['roofline']:.0f} %")
    folder = Path(a.results) / f"{result['date']}-{re.sub(r'[^a-z0-9]+', '-', cpu.lower()).strip('-')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"decode-{Path(a.gguf).stem}-{a.threads}t{a.name}.json").write_text(json.dumps(result, indent=1) + "\n")

main()
