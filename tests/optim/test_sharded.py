"""FSDP2 on two processes: the losses are those of one process, and each process holds its own part of the weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pintpot.core.errors import CompositionError, TrainingError
from pintpot.optim import AdamW
from tests.architectures import tiny_model
from tests.contract.test_optim import KINDS, NAMES, method

ROWS = [torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))] * 4
WORLD = 2

SHARDED = [name for name in NAMES if KINDS[name]().select() is None]
"""Methods that choose blocks freeze parameters, which FSDP2 forbids once it has sharded them."""


def losses_of(model, optimizer, rank: int | None) -> list[float]:
    losses = []
    for rows in ROWS:
        mine = rows if rank is None else rows[rank : rank + 1]
        loss = model(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        if rank is not None:
            dist.all_reduce(total)
            total /= WORLD
        losses.append(float(total))
    return losses


def sharded_model():
    model = tiny_model("llama")
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {}
    for name in [*SHARDED, "adamw-8bit"]:
        model = sharded_model()
        assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = AdamW(model, 1e-2, state_bits=8) if name == "adamw-8bit" else method(name).optimizer(model, lr=1e-2)
        found[name] = losses_of(model, optimizer, rank)
    found["refuses"] = refusals(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def refusals(rank: int) -> list[str]:
    """What is said of a released gradient, and of a NaN that only one process sees."""
    with pytest.raises(CompositionError) as released:
        AdamW(sharded_model(), release_gradients=True)
    model = sharded_model()
    before = [p.to_local().clone() for p in model.parameters()]
    optimizer = AdamW(model)
    model(input_ids=ROWS[0], labels=ROWS[0], use_cache=False).loss.backward()
    if rank == 0:
        next(model.parameters()).grad.to_local().fill_(torch.nan)
    with pytest.raises(TrainingError) as poisoned:
        optimizer.step()
    assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
    return [str(released.value), str(poisoned.value)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(train_sharded, args=(str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", SHARDED)
def test_losses_are_those_of_one_process(sharded, name):
    model = tiny_model("llama")
    alone = losses_of(model, method(name).optimizer(model, lr=1e-2), None)
    assert sharded[0][name] == sharded[1][name]
    assert sharded[0][name] == pytest.approx(alone, rel=2e-3)
    assert alone[-1] < alone[0]


def test_packed_states_are_of_the_own_part(sharded):
    model = tiny_model("llama")
    alone = losses_of(model, AdamW(model, 1e-2, state_bits=8), None)
    # The blocks of 256 lie otherwise in a part of a parameter.
    assert sharded[0]["adamw-8bit"] == pytest.approx(alone, rel=1e-2)


def test_released_gradients_and_a_nan_elsewhere_are_refused(sharded):
    assert all("FSDP2" in found["refuses"][0] for found in sharded)
    assert "another process" in sharded[1]["refuses"][1]
    assert "NaN" in sharded[0]["refuses"][1]
