"""Models whose blocks stay in their folder until the forward pass reaches them, and are packed as it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import ModelFolderError
from pintpot.core.heap import give_back
from pintpot.core.model_folder import ModelFolder, TensorEntry, read_header
from pintpot.core.parameter_map import Origin, map_parameters
from pintpot.core.shape import block_names
from pintpot.weights._base import Evidence, Texts, WeightMethod
from pintpot.weights.modules import place_
from pintpot.weights.quantizer import mark_
from pintpot.weights.replace import Step, compressed_blocks, examine
from pintpot.weights.targets import Target, find_targets

if TYPE_CHECKING:
    from pintpot.weights.streaming import CompressionPlan


class FolderBlocks:
    """A model of a folder with everything but its blocks in memory, and blocks that come and go.

    Args:
        opened: the dense folder.
        origins: where its parameters come from.
        dtype: to hold them in; as stored when None.
    """

    def __init__(self, opened: ModelFolder, origins: Sequence[Origin], dtype: torch.dtype | None = None) -> None:
        meta = opened.shape(dtype).build("meta")
        names = block_names(meta)
        self._dtype = dtype
        self.of: dict[str, list[Origin]] = {name: [] for name in names}
        state: dict[str, Tensor] = {}
        like = meta.state_dict()
        for origin in origins:
            block = next((b for b in names if origin.names[0].startswith(f"{b}.")), None)
            if block is None:
                state |= {name: self._cast(tensor) for name, tensor in origin.load().items()}
            else:
                self.of[block].append(origin)
                state |= {name: _away(like[name]) for name in origin.names}
        # transformers makes what no checkpoint holds (buffers, ties) around the tensors that it is given.
        kind: Any = type(meta)
        self.model: PreTrainedModel = kind.from_pretrained(
            None, config=opened.config, state_dict=state, dtype=dtype or opened.dtype
        ).eval()

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def fill_(self, block: str) -> bool:
        """Read a block's weights; says that they are dense."""
        for origin in self.of[block]:
            for name, tensor in origin.load().items():
                _set(self.model, name, self._cast(tensor))
        return True

    def drop_(self, block: str) -> None:
        """Let go of a block's tensors."""
        for name, tensor in self.model.get_submodule(block).state_dict(prefix=f"{block}.").items():
            _set(self.model, name, _away(tensor))


def _away(like: Tensor) -> Tensor:
    """What stands for a tensor that is elsewhere: its shape, and one number."""
    return torch.zeros((1,) * like.dim(), dtype=like.dtype).expand(like.shape)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def examine_folder(
    opened: ModelFolder, origins: Sequence[Origin], method: WeightMethod, targets: Sequence[Target], texts: Texts
) -> Evidence:
    """What a method must know of a folder's parameters, with one block in memory at a time."""
    method.require_texts(texts)
    blocks = FolderBlocks(opened, origins)
    return examine(blocks.model, method, targets, texts, blocks.fill_, blocks.drop_)


def load_calibrated(
    opened: ModelFolder, method: WeightMethod, texts: Texts, dtype: torch.dtype | None = None, step: Step | None = None
) -> PreTrainedModel:
    """A packed model of a dense folder, whose blocks were dense one at a time.

    Args:
        opened: the folder.
        method: one that looks at the whole model.
        texts: what the model reads.
        dtype: of the dense parameters and of computing.
        step: told each block that is done.
    """
    method.require_texts(texts)
    origins = map_parameters(opened, opened.shape().build("meta"))
    blocks = FolderBlocks(opened, origins, dtype)
    targets, _ = find_targets(blocks.model)
    evidence = None
    if method.examines:
        evidence = examine(blocks.model, method, targets, texts, blocks.fill_, blocks.drop_)
    layout = method.layout(targets, evidence)
    for name in compressed_blocks(blocks.model, method, layout, targets, texts, blocks.fill_):
        if step is not None:
            step(name)
    mark_(blocks.model, method, layout)
    return blocks.model


@contextmanager
def calibrated_blocks(
    plan: CompressionPlan, texts: Texts, finished: Sequence[Path]
) -> Iterator[Callable[[Origin], dict[str, Tensor]]]:
    """A context whose value gives the output tensors of an origin, compressing blocks until it has them.

    Args:
        plan: what is written.
        texts: what the model reads.
        finished: output files of an earlier run; blocks that they hold are read from there and only run.
    """
    stored = {name: entry for file in finished for name, entry in read_header(file).items()}
    blocks = FolderBlocks(plan.source, plan.origins)
    wanted = {origin.names: [p.name for p in plans] for shard in plan.shards for origin, plans in shard.origins}
    made: dict[str, Tensor] = {}
    again: set[str] = set()

    def prepare_(block: str) -> bool:
        names = [name for origin in blocks.of[block] for name in wanted[origin.names]]
        if not all(name in stored for name in names):
            return blocks.fill_(block)
        again.add(block)
        _restore_(blocks.model, plan, block, {name: stored[name] for name in names})
        return False

    run = compressed_blocks(blocks.model, plan.method, plan.layout, tuple(plan.targets.values()), texts, prepare_)

    def load(origin: Origin) -> dict[str, Tensor]:
        names = wanted[origin.names]
        if all(origin not in own for own in blocks.of.values()):
            return origin.load()
        while not all(name in made for name in names):
            block = next(run, None)
            if block is None:
                raise ModelFolderError(f"{names[0]} is not in a block that was run", hint="this should not happen")
            if block not in again:
                state = blocks.model.get_submodule(block).state_dict(prefix=f"{block}.")
                made.update({name: tensor.detach() for name, tensor in state.items()})
            blocks.drop_(block)
            give_back()
        return {name: made.pop(name) for name in names}

    try:
        yield load
    finally:
        run.close()  # type: ignore[attr-defined]  # a generator


def _restore_(model: PreTrainedModel, plan: CompressionPlan, block: str, entries: Mapping[str, TensorEntry]) -> None:
    """Put the packed tensors of an earlier run into a block."""
    targets = [target for target in plan.targets.values() if target.block == block]
    for target in targets:
        formats = plan.layout[target.parameter]
        place_(model, target, formats, target.empty(formats, torch.empty(0, device="meta")))
    for name, entry in entries.items():
        _set(model, name, entry.read())
