"""Compress a model of 6 GiB under a hard limit of address space, then load the result; rows for results.

Run with ``python -m benchmarks.compress_limit [--only plain|calibrated] [--folder FOLDER]``. Round-to-nearest has 2 GiB
for a Llama whose matrices are those of a 7B. AWQ and GPTQ, which look at activations, have 3 GiB for a Llama of 3
billion parameters (the sides of Llama-3.2-3B), and rtn beside them. They read few random tokens: what is in memory
while a block is compressed depends on its sides far more than on the tokens, and quality is not judged here; the
rows say how many. Each method is stopped after ``--minutes``, and its row then says how far it came; with ``--folder``
it goes on from there when run again. With ``--kill-at 0.4 0.7`` it is killed at these shares of the source and started
again, and the row has the largest peak of all its processes. Compressing and loading each run in a process of their
own; the limit is set by the operating system (``RLIMIT_AS``) before any import.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, stamp

SAMPLES, TOKENS = 4, 256
"""Sequences that calibrated methods read, and their length."""

COMPRESS = """
import json, resource, sys, time
source, out, technique, limit, samples, tokens = *sys.argv[1:4], *map(int, sys.argv[4:7])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import torch
torch.set_num_threads(1)
from pintpot.core.expression import parse
from pintpot.core.model_folder import open_model
from pintpot.weights import compress_folder
def peak(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
method, opened = parse(technique)[0], open_model(source)
generator = torch.Generator().manual_seed(0)
texts = [torch.randint(3, opened.config.vocab_size, (samples, tokens), generator=generator)]
baseline, start = peak("VmRSS"), time.monotonic()
def say(done, total, output=0):
    print(json.dumps({"seconds": time.monotonic() - start, "done": done / total, "output_bytes": output,
                      "source_bytes": opened.weight_bytes, "address_bytes": peak("VmPeak"),
                      "resident_bytes": peak("VmHWM"), "baseline_bytes": baseline}), flush=True)
say(0, 1)
compress_folder(source, out, method, texts=texts if method.calibrated else (), progress=say)
say(1, 1, open_model(out).weight_bytes)
"""

LOAD = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import pintpot.weights
def peak(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
baseline = peak("VmRSS")
start = time.monotonic()
if sys.argv[2] == "transformers":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    model = pintpot.weights.load_compressed(sys.argv[1])
seconds = time.monotonic() - start
held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.view(torch.uint8).max()  # a file that is mapped counts once it has been read
high = peak("VmHWM")
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 19)[None]).logits
print(json.dumps({"seconds": seconds, "held_bytes": held, "peak_bytes": high - baseline,
                  "finite": bool(torch.isfinite(logits).all())}))
"""

MAKE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from pintpot.core.shape import ModelShape
folder, size, hidden, inner, key_heads, tied = Path(sys.argv[1]), *map(int, sys.argv[2:7])
def config(layers):
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=hidden // 128,
                       num_key_value_heads=key_heads, num_hidden_layers=layers, vocab_size=32000, dtype="bfloat16",
                       tie_word_embeddings=bool(tied))
