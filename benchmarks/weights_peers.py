"""Public packages that compress weights, on the subjects of this benchmark.

Each gives the numbers that its compressed matrices stand for, and the bytes in which it holds them; they are judged in
the same float32 forward pass as ours. Packages of this environment quantise a float16 copy, so that their scales have
16 bits as ours do. torchao is run from ``out/peers`` (``pip install --no-deps --target out/peers torchao``) in a
process of its own, and llm-compressor in an environment of its own, which is made when it is needed; both by
``weights_outside``. What is not installed is left out and said so.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks import weights_ggml
from benchmarks.weights_methods import judged, tidy
from benchmarks.weights_subjects import Subject, dense_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.ledger.process import ProcessMemory

OUT = Path(__file__).parent.parent / "out"
SCRIPT = Path(__file__).with_name("weights_outside.py")
COMPRESSOR = "llmcompressor==0.14.0.1"

COMPRESSOR_SETTINGS = {
    "gptq": (("language", "embeddings"), ((8, 64), (4, 128), (4, 64), (4, 32), (3, 64), (3, 32), (2, 64), (2, 32))),
    "awq": (("language",), ((4, 64), (4, 32), (3, 64), (3, 32), (2, 32))),
}
"""Of each method of llm-compressor: the subjects, and bits with group sizes."""

LINEAR = ("language", "embeddings", "vit", "mamba")
"""Subjects all of whose matrices are of linear layers."""

VISION = ("vit", "mobilevit")
"""Subjects whose methods round what layers are given too."""

NOT_MEASURED = {
    "GPTQModel 7.7": "needs torch 2.14.1, newer than this project's; llm-compressor stands for GPTQ",
    "AutoAWQ": "no longer maintained, last tested with torch 2.6; llm-compressor took it over",
    "llm-compressor AWQ on the encoder": "folds scales into the norm before a layer, and the encoder's norms also feed "
    "its residuals",
    "optimum-quanto with inputs of the Mamba": "fails, as mixers multiply by their matrices themselves",
    "torchao int4": "its packed 4-bit formats need a GPU; the one for CPUs holds 4 bits in 8",
    "llama.cpp whole models": "the sides of both models are no multiples of 256: its quantiser is called on matrices",
}
"""Peers that are not there, and why."""


@dataclass(frozen=True)
class Peer:
    """A package in one configuration.

    Attributes:
        name: of the package and its method, the name of its curve.
        config: how it is set.
        run: gives the numbers of all changed parameters, or the changed model, and ``matrix_bytes``, ``seconds`` and
            ``peak_bytes``.
        missing: why it cannot be run here; empty where it can.
        parts: the subjects that it is for.
    """

    name: str
    config: str
    run: Callable[[Subject], tuple[dict[str, Tensor] | PreTrainedModel, dict[str, Any]]] = field(compare=False)
    missing: str = ""
    parts: tuple[str, ...] = ("language", "embeddings")


def peers() -> list[Peer]:
    """All of them."""
    return [*_quanto(), *_quanto_inputs(), *_hqq(), *_ggml(), *_torchao(), *_compressor()]


def measure_peer(subject: Subject, peer: Peer) -> dict[str, Any]:
    """As ``weights_methods.measure``, for a peer."""
    tidy()
    made, figures = peer.run(subject)
    model = made if isinstance(made, PreTrainedModel) else copy.deepcopy(subject.model)
    unknown = [] if isinstance(made, PreTrainedModel) else model.load_state_dict(made, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"{peer.config} gave parameters that the model does not have: {unknown[:3]}")
    found = judged(subject, model)
    rest = found["folder_bytes"] - found["matrix_bytes"]
    return {**found, **figures, "folder_bytes": rest + figures["matrix_bytes"]}


def _here(
    subject: Subject, quantize: Callable[[str, nn.Linear], tuple[Tensor, int]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Each matrix by itself, in this process.

    Args:
        subject: whose matrices they are.
        quantize: from a parameter's name and a float16 layer, the numbers that it comes to and its bytes.
    """
    state, size, seconds = {}, 0, 0.0
    with ProcessMemory() as memory:
        for target in subject.targets:
            layer = copy.deepcopy(subject.model.get_submodule(target.module))
            assert isinstance(layer, nn.Linear)
            begin = time.perf_counter()
            weight, own = quantize(target.parameter, layer.half())
            seconds += time.perf_counter() - begin
            state[target.parameter], size = weight.detach().float(), size + own
    peak = memory.growth_bytes or 0
    return state, {"matrix_bytes": size, "seconds": round(seconds, 3), "peak_bytes": peak}


def _quanto() -> Iterator[Peer]:
    for bits in (8, 4, 2):

        def quantize(name: str, layer: nn.Linear, bits: int = bits) -> tuple[Tensor, int]:
            from optimum.quanto import QLinear, freeze, qint2, qint4, qint8

            kind = {8: qint8, 4: qint4, 2: qint2}[bits]
            packed = QLinear.from_module(layer, weights=kind)
            freeze(packed)
            return packed.weight.dequantize(), _held(packed.weight.data)

        config = f"optimum-quanto, {bits} bits, default groups"
        run = functools.partial(_here, quantize=quantize)
        yield Peer("optimum-quanto", config, run, _lacks("optimum.quanto"), LINEAR)


