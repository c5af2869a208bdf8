"""Seconds and memory of compressing, each method once at about 4 bits, beside the package that does the same.

Run with ``python -m benchmarks.weights_compressing``; adds rows to ``results/weights.csv``. What is compressed is a
Llama of two layers of 1,024 and 2,816 with random weights, held in memory in float32, and what it is calibrated on are
random tokens: neither changes how long it takes. Methods that train do so for ``STEPS`` steps on the embedded model.
Each runs in a process of its own, on all processors, and is stopped after ``--minutes``. Peaks are resident bytes above
those before, with the dense model and the copy that is compressed there already. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import append_rows, stamp
from benchmarks.weights_methods import USE, described, measure
from benchmarks.weights_peers import measure_peer, peers
from benchmarks.weights_subjects import Subject, language
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pintpot import reference
from pintpot.core.errors import PintpotError
from pintpot.core.expression import parse
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.jobs.text import TextSettings
from pintpot.weights import WeightMethod
from pintpot.weights.by_training import ByTraining
from pintpot.weights.targets import find_targets

SAMPLES, TOKENS, STEPS = 16, 512, 10
NAME = "Llama, 2 layers of 1024 and 2816, random"
CONFIGS = {
    "adadim": "adadim(group_size=64)",
    "awq": "awq(group_size=64)",
    "decoupleq": "decoupleq(bits=4)",
    "endor": "endor(bits=8)",
    "gptq": "gptq(group_size=64)",
    "gqsa": "gqsa(group_size=64)",
    "rtn": "rtn(group_size=64)",
    "vptq": "vptq(vector_length=3, index_bits=12)",
    "zeroquant-v2-lorc": "zeroquant-v2-lorc(group_size=64)",
}
"""Settings of about 4 bits, where they are not a method's own."""

LIKE = {
    "rtn": ("optimum-quanto, 4 bits, default groups", "hqq, 4 bits, groups of 64"),
    "gptq": ("llm-compressor GPTQ, 4 bits, groups of 64, or the half that divides the inputs",),
    "awq": ("llm-compressor AWQ, 4 bits, groups of 64, or the half that divides the inputs",),
}
"""The packages that do what a method does; the first is named in its row."""


def write_model(folder: Path) -> None:
    """The dense model, float32, with a tokenizer, which packages look for."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference.path() / name, folder / name)


def subject(folder: Path) -> Subject:
    """The model of a folder, which nobody judges."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(model.config.vocab_size, (4, TOKENS), generator=generator) for _ in range(SAMPLES // 4)]
    about = {"model": NAME, "data": f"{SAMPLES} x {TOKENS} random tokens", "context_tokens": ""}
    return Subject("language", folder, model, find_targets(model)[0], texts, lambda other: {}, (), about)


def measure_one(config: str, folder: Path) -> dict[str, Any]:
    """One configuration of ours, or of a peer."""
    peer = next((peer for peer in peers() if peer.config == config), None)
    if peer is not None:
        if peer.missing:
            raise SystemExit(peer.missing)
        given = subject(folder)
        found = measure_peer(given, peer)
    else:
        method = parse(config)[0]
        assert isinstance(method, WeightMethod | ByTraining)
        given = language(1, 1) if isinstance(method, ByTraining) else subject(folder)
        training = TextSettings(tokens=256, batch=8, steps=STEPS)
        found = measure(given, method, training) | {"described": described(method, training)}
    return found | {"numbers": given.numbers, "model": given.about["model"], "data": given.about["data"]}


def configurations(names: str, shape: ModelShape) -> Iterator[tuple[str, str]]:
    """The name and the configuration of each method that can be chosen for a model."""
    for name, kind in sorted(techniques("weights").items()):
        wanted = issubclass(kind, WeightMethod | ByTraining) and (not names or name in names.split(","))
        if wanted and any(kind.options(shape, USE)):
            yield name, CONFIGS.get(name, name)


def run(config: str, folder: Path, minutes: float) -> dict[str, Any]:
    """Measure in a process of its own; ``failed`` says why there is nothing."""
    command = [sys.executable, "-m", "benchmarks.weights_compressing", "--one", config, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {minutes:g} minutes"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:200]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def row(name: str, config: str, found: dict[str, Any], peer: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """The row of one configuration."""
    about = {"technique": name, "config": config, "metric": "compressing", "unit": "seconds a billion weights"}
    about |= {"model": NAME, "data": f"{SAMPLES} x {TOKENS} random tokens", "seed": 0}
    if "failed" in found:
        return about | {"status": f"not measured: {found['failed']}"}
    each = found["seconds"] / found["numbers"] * 1e9
    about |= {"config": found.get("described", config), "model": found["model"], "data": found["data"]}
    about |= {"value": f"{each:.5g}", "peak_bytes": found["peak_bytes"], "seconds": found["seconds"]}
    words = [f"{found['numbers']} weights", f"peak {found['peak_bytes']} bytes above the dense model and its copy"]
    if "seconds" in theirs:
        about |= {"peer": peer, "peer_value": f"{theirs['seconds'] / theirs['numbers'] * 1e9:.5g}"}
        words.append(f"{found['seconds'] / theirs['seconds']:.3g} of its time; its peak {theirs['peak_bytes']} bytes")
    elif peer:
        words.append(f"{peer}: {theirs['failed']}")
    return about | {"status": "; ".join(words)}


def main() -> None:
    """Measure each configuration, and write its row as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument("--minutes", type=float, default=4.0, help="most for each")
    parser.add_argument("--quick", action="store_true", help="write nothing")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        try:
            print(json.dumps(measure_one(options.one, options.folder)))
        except PintpotError as error:
            raise SystemExit(error.message) from error
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        for name, config in configurations(options.methods, ModelShape.from_folder(folder)):
            packages = {peer: run(peer, folder, options.minutes) for peer in LIKE.get(name, ())}
            made = [row(peer.split(",")[0], peer, theirs, "", {}) for peer, theirs in packages.items()]
            first, theirs = next(iter(packages.items()), ("", {}))
            made.append(row(name, config, run(config, folder, options.minutes), first, theirs))
            for each in made:
                print(f"{each['config']}: {each.get('value', '')} {each['status']}", flush=True)
            if not options.quick:
                append_rows("weights", [stamp(each) for each in made])


if __name__ == "__main__":
    main()
