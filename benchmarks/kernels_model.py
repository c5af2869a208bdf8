"""A whole model decoding: a Llama of 1.1 billion parameters with random packed weights, beside llama.cpp.

Run with ``python -m benchmarks.kernels_model`` (``--quick`` tries it with two layers and writes nothing). The sides
are those of TinyLlama. The model is compressed by ``rtn`` and exported to GGUF where that is exact (4 and 8 bits in
groups of 32), so that llama.cpp has the very same numbers; ours is read in each of ``READINGS``. The head and the
embedding are bfloat16 in both. Each run has a process of its own: it reads a prompt of 32 tokens, decodes 64 more one
by one, of given ids, and then reads one of 512 into a new cache. Times are medians over tokens; peaks are those of the
whole process, with what is imported. After decoding, the packed products and the head are timed by themselves, and
reading as many bytes.

llama.cpp is measured where it is built: its Python package in ``out/storage/llama``, and optimised libraries for it in
``out/ggml`` (``libllama.so`` and ``libggml*.so``, compiled as ``Release``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import append_rows, stamp
from transformers import LlamaConfig, LlamaForCausalLM

from pintpot.core.expression import parse
from pintpot.weights import compress_folder
from pintpot.weights.export import export_folder

OUT = Path(__file__).parent.parent / "out"
LLAMA = OUT / "storage" / "llama" / "bin" / "python"
WAYS = {
    "4 bits, groups of 32": "rtn(bits=4, group_size=32, symmetric=True)",
    "8 bits, groups of 32": "rtn(bits=8, group_size=32, symmetric=True)",
    "4 bits, groups of 128": "rtn(bits=4, group_size=128)",
    "2 bits, groups of 128": "rtn(bits=2, group_size=128)",
}
"""What is compressed how. The first two are exported."""

EXPORTED = tuple(WAYS)[:2]
READINGS = (
    ("", "as it is"),
    ("row-tiles", "as it is"),
    ("row-tiles(int8_inputs=True)", "as it is"),
    ("row-tiles(int8_inputs=True)", "compiled"),
)
"""What reads the weights (first as they are stored), and whether ``torch.compile`` makes a program of a decoding step:
with a static cache and transformers' ``eager`` attention, which it joins with what is around. Its median leaves out the
compilation; its peak does not."""

PROMPT, NEW, LONG = 32, 64, 512

COMMON = """
import json, statistics, sys, time
source, threads, prompt, new, long = sys.argv[1], *map(int, sys.argv[2:6])
ids = [(37 * i + 11) % 30000 for i in range(max(long, prompt + new))]
def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
def told(read, step, start_anew, parts=dict):
    read(ids[:prompt])
    seconds = []
    for token in ids[prompt : prompt + new]:
        start = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - start)
    decoding, found = peak(), parts()
    start_anew()
    start = time.perf_counter()
    read(ids[:long])
    print(json.dumps({"decode": statistics.median(seconds), "prefill": time.perf_counter() - start,
                      "peak_bytes": decoding, **found}))
"""

OURS = (
    COMMON
    + """
import torch
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
from transformers import DynamicCache, StaticCache
from pintpot.core.expression import parse
from pintpot.weights import load_compressed
from pintpot.weights.modules import PackedTerms
model = load_compressed(source).eval()
for kernel in parse(sys.argv[6]) if sys.argv[6] else ():
    kernel.apply_(model)
cache, step = [DynamicCache(config=model.config)], model
if sys.argv[7] == "compiled":
    model.set_attn_implementation("eager")
    cache = [StaticCache(config=model.config, max_cache_len=prompt + new)]
    step = torch.compile(model.forward, fullgraph=True, dynamic=False)
def run(tokens, forward=model):
    return forward(torch.tensor([tokens]), past_key_values=cache[0], logits_to_keep=1).logits[0, -1].argmax()
def start_anew():
    model.set_attn_implementation("sdpa")
    cache[0] = DynamicCache(config=model.config)
def seconds_of(call):
    found = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
