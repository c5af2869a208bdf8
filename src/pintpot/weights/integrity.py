"""Whether a model folder is whole: the checksums of its tensors, and what else can be known without them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pintpot.core.errors import ModelFolderError
from pintpot.core.files import write_atomic
from pintpot.core.model_folder import (
    CHECKSUMS,
    ModelFolder,
    TensorEntry,
    check_finite,
    open_model,
    read_plain_header,
)
from pintpot.weights.modules import PackedTerms
from pintpot.weights.quantizer import QUANT_METHOD, PintpotConfig

ALGORITHM = "sha256"


@dataclass(frozen=True)
class Integrity:
    """What checking a folder found.

    Attributes:
        folder: the folder.
        tensors: number of tensors that were read.
        nbytes: their bytes in the files.
        compared: number of tensors whose checksum was known.
        faults: what is wrong, by the tensor's name.
    """

    folder: Path
    tensors: int
    nbytes: int
    compared: int
    faults: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "folder": str(self.folder),
            "whole": self.whole,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "compared_with_checksums": self.compared,
            "faults": self.faults,
        }


def tensor_digest(pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """The checksum of a tensor's bytes as they lie in the file."""
    digest = hashlib.new(ALGORITHM)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_checksums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of a folder's tensors, by their names, into it."""
    data = {"algorithm": ALGORITHM, "tensors": dict(sorted(digests.items()))}
    write_atomic(folder / CHECKSUMS, json.dumps(data, indent=1))


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksums that are in a folder; none where it has no such file.

    Raises:
        ModelFolderError: when the file cannot be read.
    """
    file = folder / CHECKSUMS
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["algorithm"] != ALGORITHM:
            raise ValueError(f"they are {data['algorithm']}, not {ALGORITHM}")
        return {str(name): str(digest) for name, digest in data["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"the checksums in {file} cannot be read ({error})", hint="fetch or write the folder again"
        ) from error


def check_folder(folder: str | Path) -> Integrity:
    """Read every tensor of a model folder, one at a time, and say what is wrong with which.

    A tensor whose checksum is in the folder is compared with it. Another is decoded and searched for NaN and Inf. Then
    names and shapes are compared with what the configuration calls for.

    Raises:
        ModelFolderError: when the folder cannot be opened: a file is missing, cut off or has a damaged header, or the
            tensors do not fit the configuration.
        UnsupportedModel: when transformers does not know the architecture.
    """
    path = Path(folder)
    known = read_checksums(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    plain = {name: entry for file in files for name, entry in read_plain_header(file)[0].items()} if known else {}
    faults = dict.fromkeys(sorted(known.keys() - plain.keys()), "it has a checksum, and no file holds it")
    for name, entry in plain.items():
        if name not in known:
            faults[name] = "it has no checksum, and other tensors have"
        elif tensor_digest([entry.read_raw()]) != known[name]:
            faults[name] = f"its bytes in {entry.file.name} are not those that were written"
    if faults:
        size = sum(entry.nbytes for entry in plain.values())
        return Integrity(path, len(plain), size, len(known.keys() & plain.keys()), faults)
    opened = open_model(path)
    for name, entry in opened.entries.items():
        if name not in known and (fault := _fault(entry)):
            faults[name] = fault
    faults |= _misfits(opened)
    return Integrity(path, len(opened.entries), opened.file_bytes, len(known), faults)


def _fault(entry: TensorEntry) -> str:
    try:
        check_finite(entry.name, entry.read())
    except ModelFolderError as error:
        return error.message
    return ""


def _misfits(opened: ModelFolder) -> dict[str, str]:
    """Packed tensors that are missing or not as the layout says (``open_model`` has compared dense ones)."""
    if (opened.quantization or {}).get("quant_method") != QUANT_METHOD:
        return {}
    model = opened.shape().build("meta")
    PintpotConfig(**(opened.quantization or {})).prepare_skeleton_(model)
    holders = {name: module for name, module in model.named_modules() if isinstance(module, PackedTerms)}
    wrong: dict[str, str] = {}
    for holder, module in holders.items():
        for name, tensor in module.named_buffers(prefix=holder, recurse=False):
            entry = opened.entries.get(name)
            if entry is None:
                wrong[name] = "no file holds it"
            elif (entry.shape, entry.dtype) != (tuple(tensor.shape), tensor.dtype):
                wrong[name] = f"it is {entry.dtype} {entry.shape}, not {tensor.dtype} {tuple(tensor.shape)}"
    return wrong
