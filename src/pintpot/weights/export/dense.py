"""Export to plain safetensors: every parameter dense again, with the rounding that it got."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from pintpot.core.parameter_map import Origin
from pintpot.weights.export._base import Exported, PackedFolder
from pintpot.weights.export._writing import dense_step, origin_of, write_folder
from pintpot.weights.shards import TensorPlan
from pintpot.weights.streaming import Progress


def export_dense(packed: PackedFolder, out: str | Path, progress: Progress | None = None) -> Exported:
    """Write an ordinary folder that loads everywhere; parameters have the names that transformers gives them.

    Args:
        packed: what is exported.
        out: the folder to write; it must not exist.
        progress: told how far it is.
    """
    steps = [dense_step(packed, origin) for origin in packed.dense]
    for name, target in packed.targets.items():
        shape = tuple(packed.model.get_parameter(name).shape)
        steps.append((origin_of(packed, name), (TensorPlan(name, shape, target.dtype),)))
    size = write_folder(packed, out, steps, partial(_load, packed=packed), None, progress)
    return Exported(Path(out), "safetensors", size)


def _load(origin: Origin, packed: PackedFolder) -> dict[str, Tensor]:
    name = origin.names[0]
    return {name: packed.weight(packed.targets[name])} if name in packed.targets else origin.load()
