"""Which caches are measured: every technique of the registry, some compositions, and transformers' own.

Every keep is measured in shares of the dense cache's bytes, every store and every sharing of layers at each of its
options, and every keep also with packed survivors. The rule for a keep's windows, whose defaults suit contexts far
longer than the benchmark's: all of its ``*_tokens`` are halved until the least that the keep can hold takes half of the
bytes at most, or, where that cannot be, all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, QuantizedCache

from pintpot.cache import Keep, Store, build_cache, cache_bytes
from pintpot.cache._base import CacheTechnique, LayerSharing
from pintpot.cache.calibration import Calibrated, calibrate
from pintpot.cache.residue import Residue
from pintpot.core.errors import PintpotError
from pintpot.core.expression import expression, parse
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate

FRACTIONS = (0.5, 0.25, 0.125, 0.05)
"""Shares of the dense cache's bytes that keeps are given."""

PACKED = "kivi(bits=4, residual_length=32)"
"""How the survivors of every keep are packed once more."""

PACKED_FRACTIONS = (0.125, 0.05)

LEVERAGE = "compactor(attention_weight=0.0, chunk_tokens=16)"
"""Leverage alone."""

COMPOSED: tuple[tuple[str, float | None], ...] = (
    ("kivi(bits=4, residual_length=32)", None),
    ("kivi(residual_length=32)", None),
    ("kivi(bits=4, residual_length=0)", None),
    ("lagkv*kivi(residual_length=32)", 0.125),
    *(("h2o*less(epochs=4)", fraction) for fraction in FRACTIONS),
    (LEVERAGE, 0.25),
    (LEVERAGE, 0.125),
    (f"{LEVERAGE}*kivi(bits=4, residual_length=0)", 0.125),
    (f"{LEVERAGE}*fp8", 0.125),
    (f"{LEVERAGE}*fp8", 0.05),
    (f"{LEVERAGE}*rotatekv(bits=4, group_size=32, sink_tokens=0)", 0.125),
    (f"{LEVERAGE}*rotatekv(bits=4, group_size=32, sink_tokens=0)", 0.05),
    (f"{LEVERAGE}*rotatekv(bits=3, group_size=32, sink_tokens=0)", 0.05),
)
"""Expressions, and their share of the dense cache's bytes; None for what they take."""

Part = TypeVar("Part", bound=CacheTechnique)

HALVINGS = 8
BASELINE = "DynamicCache"
CALIBRATIONS = Path(__file__).parent.parent / "out" / "cache_calibrations"


@dataclass(frozen=True)
class Subject:
    """A model that caches are made for.

    Attributes:
        model: in evaluation mode.
        name: tells it from others of the same configuration.
        texts: token ids (N, T) for methods that are calibrated.
    """

    model: PreTrainedModel
    name: str
    texts: Tensor


@dataclass(frozen=True)
class Job:
    """Tokens that are read into a cache, tokens that are asked of it afterwards, sequences at once."""

    context: int
    asked: int
    batch: int


@dataclass(frozen=True)
class Method:
    """One way to cache.

    Attributes:
        technique: as it is listed.
        config: how it was set.
        make: an empty cache.
        ours: whether it needs our attention.
        fraction: its share of the dense cache's bytes, where it was given one.
        peer: the configuration that its speed is compared with.
    """

    technique: str
    config: str
    make: Callable[[Subject, Job], Cache]
    ours: bool = True
    fraction: float | None = None
    peer: str = ""