one, two = (ModelShape.from_config(config(n), torch.bfloat16).weight_bytes for n in (1, 2))
shape = ModelShape.from_config(config(max(1, 1 - -(size - one) // (two - one))), torch.bfloat16)
folder.mkdir(parents=True)
generator = torch.Generator().manual_seed(0)
places, part, groups = {}, {}, []
def flush():
    name = f"model-{len(groups) + 1:05d}.safetensors"
    save_file(part, folder / name, {"format": "pt"})
    places.update(dict.fromkeys(part, name)); groups.append(name); part.clear()
for p in shape.parameters:
    fresh = torch.randn(p.shape, generator=generator).mul_(0.02) if len(p.shape) > 1 else torch.ones(p.shape)
    part[p.name] = fresh.to(torch.bfloat16)
    if sum(t.nbytes for t in part.values()) > 2**28:
        flush()
flush()
index = {"metadata": {}, "weight_map": places}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
shape.config.architectures = ["LlamaForCausalLM"]
shape.config.save_pretrained(folder)
"""


@dataclass(frozen=True)
class Part:
    """A model and what is done to it.

    Attributes:
        sides: hidden size, inner size and heads of keys and values of the random Llama, and whether it ties embeddings.
        limit_gib: address space that compressing has.
        techniques: expressions.
    """

    sides: tuple[int, int, int, int]
    limit_gib: float
    techniques: tuple[str, ...]


PARTS = {
    "plain": Part((4096, 11008, 32, 0), 2.0, ("rtn(bits=4)",)),
    "calibrated": Part((3072, 8192, 8, 1), 3.0, ("rtn(bits=4)", "awq(bits=4)", "gptq(bits=4)")),
}


def run(code: str, *arguments: object, seconds: float | None = None, share: float = math.inf) -> dict[str, Any]:
    """Run a snippet in a process of its own and read the JSON of its last line.

    Args:
        code: the snippet.
        arguments: of its command line.
        seconds: after which it is killed; what it said until then counts.
        share: killed as soon as it says that this much is ``done``.

    Returns:
        What it said, or nothing.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            stop = threading.Timer(seconds or threading.TIMEOUT_MAX, process.kill)
            stop.start()
            for line in filter(lambda line: line.startswith("{"), process.stdout or ()):
                found = json.loads(line)
                if found.get("done", 0) >= share:
                    process.kill()
            stop.cancel()
        if process.returncode not in (0, -signal.SIGKILL):
            errors.seek(0)
            raise SystemExit(errors.read()[-4000:])
    return found


def compress(source: Path, out: Path, technique: str, part: Part, minutes: float, kills: list[float]) -> dict[str, Any]:
    """Compress under the limit; the figures, for a row."""
    limit = round(part.limit_gib * 2**30)
    runs = []
    for share in (*kills, math.inf):
        found = run(COMPRESS, source, out, technique, limit, SAMPLES, TOKENS, seconds=minutes * 60, share=share)
        if not found:
            raise SystemExit(f"{technique} said nothing in {minutes} minutes: give it more")
        print(f"{technique}: {found}", flush=True)
        runs.append(found)
    for peak in ("address_bytes", "resident_bytes"):
        found[peak] = max(one[peak] for one in runs)
    found["seconds"] = sum(one["seconds"] for one in runs)
    status = "done under the limit"
    if kills:
        status += f", killed at {', '.join(f'{share:.0%}' for share in kills)} of the source and resumed"
    if not found["output_bytes"]:
        status = f"stopped after {minutes:g} minutes with {found['done']:.1%} of the source done, under the limit"
    calibrated = technique.split("(")[0] != "rtn"
    return {
        **_about(technique, found["source_bytes"]),
        "data": f"random, calibrated on {SAMPLES} x {TOKENS} tokens" if calibrated else "random",
        "metric": f"peak address space of compressing under a limit of {limit} bytes",
        "unit": "bytes",
        "value": found["address_bytes"],
        "baseline": "source model",
        "baseline_value": found["source_bytes"],
        "status": status,
        "peak_bytes": found["resident_bytes"] - found["baseline_bytes"],
        "seconds": round(found["seconds"], 1),
    }


def load(out: Path, how: str, technique: str, source_bytes: int) -> dict[str, Any]:
    """Load the compressed folder, with ``pintpot`` or with ``transformers``; the figures, for a row."""
    found = run(LOAD, out, how)
    print(f"{technique}, load with {how}: {found}", flush=True)
    ratio = found["peak_bytes"] / found["held_bytes"]
    return {
        **_about(technique, source_bytes),
        "data": "random",
        "metric": f"peak resident bytes of loading with {how} over bytes held",
        "unit": "ratio",
        "value": round(ratio, 4),
        "baseline": "bar",
        "baseline_value": 1.15,
        "status": "within the bar" if ratio <= 1.15 and found["finite"] else "over the bar",
        "peak_bytes": found["peak_bytes"],
        "seconds": round(found["seconds"], 1),
    }


def _about(technique: str, source_bytes: int) -> dict[str, Any]:
    return {
        "technique": technique.split("(")[0],
        "config": technique,
        "model": f"random Llama, {source_bytes} bytes of bfloat16",
        "seed": 0,
    }


def measure(part: Part, folder: Path, gib: float, minutes: float, kills: list[float]) -> None:
    """One model compressed by every technique of a part; the rows of each are written as soon as it is done."""
    source = folder / "dense"
    if not source.exists():
        run(MAKE, source, round(gib * 2**30), *part.sides)
    for technique in part.techniques:
        out = folder / technique
        if out.exists():
            print(f"{out} is there already", flush=True)
            continue
        row = compress(source, out, technique, part, minutes, kills)
        rows = [row]
        if out.exists():
            rows += [load(out, how, technique, row["baseline_value"]) for how in ("pintpot", "transformers")]
        append_rows("weights", [stamp(row) for row in rows])


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS), default=None, help="one part")
    parser.add_argument("--gib", type=float, default=6.0, help="size of the dense model")
    parser.add_argument("--minutes", type=float, default=90.0, help="most for each method")
    parser.add_argument("--kill-at", type=float, nargs="*", default=[], help="shares at which it is killed and resumed")
    parser.add_argument("--methods", nargs="*", default=[], help="only these")
    parser.add_argument("--folder", type=Path, default=None, help="keep the models there, and go on after a stop")
    options = parser.parse_args()
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            chosen = [t for t in PARTS[name].techniques if t.split("(")[0] in (options.methods or t)]
            part = replace(PARTS[name], techniques=tuple(chosen))
            folder = (options.folder or Path(temporary)) / name
            measure(part, folder, options.gib, options.minutes, options.kill_at)


if __name__ == "__main__":
    main()