def parts():
    packed = [module for module in model.modules() if isinstance(module, PackedTerms)]
    inputs = {module: torch.randn(1, module.columns, dtype=model.dtype) for module in packed}
    hidden, memory = torch.randn(1, 1, model.config.hidden_size, dtype=model.dtype), torch.ones(2**27)
    read = sum(buffer.nbytes for module in packed for buffer in module.buffers()) + model.lm_head.weight.nbytes
    return {"products": seconds_of(lambda: [module.multiply(inputs[module]) for module in packed]),
            "head": seconds_of(lambda: model.lm_head(hidden)), "calls": len(packed),
            "reading": read * seconds_of(memory.sum) / memory.nbytes}
told(run, lambda token: run([token], step), start_anew, parts)
"""
)

THEIRS = (
    COMMON
    + """
from llama_cpp import Llama
model = Llama(source, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
told(model.eval, lambda token: model.eval([token]), model.reset)
"""
)


def write_model(folder: Path, layers: int) -> None:
    """A dense model with random weights, bfloat16."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)


def measured(python: str, script: str, source: Path, threads: int, *reading: str, **more: str) -> dict[str, Any]:
    """The figures of a run in a process of its own; why there are none, where there are none."""
    command = [python, "-c", script, str(source), *map(str, (threads, PROMPT, NEW, LONG)), *reading]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **more})
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def rows(layers: int, threads: int) -> Iterator[dict[str, Any]]:
    """Rows of every way, ours beside llama.cpp's where it has the same numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "dense", layers)
        for index, (way, technique) in enumerate(WAYS.items()):
            packed = folder / f"packed{index}"
            compress_folder(folder / "dense", packed, parse(technique)[0])
            theirs: dict[str, Any] = {"failed": "not exported"}
            if way in EXPORTED:
                file = folder / "model.gguf"
                export_folder(packed, file, "gguf")
                libraries = {"LLAMA_CPP_LIB_PATH": str(OUT / "ggml")}
                theirs = measured(str(LLAMA), THEIRS, file, threads, **libraries)
                file.unlink()
            for kernel, run in READINGS:
                ours = measured(sys.executable, OURS, packed, threads, kernel, run)
                config = "*".join(filter(None, (technique, kernel))) + ", torch.compile" * (run == "compiled")
                yield from said(way, config, layers, ours, theirs)


METRICS: dict[tuple[str, str], Callable[[dict[str, Any]], float]] = {
    (f"decoding, batch 1, {NEW} tokens after {PROMPT}", "tokens/s"): lambda found: 1 / found["decode"],
    (f"prefill of {LONG} tokens", "tokens/s"): lambda found: LONG / found["prefill"],
    ("peak resident bytes of decoding, imports included", "bytes"): lambda found: found["peak_bytes"],
}


def said(
    way: str, technique: str, layers: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one way."""
    about = {"model": f"Llama of TinyLlama's sides, {layers} layers, random", "data": f"{way}, bfloat16"}
    for (metric, unit), number in METRICS.items():
        row = {**about, "technique": "pintpot", "config": technique, "metric": metric, "unit": unit, "seed": 0}
        if "failed" in ours:
            yield {**row, "status": f"not measured: {ours['failed']}"}
            continue
        row |= {"value": f"{number(ours):.6g}", "peak_bytes": ours["peak_bytes"], "seconds": round(ours["decode"], 5)}
        if "failed" in theirs:
            yield {**row, "status": f"llama.cpp: {theirs['failed']}"}
            continue
        peer, ratio = number(theirs), number(ours) / number(theirs)
        yield {
            **row,
            "peer": "llama.cpp",
            "peer_value": f"{peer:.6g}",
            "status": f"{ratio:.3f} of llama.cpp's" + (profile(ours) if metric.startswith("decoding") else ""),
        }


def profile(ours: dict[str, Any]) -> str:
    """Where the time of a decoded token goes."""
    whole, products, head = (1000 * ours[part] for part in ("decode", "products", "head"))
    return (
        f"; of {whole:.1f} ms the {ours['calls']} products alone take {products:.1f} and the head {head:.1f}, what is"
        f" between them {whole - products - head:.1f}; to read their bytes takes {1000 * ours['reading']:.1f}"
    )


def main() -> None:
    """Measure every way, and write its rows as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers; nothing is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    for row in rows(2 if options.quick else 22, options.threads):
        print(f"{row['data']} | {row['metric']}: {row.get('value', '')} {row['unit']} | {row['status']}", flush=True)
        if not options.quick:
            append_rows("kernels", [stamp(row)])


if __name__ == "__main__":
    main()