def dense_bytes(config: PretrainedConfig, tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes of a dense cache without spare room."""
    return cache_bytes(config, tokens, batch=batch, dtype=dtype, reserve_tokens=tokens)


def budget_bytes(config: PretrainedConfig, job: Job, fraction: float, dtype: torch.dtype) -> int:
    """A share of the context's dense bytes, and room for what is asked: what a cache compressed once comes to."""
    kept = dense_bytes(config, int(fraction * job.context), job.batch, dtype)
    return kept + dense_bytes(config, job.asked, job.batch, dtype)


def _settings(parts: Sequence[CacheTechnique]) -> str:
    """The expression, without what the bytes decide."""
    shown = []
    for part in parts:
        default = {f.name: f.default for f in fields(part)}
        hidden = {name: default[name] for name in ("kept_fraction", "calibration") if name in default}
        shown.append(replace(part, **hidden) if isinstance(part, Keep) or "calibration" in hidden else part)
    return expression(shown)


def ours(parts: Sequence[CacheTechnique], fraction: float | None = None) -> Method:
    """A composition; with a fraction, as much as fits that share of the dense cache's bytes."""

    def make(subject: Subject, job: Job) -> Cache:
        used = [calibrated(subject, p) for p in parts]
        model = subject.model
        given = None if fraction is None else budget_bytes(model.config, job, fraction, model.dtype)
        return build_cache(
            model.config,
            keep=_first(used, Keep),
            store=_first(used, Store),
            layers=_first(used, LayerSharing),
            residue=_first(used, Residue),
            budget_bytes=given,
            batch=job.batch,
            tokens=job.context + job.asked,
            dtype=model.dtype,
        )

    bits = getattr(parts[0], "bits", None) if len(parts) == 1 else None
    share = "" if fraction is None else f" in {fraction:.4g} of the dense bytes"
    return Method(
        "*".join(p.name for p in parts),
        _settings(parts) + share,
        make,
        fraction=fraction,
        peer=f"QuantizedCache quanto{bits}" if bits in (2, 4) else "",
    )


def _first(parts: Sequence[CacheTechnique], kind: type[Part]) -> Part | None:
    return next((part for part in parts if isinstance(part, kind)), None)


def calibrated(subject: Subject, part: CacheTechnique) -> CacheTechnique:
    """The technique with its calibration for this model, made once."""
    if not isinstance(part, Calibrated) or part.calibration:
        return part
    found = hashlib.sha256(f"{part} {subject.name}".encode() + subject.texts.numpy().tobytes())
    file = CALIBRATIONS / f"{part.name}-{found.hexdigest()[:12]}.safetensors"
    if not file.is_file():
        CALIBRATIONS.mkdir(parents=True, exist_ok=True)
        calibrate(subject.model, part, list(subject.texts.split(8))).write(file)
    return replace(part, calibration=str(file))


def windows_for(
    keep: Keep, store: Store | None, config: PretrainedConfig, job: Job, fraction: float, dtype: torch.dtype
) -> Keep | None:
    """The keep with its windows halved as often as the rule says; None where it cannot hold so little."""
    budget = budget_bytes(config, job, fraction, dtype)
    asked = dense_bytes(config, job.asked, job.batch, dtype)
    tokens = job.context + job.asked
    candidates = list(_halved(keep))
    for share in (0.5, 1.0):
        for candidate in candidates:
            *_, smallest = candidate.shrink()
            least = cache_bytes(
                config, tokens, keep=smallest, store=store, batch=job.batch, dtype=dtype, reserve_tokens=tokens
            )
            if least <= asked + share * (budget - asked):
                return candidate
    return None


def _fitted(
    parts: Sequence[CacheTechnique], config: PretrainedConfig, job: Job, fraction: float, dtype: torch.dtype
) -> list[CacheTechnique] | None:
    """The parts with the keep's windows halved; None where there is no keep, or it cannot hold so little."""
    keep, store = _first(parts, Keep), _first(parts, Store)
    fitted = None if keep is None else windows_for(keep, store, config, job, fraction, dtype)
    return None if fitted is None else [fitted, *(part for part in parts if part is not keep)]


def _halved(keep: Keep) -> Iterator[Keep]:
    """The keep, told to keep everything, with windows as they are, halved, halved again."""
    names = {f.name for f in fields(keep)}
    if "kept_fraction" in names:
        keep = replace(keep, kept_fraction=1.0)
    windows = {n: getattr(keep, n) for n in names if n.endswith("_tokens") and type(getattr(keep, n)) is int}
    seen = []
    for halvings in range(HALVINGS):
        try:
            candidate = replace(keep, **{n: max(min(w, 1), w >> halvings) for n, w in windows.items()})
        except PintpotError:
            return
        if candidate not in seen:
            seen.append(candidate)
            yield candidate


def theirs(backend: str, bits: int) -> Method:
    """The quantised cache of transformers with its defaults; hqq along the axis that it can pack."""
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    name = f"{backend}{bits}"
    return Method(
        name,
        f"QuantizedCache {name}",
        lambda subject, job: QuantizedCache(backend, subject.model.config, nbits=bits, **axes),
        ours=False,
    )


DENSE = Method(
    BASELINE, BASELINE, lambda subject, job: DynamicCache(config=subject.model.config), ours=False, fraction=1.0
)
PEERS = [theirs("quanto", 4), theirs("quanto", 2), theirs("hqq", 4), theirs("hqq", 2)]


def methods(config: PretrainedConfig, job: Job, dtype: torch.dtype = torch.float32) -> list[Method]:
    """The baseline, transformers' own, and ours, for a context of this size."""
    kinds = techniques("cache").values()
    keeps = [kind() for kind in kinds if kind.facts.part == "keep"]
    shape = ModelShape.from_config(config, dtype)
    workload = Generate(batch=job.batch, prompt_tokens=job.context, new_tokens=max(1, job.asked))
    alone = [kind for kind in kinds if kind.facts.part in ("store", "layers")]
    found = [ours([option]) for kind in alone for option in kind.options(shape, workload)]
    packed = parse(PACKED)
    wanted = [((keep,), fraction) for keep in keeps for fraction in FRACTIONS]
    wanted += [((keep, *packed), fraction) for keep in keeps for fraction in PACKED_FRACTIONS]
    wanted += [(parse(text), fraction) for text, fraction in COMPOSED]
    for parts, fraction in wanted:
        fitted = parts if fraction is None else _fitted(parts, config, job, fraction, dtype)
        if fitted is not None:
            found.append(ours(fitted, fraction))
        else:
            print(f"left out: {expression(parts)} cannot hold so little as {fraction:.4g} of the dense bytes")
    named = {method.technique for method in found}
    # What fits no share at all is measured as its paper has it.
    found += [ours([keep]) for keep in keeps if keep.name not in named]
    unique = {method.config: method for method in found}
    return [DENSE, *PEERS, *unique.values()]


def chosen(found: Sequence[Method], names: str) -> list[Method]:
    """Those of the named techniques (comma-separated; all when empty), and the baseline."""
    if not names:
        return list(found)
    wanted = set(names.split(","))
    return [m for m in found if m is DENSE or m.technique in wanted or wanted & set(m.technique.split("*"))]
