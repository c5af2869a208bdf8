"""Just One Byte: replicas stay equal bit for bit by bytes alone, and a history of bytes makes the weights again."""

import math
import threading
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pintpot.core.errors import TrainingError
from pintpot.optim import JustOneByte
from pintpot.optim._tensors import mix_seed
from pintpot.optim.just_one_byte import from_byte, to_byte

STEPS = 4


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def closure_of(model: nn.Module, seed: int):
    """A loss on data that one machine alone has."""
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    return lambda: (model(inputs) - seed).float().square().mean()


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_byte_is_an_8_bit_float():
    values = torch.cat((torch.randn(500) * torch.logspace(-4, 3, 500), torch.tensor([0.0, 1.0625, 1.1875, 448.0])))
    exact = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    for value, code, level in zip(values.tolist(), exact.view(torch.uint8).tolist(), exact.float(), strict=True):
        assert from_byte(to_byte(value)) == float(level)
        assert to_byte(value) == code or float(level) == 0
    assert all(math.isnan(from_byte(to_byte(x))) for x in (math.nan, math.inf, -math.inf))
    assert from_byte(to_byte(-1e9)) == -448


@pytest.mark.parametrize("samples", [1, 2])
def test_twenty_steps_alone_are_those_of_the_twin(samples):
    p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))
    theta = p.detach().clone()
    optimizer = JustOneByte([p], lr=0.01, weight_decay=0.1, samples=samples, seed=5)

    def loss_of(w: torch.Tensor) -> float:
        return float((w.detach().exp() - w.detach()).sum())

    for step in range(20):
        optimizer.step(lambda: loss_of(p))
        update = torch.zeros_like(theta)
        for sample in range(samples):
            seed = mix_seed(mix_seed(5, step, 0, sample), 0, 0)
            z = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            slope = (loss_of(theta + 1e-3 * z) - loss_of(theta - 1e-3 * z)) / 2e-3
            update += float(torch.tensor(slope).to(torch.float8_e4m3fn)) * z / samples
        theta = (1 - 0.01 * 0.1) * theta - 0.01 * update
        torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-9)
    assert [len(entry["bytes"]) for entry in optimizer.history] == [2 * samples] * 20


class Room:
    """Machines that are threads, and the bytes that they lay on the table."""

    def __init__(self, machines: int) -> None:
        self.table: dict[int, list[int]] = {}
        self.barrier = threading.Barrier(machines)

    def step(self, optimizers: list[JustOneByte], closures: list) -> None:
        failed = []

        def run(number: int) -> None:
            optimizer = optimizers[number]
            optimizer._world = lambda: (number, len(optimizers))

            def exchange(codes: list[int], machines: int) -> list[int]:
                self.table[number] = list(codes)
                self.barrier.wait(10)
                return [code for machine in range(machines) for code in self.table[machine]]

            optimizer._exchange = exchange
            try:
                optimizer.step(closures[number])
            except (TrainingError, threading.BrokenBarrierError) as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(len(optimizers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machines_join_and_leave_and_stay_equal(dtype):
    models = [model_of(dtype) for _ in range(3)]
    first = bits(models[0])
    optimizers = [JustOneByte(m, lr=1e-2, samples=2, weight_decay=0.1) for m in models]
    closures = [closure_of(m, seed) for seed, m in enumerate(models)]
    room = Room(2)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        room.step(optimizers[:2], closures[:2])
        assert equal(models[0], models[1])
    assert not torch.equal(first[0], models[0][0].weight)
    # The third comes with the first weights and a few bytes; then the first leaves.
    optimizers[2].replay(optimizers[0].history)
    assert equal(models[0], models[2])
    assert optimizers[2].param_groups[0]["lr"] == 1e-2 / 3
    Room(3).step(optimizers, closures)
    assert equal(models[0], models[1])
    assert equal(models[0], models[2])
    Room(2).step(optimizers[1:], closures[1:])
    assert equal(models[1], models[2])
    assert not equal(models[0], models[1])
    assert [len(entry["bytes"]) // 4 for entry in optimizers[1].history] == [2, 2, 2, 3, 2]


def test_a_history_of_another_run_is_refused():
    one, other = model_of(), model_of()
    first, second = JustOneByte(one, lr=1e-2), JustOneByte(other, lr=1e-2, seed=1)
    first.step(closure_of(one, 1))
    second.step(closure_of(other, 2))
    with pytest.raises(TrainingError, match="another run"):
        second.replay(first.history)


def test_a_machine_whose_loss_is_not_finite_stops_all_alike():
    models = [model_of() for _ in range(2)]
    optimizers = [JustOneByte(m, lr=1e-2, nonfinite="skip") for m in models]
    room = Room(2)
    room.step(optimizers, [closure_of(models[0], 1), lambda: math.nan])
    assert equal(*models)
    torch.testing.assert_close(models[0][0].weight, model_of()[0].weight, rtol=1e-6, atol=1e-7)
    room.step(optimizers, [closure_of(m, 1) for m in models])
    late = JustOneByte(model_of(), lr=1e-2, nonfinite="skip")
    late.replay(optimizers[0].history)
    assert equal(late.model, models[0])


def _machine(rank: int, folder: Path) -> None:
    """What one of two processes runs; it can send nothing but what it counts."""
    torch.set_num_threads(1)
    sent = []
    gather = dist.all_gather

    def counted(tensors, tensor, group=None):
        sent.append(tensor.nbytes)
        return gather(tensors, tensor, group=group)

    def refused(*args, **settings):
        raise AssertionError("only all_gather was expected")

    others = dict.fromkeys(("all_reduce", "broadcast", "send", "all_gather_object", "all_gather_into_tensor"), refused)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        with patch.multiple(dist, all_gather=counted, **others):
            model = model_of()
            optimizer = JustOneByte(model, lr=1e-2)
            losses = [float(optimizer.step(closure_of(model, rank))) for _ in range(STEPS)]
    finally:
        dist.destroy_process_group()
    torch.save({"bits": bits(model), "sent": sent, "losses": losses, "history": optimizer.history}, folder / str(rank))


def test_two_processes_exchange_bytes_and_hold_the_same_bits(tmp_path: Path):
    other = mp.get_context("spawn").Process(target=_machine, args=(1, tmp_path))
    other.start()
    _machine(0, tmp_path)
    other.join(60)
    assert other.exitcode == 0
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert one["sent"] == two["sent"] == [1] * STEPS
    assert one["losses"] != two["losses"]
    assert one["history"] == two["history"]
    assert all(torch.equal(a, b) for a, b in zip(one["bits"], two["bits"], strict=True))
    late = model_of()
    JustOneByte(late, lr=1e-2).replay(one["history"])
    assert all(torch.equal(a, b) for a, b in zip(one["bits"], late.parameters(), strict=True))
