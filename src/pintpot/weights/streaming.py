"""Compressing a model folder in the memory of one parameter (or one block), shard by shard, resumable after a kill.

Everything about the output is known before the first number is written: names, sizes and shards, from shapes or from
what a method examined. A shard is written in order, under a temporary name, and recorded with its checksum when it is
complete; a second run keeps the shards whose checksums still hold and goes on with the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pintpot._version import __version__
from pintpot.core.errors import OutputExists
from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.heap import return_freed_memory
from pintpot.core.model_folder import INDEX, ModelFolder, open_model
from pintpot.core.parameter_map import Origin, map_parameters
from pintpot.weights._base import CompressionReport, Layout, Texts, WeightMethod, describe
from pintpot.weights.companions import companion_bytes, copy_companions
from pintpot.weights.folder_blocks import calibrated_blocks, examine_folder, load_calibrated
from pintpot.weights.formats import Tensors
from pintpot.weights.integrity import write_checksums
from pintpot.weights.load import refuse_compressed
from pintpot.weights.quantizer import PintpotConfig
from pintpot.weights.replace import report_of
from pintpot.weights.shards import Shard, TensorPlan, WrittenShard, file_digest, plan_shards, write_shard
from pintpot.weights.targets import Target, find_targets

SHARD_BYTES = 512 << 20
"""Most bytes in an output shard, unless one parameter alone is larger."""

MAPPED_BYTES = 4 << 20
"""The smallest tensor that has memory of its own while blocks are compressed, given back when it is freed."""

RECORD = "compress.json"
"""Which run the unfinished folder belongs to, and the checksums of the shards that are done."""

Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and the bytes of all."""


@dataclass(frozen=True)
class CompressionPlan:
    """What compressing a folder will write, known before it starts.

    Attributes:
        source: the checked source folder.
        method: how it is compressed.
        layout: the formats of every parameter that is replaced.
        targets: these parameters, by name.
        origins: where each parameter of the model comes from.
        shards: the output files in order.
        report: what is compressed and what stays dense.
    """

    source: ModelFolder
    method: WeightMethod
    layout: Layout
    targets: dict[str, Target]
    origins: tuple[Origin, ...]
    shards: tuple[Shard, ...]
    report: CompressionReport

    @property
    def output_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(plan.nbytes for shard in self.shards for plan in shard.plans)

    @property
    def sources(self) -> tuple[ModelFolder, ...]:
        """Every folder that is read."""
        return (self.source,)

    @property
    def card(self) -> tuple[str, str]:
        """The title and the first sentence of what the output's model card says of it."""
        report = self.report
        made = f"Weights: `{self.method}`, {report.dense_bytes} bytes of matrices in {report.packed_bytes}."
        return "Compressed with Pintpot", made

    def digest(self) -> str:
        """Identifies source files, method and layout, so that only the same run is resumed."""
        files = [file for source in self.sources for file in sorted({e.file for e in source.entries.values()})]
        stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        shards = [s.name for s in self.shards]
        data = [__version__, self.method.name, asdict(self.method), describe(self.layout), stamps, shards]
        return hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest()

    @torch.no_grad()
    def encoded(self, origin: Origin) -> dict[str, Tensor]:
        """The output tensors of one origin, by name."""
        made: dict[str, Tensor] = {}
        dense = origin.load()
        for name in list(dense):
            target = self.targets.get(name)
            tensor = dense.pop(name)
            if target is None:
                made[name] = tensor
            else:
                made |= stored_names(target, target.encode(self.method, self.layout[name], tensor))
        return made


