"""Compiled AdamW on packed moments: the optimizer's plain path code for code, in no memory of its own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pintpot.kernels import AdamRates, Packed, native, packed_adam_
from pintpot.kernels.blocks import packed_adam_definition_
from pintpot.optim import AdamW, GaLore
from pintpot.optim._states import SCALE, states_of

NAMES = ("exp_avg", "exp_avg_sq")
STEPS = 4


def start(bits, numel):
    states, state = states_of(bits), {}
    for name in NAMES:
        states.start_(state, name, torch.zeros(numel), torch.Size([numel]))
    return states, state


def moments(states, state, numel):
    return states._both(state, NAMES, numel)


def gradients(numel, dtype):
    generator = torch.Generator().manual_seed(numel)
    for _ in range(STEPS):
        yield (torch.randn(numel, generator=generator) * 0.01).to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_codes_are_those_of_the_definition(isa, bits, dtype, weight_decay):
    for numel in (1, 2, 129, 255, 3000):
        ours, theirs = start(bits, numel), start(bits, numel)
        mine = torch.linspace(-1, 1, numel).to(dtype)
        plain = mine.clone()
        for number, gradient in enumerate(gradients(numel, dtype), 1):
            rates = AdamRates(number, 0.01, (0.9, 0.999), 1e-8, weight_decay)
            packed_adam_(mine, gradient, *moments(*ours, numel), rates)
            packed_adam_definition_(plain, gradient, *moments(*theirs, numel), rates)
        for name in NAMES:
            read = [states.read(state, name, torch.Size([numel])) for states, state in (ours, theirs)]
            # A value at the middle of two levels may fall to either: at most one code apart, and seldom.
            assert (ours[1][name] != theirs[1][name]).sum() <= 1 + numel // 1000
            scale = theirs[1][name + SCALE].max()
            torch.testing.assert_close(*read, rtol=1e-5, atol=0.2 * float(scale))
            torch.testing.assert_close(ours[1][name + SCALE], theirs[1][name + SCALE], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(mine, plain, rtol=1e-4 if dtype == torch.float32 else 0.01, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_makes_the_same_steps_with_and_without(bits, dtype, monkeypatch, compiled):
    """Also where small gradients are projected."""
    runs = []
    for compiled_ in (True, False):
        with monkeypatch.context() as patch:
            if not compiled_:
                patch.setattr(native, "library", lambda: None)
            runs.append([*train(AdamW, bits, dtype), *train(GaLore, bits, dtype, rank=4, update_gap=2)])
    for ours, plain in zip(*runs, strict=True):
        if ours.dtype == torch.uint8:
            assert (ours != plain).float().mean() < 0.001
        else:
            torch.testing.assert_close(ours, plain, rtol=0.01 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def train(kind, bits, dtype, sizes=(40, 33), **extra):
    generator = torch.Generator().manual_seed(7)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in (sizes, (70,))]
    optimizer = kind(parameters, lr=0.01, weight_decay=0.1, state_bits=bits, **extra)
    for _ in range(STEPS):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [*(p.detach() for p in parameters), *states]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_is_the_same_for_any_number_of_threads(bits, compiled):
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(train(AdamW, bits, torch.float32, sizes=(300, 301)))
    torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class Made(TorchDispatchMode):
    """The most bytes of any tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.most = max(self.most, out.untyped_storage().nbytes())
        return out


def test_no_temporary_is_made(compiled):
    p = nn.Parameter(torch.ones(100_000))
    optimizer = AdamW([p], state_bits=8)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        with Made() as made:
            optimizer.step()
    assert made.most < 1000


def test_a_block_of_zeros_and_one_that_overflows(isa):
    numel = 512
    states, state = start(8, numel)
    p, gradient = torch.ones(numel), torch.zeros(numel)
    gradient[256:] = 1e30  # Its square is beyond float32.
    packed_adam_(p, gradient, *moments(states, state, numel), AdamRates(1, 0.01, (0.9, 0.999), 1e-8))
    plain = start(8, numel)
    other = torch.ones(numel)
    packed_adam_definition_(other, gradient, *moments(*plain, numel), AdamRates(1, 0.01, (0.9, 0.999), 1e-8))
    torch.testing.assert_close(p, other, equal_nan=True)
    assert torch.equal(p[:256], torch.ones(256))
    for name in state:
        torch.testing.assert_close(state[name], plain[1][name], equal_nan=True)


def test_strided_and_narrower_tensors_take_the_definition(compiled):
    numel = 600
    for parameter, gradient in (
        (torch.zeros(30, 20).t(), torch.ones(20, 30)),
        (torch.zeros(600, dtype=torch.float16), torch.ones(600, dtype=torch.float16)),
    ):
        states, state = start(8, numel)
        packed_adam_(parameter, gradient, *moments(states, state, numel), AdamRates(1, 0.1, (0.9, 0.999), 1e-8))
        torch.testing.assert_close(parameter.float(), torch.full(parameter.shape, -0.1), rtol=1e-3, atol=0.0)


def test_blocks_of_other_sizes_are_left_to_the_definition(compiled):
    states, state = start(8, 4096)
    first, second = moments(states, state, 4096)
    large = [Packed(m.codes, torch.zeros(2), m.levels, m.table, 8, 2048) for m in (first, second)]
    p = torch.zeros(4096)
    packed_adam_(p, torch.ones(4096), *large, AdamRates(1, 0.1, (0.9, 0.999), 1e-8))
    torch.testing.assert_close(p, torch.full((4096,), -0.1))