def _quanto_inputs() -> Iterator[Peer]:
    for bits in (8, 4):

        def run(subject: Subject, bits: int = bits) -> tuple[PreTrainedModel, dict[str, Any]]:
            from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

            model, modules = copy.deepcopy(subject.model), [target.module for target in subject.targets]
            begin = time.perf_counter()
            with ProcessMemory() as memory:
                quantize(model, weights={8: qint8, 4: qint4}[bits], activations=qint8, include=modules)
                with Calibration(), torch.no_grad():
                    for text in subject.texts:
                        model(text) if isinstance(text, Tensor) else model(**text)
                freeze(model)
            size = sum(_held(model.get_submodule(module).weight.data) for module in modules)
            seconds = round(time.perf_counter() - begin, 3)
            return model, {"matrix_bytes": size, "seconds": seconds, "peak_bytes": memory.growth_bytes or 0}

        config = f"optimum-quanto, {bits} bits, and inputs of 8"
        yield Peer("optimum-quanto with inputs", config, run, _lacks("optimum.quanto"), VISION)


def _held(tensor: Tensor) -> int:
    """Bytes that a tensor of a package's own kind holds."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(_held(getattr(tensor, name)) for name in names) if names else tensor.nbytes


def _hqq() -> Iterator[Peer]:
    for bits, group in ((8, 64), (4, 64), (4, 32), (3, 64), (3, 32), (2, 64), (2, 16), (1, 64), (1, 16)):

        def quantize(name: str, layer: nn.Linear, bits: int = bits, group: int = group) -> tuple[Tensor, int]:
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

            config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
            packed = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
            tensors = [packed.W_q, *(t for t in packed.meta.values() if isinstance(t, Tensor))]
            return packed.dequantize(), sum(t.nbytes for t in tensors)

        config = f"hqq, {bits} bits, groups of {group}"
        yield Peer("hqq", config, functools.partial(_here, quantize=quantize), _lacks("hqq"), LINEAR)


def _ggml() -> Iterator[Peer]:
    missing = "" if weights_ggml.library() is not None else "no build of llama.cpp under out/"
    for kind in weights_ggml.TYPES:
        for weighted in (False, True):

            def run(subject: Subject, kind: str = kind, weighted: bool = weighted) -> Any:
                seen = dense_inputs(subject) if weighted else {}
                importance = {name: inputs.hessian.diagonal() for name, inputs in seen.items()}
                return _here(
                    subject,
                    lambda name, layer: weights_ggml.round_trip(layer.weight.float(), kind, importance.get(name)),
                )

            name = f"llama.cpp{' with importance' if weighted else ''}"
            yield Peer(name, f"llama.cpp {kind}{', importance of inputs' if weighted else ''}", run, missing)


def _torchao() -> Iterator[Peer]:
    missing = "" if (OUT / "peers" / "torchao").is_dir() else "no torchao in out/peers"
    for bits, config in ((8, "int8, whole rows"), (4, "int4 groups of 32, held in int8"), (2, "int2, held in int8")):
        job = {"tool": "torchao", "settings": {"bits": bits, "group_size": 32}, "path": [str(OUT / "peers")]}
        run = functools.partial(_outside, python=Path(sys.executable), job=job)
        yield Peer("torchao", f"torchao {config}", run, missing)


def _compressor() -> Iterator[Peer]:
    python = OUT / "llmcompressor" / "bin" / "python"
    missing = "" if (OUT / "llmcompressor" / "installed").is_file() else f"{COMPRESSOR} could not be installed"
    for method, (parts, wanted) in COMPRESSOR_SETTINGS.items():
        for bits, group in wanted:
            settings = {"method": method, "bits": bits, "group_size": group}
            job = {"tool": "llm-compressor", "settings": settings, "path": []}
            name = f"llm-compressor {method.upper()}"
            config = f"{name}, {bits} bits, groups of {group}, or the half that divides the inputs"
            yield Peer(name, config, functools.partial(_outside, python=python, job=job), missing, parts)


def prepare() -> None:
    """Make llm-compressor's environment, with the torch that is used here."""
    folder = OUT / "llmcompressor"
    if (folder / "installed").is_file():
        return
    print(f"making {folder}, an environment for {COMPRESSOR}", flush=True)
    packages = (f"torch=={version('torch')}", COMPRESSOR)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{COMPRESSOR} could not be installed: {error}", flush=True)
    else:
        (folder / "installed").touch()


def _outside(subject: Subject, python: Path, job: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A job of ``weights_outside`` in another process.

    Raises:
        CalledProcessError: when it failed; its last words are shown.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({"input_ids": torch.cat(subject.texts)}, folder / "texts.safetensors")
        files = {"texts": str(folder / "texts.safetensors"), "out": str(folder / "out.safetensors")}
        modules = [target.module for target in subject.targets]
        whole = {**job, **files, "folder": str(subject.folder), "modules": modules}
        (folder / "job.json").write_text(json.dumps(whole), encoding="utf-8")
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        # Without -P the benchmarks beside the script would hide packages of the same names.
        command = [str(python), "-P", str(SCRIPT), str(folder / "job.json")]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **quiet, **threads}
        )
        if done.returncode:
            print(done.stderr[-2000:], flush=True)
            done.check_returncode()
        figures = json.loads((folder / "out.safetensors.json").read_text(encoding="utf-8"))
        return load_file(folder / "out.safetensors"), figures


def _lacks(package: str) -> str:
    try:
        there = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        there = False
    return "" if there else f"{package} is not installed"