def plan_compression(
    source: str | Path,
    method: WeightMethod,
    *,
    layout: Layout | None = None,
    texts: Texts = (),
    shard_bytes: int = SHARD_BYTES,
) -> CompressionPlan:
    """Check a folder and lay out what compressing it will write; reads only headers unless the method examines.

    Args:
        source: a dense model folder.
        method: how to compress.
        layout: the formats, instead of the method's own.
        texts: what the model reads, where the method examines what its layers are given.
        shard_bytes: most bytes in an output file.

    Raises:
        ModelFolderError: when the folder is damaged, incomplete or unsafe.
        UnsupportedModel: when the model is compressed already, or has layers that cannot be compressed.
        ShapeError: when a format cannot hold a weight of its shape.
    """
    opened = open_model(source, match=False)
    refuse_compressed(opened)
    model = opened.shape().build("meta")
    origins = map_parameters(opened, model)
    found, dense = find_targets(model)
    if layout is None:
        layout = method.layout(
            found, examine_folder(opened, origins, method, found, texts) if method.examines else None
        )
    targets = {target.parameter: target for target in found if target.parameter in layout}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    steps = [(origin, _planned(origin, targets, shapes, layout)) for origin in origins]
    shards = plan_shards(steps, shard_bytes)
    return CompressionPlan(opened, method, layout, targets, origins, shards, report_of(layout, found, dense))


def _planned(
    origin: Origin, targets: dict[str, Target], shapes: dict[str, tuple[int, ...]], layout: Layout
) -> tuple[TensorPlan, ...]:
    plans: list[TensorPlan] = []
    like = torch.empty(0, device="meta")
    for name in origin.names:
        if name not in targets:
            plans.append(TensorPlan(name, shapes[name], origin.entries[0][1].dtype))
            continue
        terms = targets[name].empty(layout[name], like)
        plans += [TensorPlan(key, tuple(t.shape), t.dtype) for key, t in stored_names(targets[name], terms).items()]
    return tuple(plans)


def stored_names(target: Target, terms: tuple[Tensors, ...]) -> dict[str, Tensor]:
    """The tensors of a parameter's terms by their names in the folder."""
    return {f"{target.holder}.term{i}_{key}": t for i, term in enumerate(terms) for key, t in term.items()}


def compress_folder(
    source: str | Path,
    out: str | Path,
    method: WeightMethod,
    *,
    texts: Texts = (),
    layout: Layout | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    check_disk: bool = True,
) -> CompressionReport:
    """Compress a model folder into a new folder, with about one parameter in memory at a time.

    Peak memory is the largest parameter (twice, where the checkpoint stores it in parts) with its packed form and
    16 MiB; with a calibrated method what is outside the blocks, one block with the statistics of its inputs, and the
    hidden states of the texts; such a method also has the C allocator map large tensors by themselves, for the rest of
    the process. Killed, it goes on where it stopped when called again with the same arguments.

    Args:
        source: a dense model folder.
        out: the folder to write; it must not exist. Until the end it is called ``<out>.partial``.
        method: how to compress.
        texts: what the model reads, where the method is calibrated.
        layout: the formats, instead of the method's own.
        shard_bytes: most bytes in an output file.
        progress: told how far it is.
        check_disk: refuse to start when the disk cannot hold the output.

    Raises:
        OutputExists: when the output exists, or an unfinished one of another run stands in its place.
        BudgetError: when the disk is too small.
        ModelFolderError: when the source is damaged, incomplete or unsafe, or holds NaN or Inf.
        UnsupportedModel: when the model is compressed already, or has layers that cannot be compressed.
        CompositionError: when texts are needed and there are none.
    """
    refuse_existing(out)
    method.require_texts(texts)
    plan = plan_compression(source, method, layout=layout, texts=texts, shard_bytes=shard_bytes)
    return write_compressed(plan, out, texts=texts, progress=progress, check_disk=check_disk)


