"""Writing an exported folder: tensors in shards, configuration, companions and checksums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pintpot.core.files import new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.model_folder import INDEX
from pintpot.core.parameter_map import Origin
from pintpot.weights.companions import companion_bytes, companions
from pintpot.weights.export._base import PackedFolder
from pintpot.weights.integrity import write_checksums
from pintpot.weights.shards import TensorPlan, plan_shards, write_shard
from pintpot.weights.streaming import SHARD_BYTES, Progress

Step = tuple[Origin, tuple[TensorPlan, ...]]
"""What is read together, and the tensors that are made of it."""


def origin_of(packed: PackedFolder, parameter: str) -> Origin:
    """Where a packed parameter comes from."""
    entries = packed.entries(packed.targets[parameter])
    return Origin((parameter,), tuple((entry.name, entry) for entry in entries), None, packed.model)


def dense_step(packed: PackedFolder, origin: Origin) -> Step:
    """A parameter that is not packed, as it is."""
    dtype = origin.entries[0][1].dtype
    state = packed.model.state_dict()
    return origin, tuple(TensorPlan(name, tuple(state[name].shape), dtype) for name in origin.names)


def write_folder(
    packed: PackedFolder,
    out: str | Path,
    steps: Sequence[Step],
    load: Callable[[Origin], dict[str, Tensor]],
    quantization: dict[str, Any] | None,
    progress: Progress | None = None,
) -> int:
    """Write a model folder, one parameter in memory at a time.

    Args:
        packed: what is exported.
        out: the folder; it must not exist.
        steps: what goes into it.
        load: gives the tensors of a step.
        quantization: the ``quantization_config`` that it gets; none where None.
        progress: told how far it is.

    Returns:
        Bytes of all tensors.

    Raises:
        OutputExists: when the output exists.
        BudgetError: when the disk is too small.
    """
    refuse_existing(out)
    source = packed.opened.path
    size = sum(plan.nbytes for _, plans in steps for plan in plans)
    require_disk(out, size + companion_bytes(source))
    shards = plan_shards(steps, SHARD_BYTES)
    total, done = sum(shard.source_bytes for shard in shards), 0
    digests: dict[str, str] = {}
    with new_folder(out) as partial:
        for shard in shards:

            def step(own: int, before: int = done) -> None:
                if progress is not None:
                    progress(before + own, total)

            digests |= write_shard(partial / shard.name, shard, load, step).tensors
            done += shard.source_bytes
        if len(shards) > 1:
            places = {plan.name: shard.name for shard in shards for plan in shard.plans}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
            write_atomic(partial / INDEX, json.dumps(index, indent=1))
        write_checksums(partial, digests)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = str(packed.dtype).removeprefix("torch.")
        if quantization is not None:
            config["quantization_config"] = quantization
        write_atomic(partial / "config.json", json.dumps(config, indent=2) + "\n")
        for file in companions(source):
            shutil.copyfile(file, partial / file.name)
    return size
