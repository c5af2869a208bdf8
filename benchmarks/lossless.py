"""Size and speed of lossless storage, beside the authors' library, on the weights of trained models.

Run with ``python -m benchmarks.lossless [--model FILE.safetensors ...]``; adds rows to ``results/weights.csv``. Each
tensor is stored for itself, in both, so that one can be read without the others; the figures are sums over a model's
tensors. Speeds are of processor time, on one thread, so that other work on the machine does not count. Every model is
stored in the dtype that it is in and cast to the others. ``zipnn`` is measured in the same run,
its turns between ours; without it installed (``pip install zipnn``) its columns stay empty.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from benchmarks.rows import append_rows, stamp
from safetensors.torch import load_file
from torch import Tensor

from pintpot import reference
from pintpot.core import byte_planes
from pintpot.core.model_folder import DTYPES
from pintpot.weights.zipnn import ZipNN

CASTS = (torch.float32, torch.bfloat16, torch.float16)
TURNS = 15
CLAIM = 0.67
"""The paper's abstract: 33 % saved, often, on popular models."""

Coded = list[object]


def ours(tensors: Sequence[Tensor]) -> Coded:
    return [b"".join(ZipNN().encode(tensor)) for tensor in tensors]


def ours_back(coded: Coded) -> list[Tensor]:
    return [byte_planes.decode(np.frombuffer(stored, np.uint8), DTYPES) for stored in coded]


def peer() -> tuple[Callable[[Sequence[Tensor]], Coded], Callable[[Coded], list[Tensor]]] | None:
    """Storing and reading by zipnn, or None where it is not installed."""
    try:
        from zipnn import ZipNN as Package
    except ImportError:
        return None
    coder = Package(input_format="torch", threads=1)
    # It changes what it is given, so that it gets a copy, as ours makes one of its own.
    return (
        lambda tensors: [coder.compress(tensor.clone()) for tensor in tensors],
        lambda coded: [coder.decompress(stored) for stored in coded],
    )


def measure(store: Callable[[Sequence[Tensor]], Coded], back: Callable[[Coded], list[Tensor]], tensors: list[Tensor]):
    """Bytes, and the processor's seconds of storing and of reading; refuses what does not come back bit for bit."""
    start = time.process_time()
    coded = store(tensors)
    middle = time.process_time()
    found = back(coded)
    end = time.process_time()
    for tensor, again in zip(tensors, found, strict=True):
        same = torch.equal(again.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        if not same:
            raise SystemExit("a tensor did not come back bit for bit")
    return sum(len(stored) for stored in coded), middle - start, end - middle


def rows_of(name: str, tensors: list[Tensor], digest: str) -> list[dict]:
    """The rows of one model in one dtype: size, storing, reading."""
    total = sum(tensor.nbytes for tensor in tensors)
    other = peer()
    turns: dict[str, list[tuple[int, float, float]]] = {"ours": [], "zipnn": []}
    for _ in range(TURNS):
        turns["ours"].append(measure(ours, ours_back, tensors))
        if other is not None:
            turns["zipnn"].append(measure(*other, tensors))
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    best = {k: (t[0][0] / total, *(total / min(x[i] for x in t) / 1e6 for i in (1, 2))) for k, t in turns.items() if t}
    mine, theirs = best["ours"], best.get("zipnn", ("", "", ""))
    metrics = (("kept fraction", "of the bytes"), ("storing", "MB/s"), ("reading", "MB/s"))
    print(name, dtype, *(f"{metric} {mine[i]:.4g} (zipnn {theirs[i]})" for i, (metric, _) in enumerate(metrics)))
    return [
        {
            "technique": "zipnn",
            "config": dtype,
            "model": f"{name} {digest}",
            "data": "",
            "context_tokens": "",
            "seed": 0,
            "metric": f"lossless {metric}",
            "unit": unit,
            "value": round(mine[i], 4),
            "baseline": "as they are" if i == 0 else "",
            "baseline_value": 1 if i == 0 else "",
            "peer": "zipnn" if other is not None else "",
            "peer_value": "" if theirs[i] == "" else round(theirs[i], 4),
            "paper_value": CLAIM if i == 0 and dtype == "bfloat16" else "",
            "status": _status(metric, mine[i], theirs[i])
            + f"each tensor alone; best of {TURNS} turns of processor time",
            "peak_bytes": "",
            "seconds": "",
        }
        for i, (metric, unit) in enumerate(metrics)
    ]


def _status(metric: str, own: float, other: float | str) -> str:
    if isinstance(other, str):
        return ""
    better = own <= other if metric == "kept fraction" else own >= other
    return "at least as good as zipnn; " if better else "behind zipnn; "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", default=[], help="a safetensors file of another model")
    parser.add_argument("--quick", action="store_true", help="the embedded model in its own dtype, nothing written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for file in [reference.path() / "model.safetensors", *options.model]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        name = "pintpot-reference" if file.parent == reference.path() else file.parent.parent.name
        stored = [tensor for tensor in load_file(file).values() if tensor.is_floating_point()]
        for dtype in CASTS if not options.quick else (stored[0].dtype,):
            rows += rows_of(name, [tensor.to(dtype) for tensor in stored], digest)
    if not options.quick:
        print(append_rows("weights", [stamp(row) for row in rows]))


if __name__ == "__main__":
    main()
