"""The compress job: a model folder in, a smaller model folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pintpot.core import registry
from pintpot.core.errors import BudgetError, CompositionError, PlanError
from pintpot.core.expression import parse
from pintpot.core.files import refuse_existing
from pintpot.core.model_folder import open_model
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check
from pintpot.core.technique import Technique
from pintpot.core.units import format_bytes, parse_bytes
from pintpot.core.workload import Compress
from pintpot.jobs.calibration_texts import CalibrationSettings, calibration_texts
from pintpot.jobs.load import no_progress_bars
from pintpot.jobs.text import TextSettings
from pintpot.jobs.train_packed import TrainedPart, compress_by_training
from pintpot.weights import CompressionReport, WeightMethod
from pintpot.weights._base import Layout
from pintpot.weights.allocation import Sized
from pintpot.weights.by_training import ByTraining
from pintpot.weights.forecast import layout_of, packed_change
from pintpot.weights.storage import StorageMethod
from pintpot.weights.streaming import plan_compression, write_compressed
from pintpot.weights.trained import TrainedMethod

JOB = "compress"

Method = WeightMethod | StorageMethod | ByTraining[Any]
"""What a model can be compressed by."""


@dataclass(frozen=True)
class Compressed:
    """What a compress job did.

    Attributes:
        folder: the folder that was written.
        method: how.
        report: which parameters were compressed, and which matrices stayed dense.
        source_bytes: bytes of all tensors of the source.
        output_bytes: bytes of all tensors of the output.
        seconds: of this run (the last one, if it was resumed).
        training: of a method that is trained.
    """

    folder: Path
    method: Method
    report: CompressionReport
    source_bytes: int
    output_bytes: int
    seconds: float
    training: TrainedPart | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "folder": str(self.folder),
            "technique": str(self.method),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "compressed_parameters": len(self.report.compressed),
            "matrices_before_bytes": self.report.dense_bytes,
            "matrices_after_bytes": self.report.packed_bytes,
            "left_dense": dict(self.report.left_dense),
            **({} if self.training is None else self.training.to_dict()),
            "seconds": round(self.seconds, 3),
        }


def compress(
    model: str | Path,
    out: str | Path,
    *,
    techniques: str | Sequence[Technique] | None = None,
    plan: Plan | None = None,
    size: str | int | None = None,
    calibration: CalibrationSettings | None = None,
    training: TextSettings | None = None,
    seed: int = 0,
    progress: bool = False,
    check_disk: bool = True,
) -> Compressed:
    """Compress a model folder into a new folder; run again to resume.

    Takes about the memory of one parameter, or of one block where the method looks at activations; a method that is
    trained takes what training takes.

    Args:
        model: a dense model folder.
        out: the folder to write; it must not exist.
        techniques: an expression such as ``"gptq(bits=4)"``, or techniques; exactly one weights method. One that
            stores without loss takes a packed folder too. May be left
            out where a size is given: then the method with the least risk at that size is taken.
        plan: a plan to take the techniques from, instead of ``techniques``.
        size: most bytes of the output's tensors, such as ``"900MiB"``; formats are allocated to the parameters so that
            the output comes near to it.
        calibration: texts for methods that look at activations; those that come with Python by default.
        training: how to train, for methods that are trained; the texts are those of ``calibration``.
        seed: of the choice of texts.
        progress: show a progress bar on stderr.
        check_disk: refuse to start when the disk cannot hold the output.

    Raises:
        CompositionError: when the techniques are not exactly one weights method.
        BudgetError: when nothing is as small as the size.
        PlanError: when the plan was written for another model.
        PintpotError: as ``pintpot.weights.compress_folder`` does.
    """
    refuse_existing(out)
    folder = Path(model)
    limit = None if size is None else parse_bytes(size)
    shape = open_model(folder, match=False).shape()
    method = _method(techniques, plan) if limit is None or techniques or plan else smallest_risk(shape, limit)
    if plan is not None and plan.model.fingerprint != shape.fingerprint:
        raise PlanError(
            f"the plan is for {plan.model.name}, and {model} has another architecture",
            hint="make a plan for this model",
        )
    start = time.monotonic()
    if isinstance(method, StorageMethod):
        if limit is not None:
            raise CompositionError(f"{method.name} stores without loss, in no given size", hint="leave out --size")
        with progress_bar(progress, f"storing {folder.name}") as step:
            report = method.store_folder(folder, out, progress=step, check_disk=check_disk)
        return Compressed(Path(out), method, report, report.dense_bytes, report.packed_bytes, time.monotonic() - start)
    if isinstance(method, ByTraining):
        if limit is not None:
            raise CompositionError(f"{method.name} has one size for a model", hint="leave out --size")
        settings, data = training or TextSettings(), (calibration or CalibrationSettings()).data
        done = compress_by_training(folder, out, method, data, settings, seed=seed, progress=progress)
        return Compressed(Path(out), method, *done.sizes, time.monotonic() - start, done)
    texts = calibration_texts(folder, method, calibration, seed)
    with progress_bar(progress, f"compressing {folder.name}") as step, no_progress_bars():
        layout = None if limit is None else sized_layout(folder, method, limit, texts)
        work = plan_compression(folder, method, layout=layout, texts=texts)
        report = write_compressed(work, out, texts=texts, progress=step, check_disk=check_disk)
    return Compressed(Path(out), method, report, work.source.weight_bytes, work.output_bytes, time.monotonic() - start)


def smallest_risk(shape: ModelShape, size: int) -> WeightMethod:
    """The configuration with the least risk whose packed model has at most so many bytes.

    Raises:
        BudgetError: when there is none, with the smallest that there is.
    """
    fitting: list[tuple[float, WeightMethod]] = []
    least = shape.weight_bytes
    for kind in registry.techniques("weights").values():
        if JOB not in kind.facts.jobs or not issubclass(kind, WeightMethod) or issubclass(kind, TrainedMethod):
            continue
        for option in _configurations(kind, shape):
            packed = shape.weight_bytes + packed_change(shape, layout_of(shape, option))
            least = min(least, packed)
            if packed <= size:
                fitting.append((option.risk(shape, Compress()), option))
    if not fitting:
        raise BudgetError(
            f"no method makes {shape.name or 'the model'} as small as {format_bytes(size)}",
            hint=f"allow at least {format_bytes(least)}; what is outside the blocks stays as it is",
        )
    return min(fitting, key=lambda pair: pair[0])[1]


def sized_layout(folder: Path, method: WeightMethod, size: int, texts: Sequence[Tensor] = ()) -> Layout:
    """Formats for every parameter, from the configurations of a method, so that the output has at most ``size`` bytes.

    Raises:
        CompositionError: when the method lays out by itself.
        BudgetError: when the smallest configuration is larger.
    """
    if method.examines:
        raise CompositionError(f"{method.name} decides by itself who gets which bits", hint="leave out --size")
    plain = plan_compression(folder, method)
    candidates = _candidates(method, plain.source.shape())
    outside = plain.output_bytes - plain.report.packed_bytes
    sized = Sized(candidates=candidates, budget_bytes=size - outside)
    return plan_compression(folder, sized, texts=texts).layout


def _candidates(method: WeightMethod, shape: ModelShape) -> tuple[WeightMethod, ...]:
    """The method's configurations in every width, with the other settings as they were given; itself at first."""
    given = {name: value for name, value in method.parameters().items() if name not in ("bits", "group_size")}
    every = [replace(option, **given) for option in _configurations(type(method), shape)]
    return tuple(dict.fromkeys((method, *every)))


def _configurations(kind: type[Technique], shape: ModelShape) -> Iterable[WeightMethod]:
    return (option for option in kind.options(shape, Compress()) if isinstance(option, WeightMethod))


def _method(techniques: str | Sequence[Technique] | None, plan: Plan | None) -> Method:
    if techniques is not None and plan is not None:
        raise CompositionError("both techniques and a plan were given", hint="give one of them")
    if plan is not None:
        chosen: Sequence[Technique] = plan.techniques
    elif isinstance(techniques, str):
        chosen = parse(techniques)
    else:
        chosen = techniques or ()
    check(chosen, JOB)
    methods = [technique for technique in chosen if isinstance(technique, WeightMethod | StorageMethod | ByTraining)]
    if len(methods) != 1 or len(chosen) != 1:
        names = ", ".join(t.name for t in chosen) or "none"
        raise CompositionError(
            f"compressing takes exactly one weights technique, and there are: {names}",
            hint="for instance gptq(bits=4), or give a --size",
        )
    return methods[0]


@contextmanager
def progress_bar(show: bool, title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr with throughput and time left, or nothing."""
    if not show:
        yield None
        return
    # Imported here so that the job without a bar needs no terminal library.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
