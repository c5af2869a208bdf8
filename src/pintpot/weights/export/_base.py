"""What every export reads: a model folder, dense or packed, parameter by parameter; and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.errors import UnsupportedModel
from pintpot.core.model_folder import ModelFolder, TensorEntry, open_model
from pintpot.core.parameter_map import Origin, map_parameters
from pintpot.weights._base import Layout
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.quantizer import QUANT_METHOD, PintpotConfig
from pintpot.weights.targets import Target, find_targets


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        out: the folder or file that was written.
        to: its format.
        nbytes: of the tensors in it.
        notes: where what was written is not exactly what was stored, or is not all of it.
    """

    out: Path
    to: str
    nbytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"out": str(self.out), "to": self.to, "bytes": self.nbytes, "notes": list(self.notes)}


@dataclass(frozen=True)
class PackedFolder:
    """A folder whose parameters are read one at a time, packed or dense.

    Attributes:
        opened: the checked folder.
        model: the dense skeleton, on the meta device.
        layout: the formats of packed parameters; empty for a dense folder.
        targets: these parameters, by name.
        dense: where each of the other parameters comes from.
    """

    opened: ModelFolder
    model: PreTrainedModel
    layout: Layout
    targets: dict[str, Target]
    dense: tuple[Origin, ...]

    @classmethod
    def open(cls, folder: str | Path) -> PackedFolder:
        """Check a folder and lay out how it is read.

        Raises:
            ModelFolderError: when it is damaged or incomplete.
            UnsupportedModel: when another tool compressed it, or what is packed is not a matrix inside a block.
        """
        opened = open_model(folder)
        model = opened.shape().build("meta")
        if opened.quantization is None:
            return cls(opened, model, {}, {}, map_parameters(opened, model))
        if opened.quantization.get("quant_method") != QUANT_METHOD:
            raise UnsupportedModel(f"{folder} was compressed by another tool", hint="export it with that tool")
        config = PintpotConfig(**opened.quantization)
        found, _ = find_targets(model, config.dtype)
        layout = config.read_layout() or config.method().layout(found)
        targets = {target.parameter: target for target in found if target.parameter in layout}
        places = [name for target in targets.values() for name in stored_places(target, layout[target.parameter])]
        lost = sorted((layout.keys() - targets.keys()) | (set(places) - opened.entries.keys()))
        if lost:
            raise UnsupportedModel(
                f"{folder}: {lost[0]} (and {len(lost) - 1} more) is packed in a way that is not exported",
                hint="load the folder with pintpot.weights.load_compressed",
            )
        kept = opened.entries.keys() - set(places)
        state = model.state_dict()
        dense = tuple(Origin((name,), ((name, opened.entries[name]),), None, model) for name in state if name in kept)
        return cls(opened, model, layout, targets, dense)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense model."""
        return next((target.dtype for target in self.targets.values()), self.opened.dtype)

    def stored(self, target: Target) -> Iterator[tuple[Format, Tensors]]:
        """Each term's format and stored tensors."""
        for index, layout in enumerate(self.layout[target.parameter]):
            names = layout.storage(*target.shape[-2:])
            yield layout, {key: self.opened.entries[_place(target, index, key)].read() for key in names}

    def entries(self, target: Target) -> list[TensorEntry]:
        """Where the stored tensors lie."""
        return [self.opened.entries[name] for name in stored_places(target, self.layout[target.parameter])]

    def weight(self, target: Target) -> Tensor:
        """The numbers that a packed parameter stands for, in its own dtype and shape."""
        total: Tensor | None = None
        for layout, tensors in self.stored(target):
            if target.matrices == 1 and len(target.shape) == 2:
                part = layout.decode(tensors, target.shape[-1], target.dtype)
            else:
                rows = [{key: t[e] for key, t in tensors.items()} for e in range(target.matrices)]
                part = torch.stack([layout.decode(row, target.shape[-1], target.dtype) for row in rows])
            total = part if total is None else total + part
        dense = total if total is not None else torch.empty(0)
        shape = self.model.get_parameter(target.parameter).shape
        return dense.t().contiguous() if target.transposed else dense.reshape(shape).contiguous()


def _place(target: Target, term: int, key: str) -> str:
    return f"{target.holder}.term{term}_{key}"


def stored_places(target: Target, formats: tuple[Format, ...]) -> list[str]:
    """The names of the tensors that hold a packed parameter."""
    return [_place(target, i, key) for i, layout in enumerate(formats) for key in layout.storage(*target.shape[-2:])]
