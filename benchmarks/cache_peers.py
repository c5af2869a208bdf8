"""NVIDIA's kvpress beside ours: its environment, its runs on our prompts, and what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.cache_methods import FRACTIONS
from benchmarks.cache_rows import Measured
from benchmarks.cache_tasks import Task, write_prompts
from benchmarks.rows import stamp

FOLDER = Path(__file__).parent.parent / "out" / "kvpress"
"""kvpress pins an older transformers, so it has an environment of its own."""

PYTHON = FOLDER / "bin" / "python"
PACKAGE = "kvpress==0.5.5"
SCRIPT = Path(__file__).with_name("cache_kvpress.py")


def prepare() -> None:
    """Make kvpress's environment, with the torch that is used here.

    Raises:
        CalledProcessError: when its packages cannot be had.
    """
    installed = FOLDER / "installed"
    if installed.is_file():
        return
    print(f"making {FOLDER}, an environment for {PACKAGE}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    torch = f"torch=={version('torch')}"
    subprocess.run([str(PYTHON), "-m", "pip", "install", "--quiet", torch, PACKAGE], check=True)
    installed.touch()


def kvpress(folder: Path, tasks: Sequence[Task], *, quick: bool, run: bool) -> list[Measured]:
    """All presses on these tasks; what was measured before is not measured again.

    Args:
        folder: of the model.
        tasks: what is asked.
        quick: few presses, and files of their own.
        run: measure what is missing; else only what is there counts.
    """
    name = "quick-" if quick else ""
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts, results = FOLDER / f"{name}prompts.safetensors", FOLDER / f"{name}results.json"
    digest = write_prompts(prompts, folder, tasks, FRACTIONS)
    if run:
        command = [str(PYTHON), str(SCRIPT), str(prompts), str(results)]
        if quick:
            command += ["--presses", "KeyDiffPress,AdaKVPress(KeyDiffPress)"]
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        try:
            prepare()
            subprocess.run(command, check=True, env={**os.environ, **quiet})
        except subprocess.CalledProcessError as error:
            print(f"kvpress stopped, and counts as far as it came: {error}", flush=True)
    return read_results(results, digest)


def read_results(file: Path, digest: str) -> list[Measured]:
    """What kvpress's runs found on these prompts: a method for each press and share; failed runs are left out."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if results.get("prompts") != digest:
        print("kvpress has not been measured on these prompts: run with --only kvpress", flush=True)
        return []
    where = stamp({}) | {"versions": results["versions"], "hardware": results["hardware"]}
    found: dict[tuple[str, float], Measured] = {}
    for run in results["runs"]:
        if "scores" not in run or run["press"] == "none":
            continue
        kept = round(1 - run["ratio"], 6)
        config = f"{run['press']}, {kept:g} of the context kept"
        method = found.setdefault(
            (run["press"], kept), Measured(run["press"], config, {}, kind="kvpress", fraction=kept)
        )
        method.runs[run["metric"]] = run | where
    return list(found.values())
