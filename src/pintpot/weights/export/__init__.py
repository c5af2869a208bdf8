"""Writing what Pintpot stored in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pintpot.core.errors import CompositionError
from pintpot.core.files import refuse_existing
from pintpot.weights.export._base import Exported, PackedFolder
from pintpot.weights.export.compressed_tensors import export_compressed_tensors
from pintpot.weights.export.dense import export_dense
from pintpot.weights.export.gguf import export_gguf
from pintpot.weights.streaming import Progress

Export = Callable[[PackedFolder, str | Path, Progress | None], Exported]

FORMATS: dict[str, Export] = {
    "compressed-tensors": export_compressed_tensors,
    "gguf": export_gguf,
    "safetensors": export_dense,
}
"""What can be exported to, by its name on the command line."""

__all__ = ["FORMATS", "Exported", "PackedFolder", "export_folder"]


def export_folder(folder: str | Path, out: str | Path, to: str, progress: Progress | None = None) -> Exported:
    """Write a model folder in the format of another program, one parameter in memory at a time.

    Args:
        folder: dense, packed, or stored coded.
        out: the folder (for GGUF, the file) to write; it must not exist.
        to: one of ``FORMATS``.
        progress: told how far it is.

    Raises:
        CompositionError: for an unknown format.
        OutputExists: when the output exists.
        MissingExtra: when the format needs a package that is not installed.
        ModelFolderError: when the folder is damaged or incomplete.
        UnsupportedModel: naming what has no counterpart in the format, and why.
    """
    if to not in FORMATS:
        raise CompositionError(f"there is no export to {to!r}", hint=f"one of: {', '.join(FORMATS)}")
    refuse_existing(out)
    return FORMATS[to](PackedFolder.open(folder), out, progress)