def write_compressed(
    plan: CompressionPlan,
    out: str | Path,
    *,
    texts: Texts = (),
    progress: Progress | None = None,
    check_disk: bool = True,
) -> CompressionReport:
    """Do what was planned; see ``compress_folder``."""
    if plan.method.converts:
        return _write_converted(plan, out, texts)
    if check_disk:
        require_disk(out, plan.output_bytes + companion_bytes(plan.source.path))
    total, done = sum(shard.source_bytes for shard in plan.shards), 0
    with new_folder(out, resume=True) as partial, ExitStack() as stack:
        written = _open_record(partial, plan)
        finished = _finished(partial, plan, written)
        load: Callable[[Origin], dict[str, Tensor]] = plan.encoded
        if plan.method.works_on_blocks and len(finished) < len(plan.shards):
            # Matrices of a block come and go beside what stays; in one heap they would leave holes of their sizes.
            return_freed_memory(MAPPED_BYTES)
            load = stack.enter_context(calibrated_blocks(plan, texts, [partial / name for name in finished]))
        for shard in plan.shards:
            if shard.name not in finished:

                def step(size: int, before: int = done) -> None:
                    if progress is not None:
                        progress(before + size, total)

                written[shard.name] = write_shard(partial / shard.name, shard, load, step)
                _write_record(partial, plan, written)
            done += shard.source_bytes
            if progress is not None:
                progress(done, total)
        _write_companions(partial, plan)
        write_checksums(partial, {name: digest for w in written.values() for name, digest in w.tensors.items()})
        (partial / RECORD).unlink()
    return plan.report


def _finished(partial: Path, plan: CompressionPlan, written: Mapping[str, WrittenShard]) -> list[str]:
    """The output files of an earlier run that are complete and unharmed."""
    files = [(shard.name, partial / shard.name) for shard in plan.shards if shard.name in written]
    return [name for name, file in files if file.is_file() and file_digest(file) == written[name].digest]


def _open_record(partial: Path, plan: CompressionPlan) -> dict[str, WrittenShard]:
    """The checksums of the finished shards of an unfinished run, after checking that it is the same run."""
    file = partial / RECORD
    if not file.is_file():
        if any(partial.iterdir()):
            raise OutputExists(
                f"{partial} exists and is not an unfinished compression",
                hint="remove it, or choose another output path",
            )
        _write_record(partial, plan, {})
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["run"] != plan.digest():
        raise OutputExists(
            f"{partial} is the unfinished compression of another model, or with other settings",
            hint="remove it to start anew, or give the same arguments as before to finish it",
        )
    return {name: WrittenShard(**shard) for name, shard in record["shards"].items()}


def _write_record(partial: Path, plan: CompressionPlan, written: Mapping[str, WrittenShard]) -> None:
    shards = {name: asdict(shard) for name, shard in written.items()}
    write_atomic(partial / RECORD, json.dumps({"run": plan.digest(), "shards": shards}, indent=1))


def _write_companions(partial: Path, plan: CompressionPlan) -> None:
    """Everything beside the weights: index, configuration, tokenizer, model card."""
    if len(plan.shards) > 1:
        places = {p.name: shard.name for shard in plan.shards for p in shard.plans}
        index = {"metadata": {"total_size": plan.output_bytes}, "weight_map": dict(sorted(places.items()))}
        write_atomic(partial / INDEX, json.dumps(index, indent=1))
    source = plan.source.path
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # Written out, because transformers would otherwise take the dtype of whichever tensor comes first.
    config["dtype"] = str(plan.source.dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config["quantization_config"] = PintpotConfig.of(plan.method, plan.source.dtype, plan.layout).to_dict()
    write_atomic(partial / "config.json", json.dumps(config, indent=2) + "\n")
    _copy_companions(partial, plan)


def _copy_companions(partial: Path, plan: CompressionPlan) -> None:
    copy_companions(plan.source.path, partial, *plan.card)


def _write_converted(plan: CompressionPlan, out: str | Path, texts: Texts) -> CompressionReport:
    """With the packed model in memory: converted blocks hold more than the plan names."""
    model = load_calibrated(plan.source, plan.method, texts)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        _copy_companions(partial, plan)
    return plan.report
