"""Storing a model folder, dense or packed, in fewer bytes without loss, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pintpot.core.errors import UnsupportedModel
from pintpot.core.files import PARTIAL, fsync_folder, new_folder, refuse_existing, require_disk, write_atomic
from pintpot.core.model_folder import INDEX, PLANES, SINGLE, STORAGE, ModelFolder, TensorEntry, header_of, open_model
from pintpot.core.technique import Technique
from pintpot.weights._base import CompressionReport
from pintpot.weights.companions import companion_bytes, copy_companions
from pintpot.weights.integrity import tensor_digest, write_checksums
from pintpot.weights.quantizer import QUANT_METHOD, PintpotConfig
from pintpot.weights.streaming import SHARD_BYTES, Progress


@dataclass(frozen=True, kw_only=True)
class StorageMethod(Technique):
    """A technique that stores tensors in fewer bytes and gives them back bit for bit.

    What it writes says of itself how it is decoded (``core.byte_planes``), so that it is read without the technique.
    """

    @abstractmethod
    def encode(self, tensor: Tensor) -> list[bytes]:
        """The stored form of a contiguous tensor on the CPU, in pieces that follow one another."""

    def store_folder(
        self,
        source: str | Path,
        out: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress | None = None,
        check_disk: bool = True,
    ) -> CompressionReport:
        """Write a model folder anew with all its tensors coded.

        Args:
            source: a dense folder, or one that Pintpot packed.
            out: the folder to write; it must not exist. Until the end it is called ``<out>.partial``.
            shard_bytes: most bytes of tensors, before coding, in an output file.
            progress: told how far it is.
            check_disk: refuse to start when the disk could not hold the output if nothing became smaller.

        Raises:
            OutputExists: when the output exists.
            BudgetError: when the disk is too small.
            ModelFolderError: when the source is damaged, incomplete or unsafe.
            UnsupportedModel: when it is stored coded already, or another tool compressed it.
        """
        refuse_existing(out)
        opened = open_model(source)
        _refuse(opened)
        if check_disk:
            require_disk(out, opened.weight_bytes + companion_bytes(opened.path))
        before, after, done = opened.weight_bytes, 0, 0
        digests: dict[str, str] = {}
        places: dict[str, str] = {}
        with new_folder(out) as partial:
            for name, entries in _shards(list(opened.entries.values()), shard_bytes).items():
                for entry, size, digest in _written(self, partial / name, entries):
                    digests[entry.name], places[entry.name] = digest, name
                    after, done = after + size, done + entry.nbytes
                    if progress is not None:
                        progress(done, before)
            write_checksums(partial, digests)
            _write_index(partial, places, after)
            _write_config(partial, opened, self.name)
            made = f"Without loss, by `{self.name}`: {before} bytes of tensors in {after}."
            copy_companions(opened.path, partial, "Stored with Pintpot", made)
        return CompressionReport(tuple(places), (), before, after)


def _refuse(opened: ModelFolder) -> None:
    other = (opened.quantization or {}).get("quant_method", QUANT_METHOD)
    if opened.coded or other != QUANT_METHOD:
        state = "stored coded already" if opened.coded else f"compressed by {other}"
        raise UnsupportedModel(f"{opened.path} is {state}", hint="give the original folder")


def _shards(entries: Sequence[TensorEntry], shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """What goes into which file."""
    shards: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": entries for n, entries in enumerate(shards, 1)}


def _written(
    method: StorageMethod, file: Path, entries: Sequence[TensorEntry]
) -> Iterator[tuple[TensorEntry, int, str]]:
    """Write a file of coded tensors; yields each with its size in the file and its checksum when it is written.

    The header comes first and its offsets are known last, so that its place is kept by one of at least its length.
    """
    metadata = {STORAGE: PLANES}

    def coded(entry: TensorEntry, size: int) -> TensorEntry:
        return replace(entry, dtype=torch.uint8, shape=(size,), nbytes=size)

    # A coded tensor is hardly ever longer than the tensor; with this allowance its numbers are never longer in digits.
    room = len(header_of([coded(e, 2 * e.nbytes + (1 << 20)) for e in entries], metadata))
    temporary = file.with_name(file.name + PARTIAL)
    written: list[TensorEntry] = []
    with temporary.open("wb") as handle:
        handle.write(b" " * room)
        for entry in entries:
            pieces = method.encode(entry.read().contiguous())
            for piece in pieces:
                handle.write(piece)
            written.append(coded(entry, sum(len(piece) for piece in pieces)))
            yield entry, written[-1].nbytes, tensor_digest(pieces)
        header = header_of(written, metadata)
        handle.seek(0)
        # Spaces after the header's text belong to it.
        handle.write((room - 8).to_bytes(8, "little") + header[8:] + b" " * (room - len(header)))
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    fsync_folder(file.parent)


def _write_index(partial: Path, places: Mapping[str, str], nbytes: int) -> None:
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(places.items()))}
        write_atomic(partial / INDEX, json.dumps(index, indent=1))


def _write_config(partial: Path, opened: ModelFolder, storage: str) -> None:
    config: dict[str, Any] = json.loads((opened.path / "config.json").read_text(encoding="utf-8"))
    own = config.get("quantization_config")
    settings = PintpotConfig(**own) if own is not None else PintpotConfig(None)
    settings.storage = storage
    config["quantization_config"] = settings.to_dict()
    # Written out, because transformers would otherwise take the dtype of whichever tensor comes first.
    config["dtype"] = str(opened.dtype).removeprefix("torch.") if own is None else config.get("dtype")
    config.pop("torch_dtype", None)
    write_atomic(partial / "config.json", json.dumps(config, indent=2) + "\n")
