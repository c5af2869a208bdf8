"""Which weight methods are measured, in which configurations, and how one of them is measured on one subject.

Every registered method that has options for the model is measured at each of them; where it has bits, also at each of
``WIDTHS`` with its own groups and with groups of ``GROUP``; and as ``EXPLICIT`` says.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from benchmarks.weights_subjects import Subject
from transformers import AutoModelForCausalLM, PreTrainedModel

from pintpot.core.errors import CompositionError, PintpotError
from pintpot.core.expression import parse
from pintpot.core.heap import return_freed_memory
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.workload import Generate
from pintpot.jobs.compress import compress
from pintpot.jobs.text import TextSettings
from pintpot.ledger.process import ProcessMemory
from pintpot.weights import WeightMethod
from pintpot.weights.by_training import ByTraining

WIDTHS = (8, 4, 3, 2, 1)
GROUP = 64
BASE = "rtn"
"""What every method is compared with, beside the peers."""

EXPLICIT = (
    *(f"rtn(bits={bits}, group_size={size})" for bits in range(8, 1, -1) for size in (128, 64, 32)),
    "rtn(bits=8, group_size=-1)",
    "rtn(bits=4, group_size=-1)",
    "rtn(bits=4, group_size=32, symmetric=True)",
    *(f"{name}(bits={bits}, group_size={size})" for name in ("gptq", "awq") for bits in (4, 3, 2) for size in (32, 16)),
    "gptq(bits=4, group_size=64, activation_order=False, static_groups=False)",
    "gptq(bits=3, group_size=64, activation_order=False, static_groups=False)",
    "awq(bits=4, group_size=64, clip=False)",
    "awq(bits=3, group_size=64, clip=False)",
    *(f"rtn(bits={bits}, group_size=16)" for bits in (4, 3, 2)),
    *(f"adadim(bits={bits}, group_size=16, base={base})" for bits in (4, 3, 2) for base in ("gptq", "rtn")),
    *(f"gptq(bits={bits}, group_size={size}, clip=True)" for bits in (4, 3, 2) for size in (128, 64, 48, 32, 16)),
    *(f"adadim(bits={bits}, group_size={size}, clip=True)" for bits in (4, 3, 2) for size in (64, 48, 32, 16)),
)
"""Further configurations: what is compared with its like among the peers, and what shows a part of a method.

AdaDim has a choice only where both sides are whole groups: in the embedded model, of 16; in the encoder, of 48 too.
"""

Method = WeightMethod | ByTraining[Any]

USE = Generate(batch=1, prompt_tokens=512, new_tokens=64)
"""What options are asked for."""

TRAINING = TextSettings(tokens=256, batch=8, steps=300)
"""How methods that train are trained: on the training part of the reference corpus, as by ``pintpot compress``."""


def configurations(shape: ModelShape, names: str = "") -> list[Method]:
    """Every configuration of the registered methods, those of ``BASE`` first, then by name; each once.

    Args:
        shape: of the model.
        names: only these methods, comma-separated, and ``BASE``.
    """
    wanted = {*names.split(","), BASE} if names else set()
    every = {name: kind for name, kind in techniques("weights").items() if issubclass(kind, WeightMethod | ByTraining)}
    kinds = {name: kind for name, kind in every.items() if name in (wanted or every)}
    explicit: dict[str, list[Method]] = {name: [] for name in kinds}
    for text in EXPLICIT:
        method = parse(text)[0]
        if isinstance(method, WeightMethod) and method.name in explicit:
            explicit[method.name].append(method)
    found: dict[str, Method] = {}
    for name in sorted(kinds, key=lambda name: (name != BASE, name)):
        options = [
            option for option in kinds[name].options(shape, USE) if isinstance(option, WeightMethod | ByTraining)
        ]
        for method in (*options, *_widths(kinds[name]), *explicit[name]) if options else ():
            found.setdefault(str(method), method)
    return list(found.values())


def _widths(kind: type[Technique]) -> Iterator[WeightMethod]:
    """The method at each width that it is defined at."""
    known = {field.name for field in fields(kind)}
    groups: Iterable[dict[str, int]] = ({}, {"group_size": GROUP}) if "group_size" in known else ({},)
    for bits in WIDTHS if "bits" in known else ():
        for group in groups:
            # A width that a method does not have is refused when it is made, or by its formats.
            with contextlib.suppress(PintpotError):
                method = kind.build({"bits": bits, **group})
                if isinstance(method, WeightMethod):
                    method.terms("layer.weight", 128, 128, torch.float32)
                    yield method


def measure(subject: Subject, method: Method, training: TextSettings = TRAINING) -> dict[str, Any]:
    """Compress a copy of the subject's model and judge it.

    Args:
        subject: whose model it is.
        method: how.
        training: of methods that are trained.

    Returns:
        ``parts`` of each metric, ``matrix_bytes``, ``folder_bytes``, ``seconds`` and ``peak_bytes`` of compressing
        (resident, above the dense model and its copy that is compressed), and ``judge_seconds``.

    Raises:
        PintpotError: when the method cannot compress this model.
    """
    tidy()
    with contextlib.ExitStack() as stack:
        if isinstance(method, ByTraining):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            model = copy.deepcopy(subject.model)
        begin = time.perf_counter()
        with ProcessMemory() as memory:
            if isinstance(method, ByTraining):
                model = _trained(subject, method, folder, training)
            else:
                method.quantize_model_(model, subject.texts)
        seconds = time.perf_counter() - begin
    return judged(subject, model) | {"seconds": round(seconds, 3), "peak_bytes": memory.growth_bytes or 0}


def described(method: Method, training: TextSettings = TRAINING) -> str:
    """The configuration in words: the method, and how long it is trained where it is."""
    if not isinstance(method, ByTraining):
        return str(method)
    return f"{method}, trained {training.steps} steps of {training.batch} x {training.tokens} tokens"


def _trained(subject: Subject, method: ByTraining[Any], folder: Path, training: TextSettings) -> PreTrainedModel:
    if subject.part != "language":
        raise CompositionError(
            f"{method.name} is trained on the loss of a language model, which {subject.about['model']} is not",
            hint="measure it on the language model",
        )
    compress(subject.folder, folder / "packed", techniques=[method], training=training)
    return AutoModelForCausalLM.from_pretrained(folder / "packed")


def judged(subject: Subject, model: PreTrainedModel) -> dict[str, Any]:
    """What a compressed model gets, and its bytes."""
    begin = time.perf_counter()
    parts = subject.judge(model)
    matrices, folder = subject.sizes(model)
    return {
        "parts": {name: [round(part, 7) for part in found] for name, found in parts.items()},
        "matrix_bytes": matrices,
        "folder_bytes": folder,
        "judge_seconds": round(time.perf_counter() - begin, 2),
    }


def tidy() -> None:
    """Give what the last run freed back to the system, so that this run's peak is its own."""
    return_freed_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
