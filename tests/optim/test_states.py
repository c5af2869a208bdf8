"""Packed moments: the levels, the nearest of them, and training with them."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import ShapeError
from pintpot.optim import AdamW, _states
from pintpot.optim._states import STATE_BITS, levels_of, states_of

PACKED = {bits: states_of(bits) for bits in (8, 4)}


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("unsigned", [False, True])
def test_levels_are_those_of_the_papers(bits, unsigned):
    levels = torch.tensor(levels_of(bits, unsigned))
    assert len(levels) == len(levels.unique()) == 1 << bits
    assert float(levels[-1]) == 1.0
    if unsigned:
        assert float(levels.min()) >= 0
    # The smallest of the tree are 0.55 of a decade of tenths: six below one at 8 bits, two at 4.
    smallest = float(levels[levels > 0].min())
    expected = {(8, False): 5.5e-7, (8, True): 3.25e-7, (4, False): 5.5e-3, (4, True): 1 / 16}[bits, unsigned]
    assert smallest == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_value_becomes_the_nearest_level_of_its_block(bits, name):
    states = PACKED[bits]
    value = torch.randn(5, 333, generator=torch.Generator().manual_seed(0)) ** (2 if name == "exp_avg_sq" else 1)
    state = {}
    states.start_(state, name, value, value.shape)
    assert not states.read(state, name, value.shape).any()
    states.write_(state, name, value)
    read = states.read(state, name, value.shape)
    assert sum(t.nbytes for t in state.values()) == states.nbytes(value.numel(), torch.float32)
    flat = torch.nn.functional.pad(value.reshape(-1), (0, -value.numel() % states.block)).view(-1, states.block)
    scale = flat.abs().amax(1, keepdim=True)
    levels = torch.tensor(levels_of(bits, name == "exp_avg_sq")) * scale
    nearest = (flat[:, :, None] - levels[:, None, :]).abs().amin(2).view(-1)[: value.numel()]
    error = (read - value).abs().view(-1)
    # Rounding to bfloat16 first shifts a value by at most 2**-8 of it: past the middle of two levels, and back.
    assert (error <= nearest + value.abs().view(-1) * 2.0**-7 + 1e-12).all()


@pytest.mark.parametrize("bits", PACKED)
def test_pieces_are_the_whole(bits):
    states = PACKED[bits]
    value = torch.randn(3 * 256 + 101, generator=torch.Generator().manual_seed(0))
    whole, parted = {}, {}
    for state in (whole, parted):
        states.start_(state, "exp_avg", value, value.shape)
    states.write_(whole, "exp_avg", value)
    for start in range(0, value.numel(), 512):
        piece = slice(start, min(start + 512, value.numel()))
        states.write_(parted, "exp_avg", value[piece], piece)
        read = states.read(parted, "exp_avg", value.shape, piece)
        assert torch.equal(read, states.read(whole, "exp_avg", value.shape)[piece])
    assert all(torch.equal(whole[key], parted[key]) for key in whole)


@pytest.mark.parametrize("bits", STATE_BITS)
def test_adamw_with_packed_moments_stays_near_adamw(bits):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 3000).view(30, 100)) for _ in range(2))
    mine = AdamW([ours], lr=0.01, weight_decay=0.1, state_bits=bits)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.randn(30, 100, generator=generator) + 1
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved = (theirs.detach() - torch.linspace(-1, 1, 3000).view(30, 100)).norm()
    assert float((ours - theirs).detach().norm() / moved) < {32: 1e-5, 8: 0.02, 4: 0.2}[bits]


def test_the_state_is_restored_and_the_same_size_on_fake_tensors():
    p = nn.Parameter(torch.ones(300, 10))
    optimizer = AdamW([p], state_bits=8)
    p.grad = torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    other = AdamW([p], state_bits=8)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[p]["exp_avg"].dtype == torch.uint8
    assert all(torch.equal(v, other.state[p][k]) for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor))
    with FakeTensorMode():
        fake = nn.Parameter(torch.empty(300, 10))
        fake.grad = torch.empty(300, 10)
        shadow = AdamW([fake], state_bits=8)
        shadow.step()
        sizes = {k: v.nbytes for k, v in shadow.state[fake].items() if isinstance(v, torch.Tensor)}
    assert sizes == {k: v.nbytes for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}


def test_other_widths_are_refused():
    with pytest.raises(ShapeError, match="state_bits"):
        AdamW([nn.Parameter(torch.ones(3))], state_bits=5)


@pytest.mark.parametrize("bits", PACKED)
def test_packed_moments_serve_bfloat16_parameters(bits):
    p = nn.Parameter(torch.ones(20, 30, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=0.25, state_bits=bits)
    for _ in range(2):
        p.grad = torch.full_like(p, 2.0)
        optimizer.step()
    assert p.dtype == torch.bfloat16
    torch.testing.assert_close(p.detach().float(), torch.full((20, 30), 0.5), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("bits", PACKED)
def test_a_moment_larger_than_a_piece_is_packed_in_pieces_as_if_whole(bits, monkeypatch):
    states = PACKED[bits]
    moment = torch.randn(7, 333, generator=torch.Generator().manual_seed(0))
    kept: list[dict] = []
    for limit in (1 << 20, 512):
        monkeypatch.setattr(_states, "CHUNK_NUMEL", limit)
        state: dict = {}
        states.start_(state, "m", moment, moment.shape)
        states.write_(state, "m", moment)
        kept.append({**state, "read": states.read(state, "m", moment.shape)})
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
