"""Models whose blocks are on disk: loading and saving them one parameter at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.errors import UnsupportedModel
from pintpot.core.files import write_atomic
from pintpot.core.model_folder import INDEX, open_model
from pintpot.core.parameter_map import Origin, map_parameters
from pintpot.jobs.load import no_progress_bars
from pintpot.optim._stream import BlockStore, DiskStore, away, block_layouts
from pintpot.weights.shards import TensorPlan, plan_shards, write_shard
from pintpot.weights.streaming import SHARD_BYTES


def load_streamed(folder: Path, dtype: torch.dtype, place: Path | None) -> tuple[PreTrainedModel, DiskStore]:
    """A model without its blocks, and these on disk; never more in memory than one parameter of them.

    Args:
        folder: a dense model folder.
        dtype: to hold the weights in.
        place: the folder for the blocks; a temporary one when ``None``.

    Raises:
        ModelFolderError: when the folder is incomplete, corrupt or unsafe, or weights hold NaN or Inf.
        UnsupportedModel: when the model is compressed, or not one row of blocks.
    """
    opened = open_model(folder)
    if opened.quantization is not None:
        raise UnsupportedModel(f"{folder} is compressed", hint="give the dense model")
    skeleton = opened.shape(dtype).build("meta")
    store = DiskStore(place, block_layouts(skeleton))
    state: dict[str, Tensor] = {}
    for origin in map_parameters(opened, skeleton):
        for name, loaded in origin.load().items():
            value = loaded.to(dtype) if loaded.is_floating_point() else loaded
            if name in store.places:
                store.put(name, value)
                value = away(value)
            state[name] = value
    # transformers makes what no checkpoint holds (buffers, ties) around the tensors that it is given.
    kind: Any = type(skeleton)
    with no_progress_bars():
        model: PreTrainedModel = kind.from_pretrained(None, config=opened.config, state_dict=state, dtype=dtype)
    return model.eval(), store


def save_streamed(model: PreTrainedModel, store: BlockStore, source: Path, out: Path) -> None:
    """Write a model that transformers loads, in the dtypes of the folder that it came from.

    Args:
        model: what is not in the store.
        store: the blocks.
        source: the folder that the model was loaded from.
        out: a folder that exists.
    """
    opened = open_model(source)
    skeleton = opened.shape().build("meta")
    own = model.state_dict()

    def load(origin: Origin) -> dict[str, Tensor]:
        held = {name: store.get(name) if name in store.places else own[name] for name in origin.names}
        return {name: value.detach().to(_stored(origin)) for name, value in held.items()}

    steps = []
    for origin in map_parameters(opened, skeleton):
        plans = (TensorPlan(name, tuple(own[name].shape), _stored(origin)) for name in origin.names)
        steps.append((origin, tuple(plans)))
    shards = plan_shards(steps, SHARD_BYTES)
    for shard in shards:
        write_shard(out / shard.name, shard, load, lambda done: None)
    if len(shards) > 1:
        places = {plan.name: shard.name for shard in shards for plan in shard.plans}
        size = sum(plan.nbytes for shard in shards for plan in shard.plans)
        write_atomic(out / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1))
    skeleton.config.save_pretrained(out)
    if model.generation_config is not None and model.can_generate():
        model.generation_config.save_pretrained(out)


def _stored(origin: Origin) -> torch.dtype:
    return origin.entries[0][1].dtype
