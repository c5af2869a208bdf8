"""Writing safetensors files of which names, shapes and dtypes are known before the numbers are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.files import PARTIAL, fsync_folder
from pintpot.core.model_folder import SINGLE, TensorEntry, header_of
from pintpot.core.parameter_map import Origin

_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that will be written: name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One output file: where its tensors come from, and the tensors in the order in which they are written."""

    name: str
    origins: tuple[tuple[Origin, tuple[TensorPlan, ...]], ...]

    @property
    def plans(self) -> tuple[TensorPlan, ...]:
        """All its tensors."""
        return tuple(plan for _, plans in self.origins for plan in plans)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read to write it."""
        return sum(origin.nbytes for origin, _ in self.origins)


def plan_shards(steps: Iterable[tuple[Origin, tuple[TensorPlan, ...]]], shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute tensors over files of at most ``shard_bytes`` (or one origin), in order."""
    groups: list[list[tuple[Origin, tuple[TensorPlan, ...]]]] = [[]]
    filled = 0
    for origin, plans in steps:
        size = sum(plan.nbytes for plan in plans)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((origin, plans))
        filled += size
    if len(groups) == 1:
        return (Shard(SINGLE, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)
    )


@dataclass(frozen=True)
class WrittenShard:
    """The checksums of a file that was written.

    Attributes:
        digest: the file's SHA-256.
        tensors: the SHA-256 of the bytes of each of its tensors.
    """

    digest: str
    tensors: dict[str, str]


def write_shard(
    file: Path, shard: Shard, load: Callable[[Origin], dict[str, Tensor]], step: Callable[[int], None]
) -> WrittenShard:
    """Write a shard under a temporary name, one origin in memory at a time, and rename it when it is complete.

    Args:
        file: where it will stand.
        shard: what goes into it.
        load: gives the tensors of an origin, by name.
        step: told the source bytes of the shard that are done.

    Raises:
        ShapeError: when ``load`` gives a tensor that is not as planned.
    """
    header = header_of(TensorEntry(p.name, file, p.dtype, p.shape, 0, p.nbytes) for p in shard.plans)
    digest = hashlib.sha256()
    temporary = file.with_name(file.name + PARTIAL)
    tensor_digests: dict[str, str] = {}
    done = 0
    with temporary.open("wb") as handle:
        handle.write(header)
        digest.update(header)
        for origin, plans in shard.origins:
            tensors = load(origin)
            for plan in plans:
                data = _raw(plan, tensors.pop(plan.name))
                handle.write(data)
                digest.update(data)
                tensor_digests[plan.name] = hashlib.sha256(data).hexdigest()
            done += origin.nbytes
            step(done)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    fsync_folder(file.parent)
    return WrittenShard(digest.hexdigest(), tensor_digests)


def _raw(plan: TensorPlan, tensor: Tensor) -> bytes | memoryview:
    if tuple(tensor.shape) != plan.shape or tensor.dtype is not plan.dtype:
        raise ShapeError(
            f"{plan.name} came out as {tensor.dtype} {tuple(tensor.shape)}, not {plan.dtype} {plan.shape}",
            hint="the method's storage() and encode() disagree, or the checkpoint mixes dtypes within one parameter",
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_digest(file: Path) -> str:
    """The SHA-256 of a file, read in small pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
