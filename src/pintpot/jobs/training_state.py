"""Checkpoints of a training run: safetensors for tensors, JSON for the rest, never pickle.

A checkpoint is a folder `step-00000100/` with `model.safetensors`, `optimizer.safetensors` and `state.json`, and a
folder `streamed/` of the weights that the optimizer keeps elsewhere. It is written under a temporary name and renamed,
so that whatever stands under its name is whole.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pintpot.core.errors import TrainingError
from pintpot.core.files import PARTIAL, new_folder
from pintpot.optim._stream import BlockStore

_TENSOR = "__tensor__"
_FOLDER = "step-{:08d}"
_STREAMED = "streamed"
_KEYED = "__int_keys__"
_TUPLE = "__tuple__"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        curve: one row (column name to number) for each logged step.
        run: what identifies the run; a checkpoint of another run is refused.
    """

    step: int
    curve: list[dict[str, float]]
    run: dict[str, Any]


def flatten_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into a JSON-able tree and the tensors in it, keyed by their path.

    The tensors are those of the state, not copies (a copy of an optimizer's state may not fit), except that of several
    that share a storage, which safetensors refuses, the later ones are copied.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().contiguous()
            shared = tensor.untyped_storage().data_ptr() in storages
            tensors[path] = tensor.clone() if shared else tensor
            storages.add(tensors[path].untyped_storage().data_ptr())
            return {_TENSOR: path}
        if isinstance(value, dict):
            keyed = any(isinstance(key, int) for key in value)
            tree = {str(key): visit(item, f"{path}/{key}") for key, item in value.items()}
            return {_KEYED: tree} if keyed else tree
        if isinstance(value, tuple):
            return {_TUPLE: [visit(item, f"{path}/{place}") for place, item in enumerate(value)]}
        if isinstance(value, list):
            return [visit(item, f"{path}/{place}") for place, item in enumerate(value)]
        if isinstance(value, str | int | float | bool) or value is None:
            return value
        raise TrainingError(
            f"the optimizer keeps a {type(value).__name__} at {path or '/'}, which a checkpoint cannot hold",
            hint="optimizer state may hold tensors, numbers, strings, lists and dicts",
        )

    return visit(state, ""), tensors


def unflatten_state(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten_state`."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        if set(tree) == {_KEYED}:
            return {int(key): unflatten_state(item, tensors) for key, item in tree[_KEYED].items()}
        if set(tree) == {_TUPLE}:
            return tuple(unflatten_state(item, tensors) for item in tree[_TUPLE])
        return {key: unflatten_state(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unflatten_state(item, tensors) for item in tree]
    return tree


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, position: Position, *, trainable_only: bool, keep: int
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        folder: where the checkpoints of the run are.
        model: its parameters and persistent buffers are saved (tied ones once).
        optimizer: any optimizer; its `state_dict` is saved.
        position: where the run stands.
        trainable_only: leave out the parameters that are frozen now.
        keep: how many checkpoints stay.
    """
    target = folder / _FOLDER.format(position.step)
    if target.exists():
        return target
    optimizer_tree, optimizer_tensors = flatten_state(optimizer.state_dict())
    streamed = streamed_weights(optimizer)
    random_tree, random_tensors = flatten_state(_random_state())
    state = {
        "step": position.step,
        "run": position.run,
        "curve": position.curve,
        "optimizer": optimizer_tree,
        "random": random_tree,
    }
    with new_folder(target) as partial:
        save_file(_model_state(model, streamed, trainable_only=trainable_only), partial / "model.safetensors")
        if streamed is not None:
            streamed.save(partial / _STREAMED)
        optimizer_tensors = {f"optimizer{path}": tensor for path, tensor in optimizer_tensors.items()}
        random_tensors = {f"random{path}": tensor for path, tensor in random_tensors.items()}
        save_file({**optimizer_tensors, **random_tensors}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.name.endswith(PARTIAL))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, run: dict[str, Any], *, trainable_only: bool
) -> Position:
    """Put model, optimizer and random generators back to where a checkpoint left them.

    Raises:
        TrainingError: when the checkpoint belongs to another run or another model.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    different = sorted(key for key in run.keys() | state["run"].keys() if run.get(key) != state["run"].get(key))
    if different:
        raise TrainingError(
            f"{path} was written by a run with another {', '.join(different)}",
            hint="give the same settings to resume it, or remove the checkpoints to start anew",
        )
    streamed = streamed_weights(optimizer)
    _load_model_state(path, model, streamed, trainable_only=trainable_only)
    if streamed is not None:
        streamed.load(path / _STREAMED)
    tensors = load_file(path / "optimizer.safetensors")
    optimizer.load_state_dict(unflatten_state(state["optimizer"], _under(tensors, "optimizer")))
    _set_random_state(unflatten_state(state["random"], _under(tensors, "random")))
    return Position(step=state["step"], curve=state["curve"], run=state["run"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix + "/")}


def streamed_weights(optimizer: Optimizer | None) -> BlockStore | None:
    """Where an optimizer keeps weights that are not in the model, if it does."""
    return getattr(optimizer, "store", None)


def _model_state(model: nn.Module, streamed: BlockStore | None, *, trainable_only: bool) -> dict[str, Tensor]:
    """Parameters once each, and the buffers that belong to the state; not what is elsewhere."""
    elsewhere: Collection[str] = () if streamed is None else streamed.places.keys()
    names = set(model.state_dict())
    state: dict[str, Tensor] = {}
    state |= {name: p for name, p in model.named_parameters() if p.requires_grad or not trainable_only}
    state |= {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in elsewhere}


def _load_model_state(path: Path, model: nn.Module, streamed: BlockStore | None, *, trainable_only: bool) -> None:
    wanted = _model_state(model, streamed, trainable_only=trainable_only).keys()
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with safe_open(path / "model.safetensors", framework="pt") as loaded, torch.no_grad():
        names = set(loaded.keys())
        if wanted != names:
            raise TrainingError(
                f"{path} holds other parameters than this model: {', '.join(sorted(wanted ^ names)[:5])}",
                hint="resume with the model and adapters that the run began with",
            )
        for name in names:
            places[name].copy_(loaded.get_tensor(name))


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global generator)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
