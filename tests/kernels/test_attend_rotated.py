"""Attention to rotated blocks: near to float64, the same for any threads, and what RotateKV uses."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.rotary import Rotary
from pintpot.cache.rotatekv import RotateKV
from pintpot.cache.stream import attend_chunks
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import RotatedBlock, RotatedLayout, attend_rotated, attend_serves, native, pack, unpack
from pintpot.kernels.attend import FEW_QUERIES, attend_rotated_definition
from pintpot.kernels.hadamard import power_of_two
from tests.kernels.test_attend import attention64, check, normal

B = 2


def rotated(rooms, bits, heads, dims, groups, *, head_group=1, dtype=torch.float16, turned=True, spread=False, seed=0):
    """Blocks of random codes, the last with fewer tokens than room, and their layout."""
    generator = torch.Generator().manual_seed(seed)
    (key_dim, value_dim), width = dims, heads * dims[0]

    def rows(over, room, count, group):
        codes = torch.randint(0, 1 << bits, (B, over, room, count), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(B, over, room, count // group, generator=generator) + 0.5) * (2 / 2**bits)
        low = -1 + 0.2 * torch.randn(B, over, room, count // group, generator=generator)
        return pack(codes, bits), scale.to(dtype), low.to(dtype)

    blocks = []
    for room in rooms:
        at = torch.randint(0, 5000, (B, 1, room, 1), dtype=torch.int32, generator=generator) if spread else None
        blocks.append(
            RotatedBlock(*rows(1, room, width, groups[0]), *rows(heads, room, value_dim, groups[1]), at, room)
        )
    blocks[-1] = blocks[-1]._replace(tokens=max(1, rooms[-1] - 3))
    order = torch.stack([torch.randperm(width, generator=generator) for _ in range(B if spread else 1)]).int()
    mixed = power_of_two(head_group * key_dim), power_of_two(value_dim)
    frequencies = 10000.0 ** -(torch.arange(0, key_dim // 2 * 2, 2) / key_dim)[: max(1, key_dim // 4)]
    waves = (frequencies, 1.25) if turned else (None, 1.0)
    return blocks, RotatedLayout(bits, *groups, *mixed, order, *waves)


def matrix(size):
    """The Hadamard matrix, from its definition by signs."""
    rows = torch.arange(size)
    both, signs = rows[:, None] & rows, torch.zeros(size, size, dtype=torch.int64)
    for bit in range(size.bit_length()):
        signs += (both >> bit) & 1
    return (1.0 - 2.0 * (signs % 2)).double() * size**-0.5


def mixed64(numbers, block):
    return (numbers.unflatten(-1, (-1, block)) @ matrix(block)).flatten(-2)


def grid64(codes, scale, low, bits, group, count):
    where = torch.arange(count) // group
    return unpack(codes, bits, count).double() * scale.double()[..., where] + low.double()[..., where]


def dense64(blocks, layout, heads, key_dim, value_dim, first=0):
    """Keys and values (B, K, tokens, D) of each block in float64."""
    for block in blocks:
        width, tokens = heads * key_dim, block.tokens
        stored = grid64(block.keys, block.key_scale, block.key_low, layout.bits, layout.key_group, width)[:, 0]
        joined = torch.empty_like(stored)
        for row in range(B):
            joined[row][:, layout.order[row % len(layout.order)].long()] = stored[row]
        keys = mixed64(joined, layout.key_block).unflatten(-1, (heads, key_dim)).transpose(1, 2)
        if layout.frequencies is not None:
            count = len(layout.frequencies)
            number = torch.arange(first, first + keys.shape[2]).expand(B, 1, -1)
            at = number if block.positions is None else block.positions.squeeze(-1)
            # Angles are float32 products, as models have them.
            turn = torch.polar(torch.tensor(layout.scaling).double(), (at[..., None] * layout.frequencies).double())
            pairs = torch.complex(keys[..., :count], keys[..., count : 2 * count]) * turn
            keys = torch.cat([pairs.real, pairs.imag, keys[..., 2 * count :]], dim=-1)
        values = grid64(block.values, block.value_scale, block.value_low, layout.bits, layout.value_group, value_dim)
        yield keys[:, :, :tokens], mixed64(values, layout.value_block)[:, :, :tokens]
        first += tokens


# Rooms, heads, head dims, groups, heads that are mixed, queries.
SHAPES = [
    ((128, 32), 4, (64, 64), (128, 64), 4, 1),
    ((64, 32), 6, (20, 28), (24, 7), 2, 3),
    ((96,), 3, (24, 20), (72, 20), 1, 5),
    ((32, 32, 32), 4, (24, 7), (1, 1), 4, 2),
    ((7, 1), 1, (2, 1), (2, 1), 1, 4),
    ((40, 24), 5, (15, 80), (25, 16), 1, FEW_QUERIES),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, (*shape[0], *shape[2]))))
def test_rotated_is_near_to_float64(isa, bits, shape):
    rooms, heads, dims, groups, head_group, queries = shape
    dtype = (torch.float16, torch.bfloat16, torch.float32)[bits % 3]
    how = {"turned": bits % 4 > 0, "spread": bits % 2 == 1, "head_group": head_group, "dtype": dtype, "seed": bits}
    blocks, layout = rotated(rooms, bits, heads, dims, groups, **how)
    query = normal(B, heads, queries, dims[0]) * dims[0] ** -0.5
    first = 10 * bits
    dense = list(dense64(blocks, layout, heads, *dims, first))
    check(attend_rotated(query, blocks, layout, first=first), attention64(query, dense))
    check(attend_rotated_definition(query, blocks, layout, first), attention64(query, dense))
    check(attend_rotated(query, blocks, layout, first=first, softcap=0.7), attention64(query, dense, 0.7))


def test_channels_may_come_in_any_order_in_each_sequence(isa):
    """An order changes nothing where keys are packed in it, so that sequences with orders of their own can differ."""
    blocks, layout = rotated((32,), 8, 2, (16, 8), (32, 8), turned=False)
    query, (block,) = normal(B, 2, 1, 16), blocks
    plain = layout._replace(order=torch.arange(32, dtype=torch.int32)[None])
    orders = torch.stack([torch.arange(32).flip(0), torch.randperm(32, generator=torch.Generator().manual_seed(1))])
    codes = unpack(block.keys, 8, 32).gather(-1, orders[:, None, None].expand(-1, 1, 32, -1))
    moved = block._replace(keys=pack(codes, 8))
    found = attend_rotated(query, [moved], layout._replace(order=orders.int()))
    for mine, theirs in zip(found, attend_rotated(query, [block], plain), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("skipped", [[3, 40, 41], [0, 1, 2, 31, 32], list(range(48)), list(range(100))])
def test_tokens_are_left_out(isa, skipped):
    blocks, layout = rotated((32, 32, 32), 4, 2, (16, 8), (32, 8), head_group=2)
    query, first = normal(B, 2, 3, 16), 1000
    numbers = torch.tensor(skipped, dtype=torch.int32)
    # Each sequence has its own, those of others and numbers of no token mean nothing.
    gone = torch.stack([numbers + first, (numbers * 7) % 90 - 30 + first]).int()
    found = attend_rotated(query, blocks, layout, first=first, skipped=gone)
    defined = attend_rotated_definition(query, blocks, layout, first, gone)
    for row in range(B):
        keys, values = (torch.cat(p, dim=2)[row] for p in zip(*dense64(blocks, layout, 2, 16, 8, first), strict=True))
        kept = [number for number in range(keys.shape[1]) if number + first not in gone[row].tolist()]
        expected = attention64(query[row : row + 1], [(keys[None, :, kept], values[None, :, kept])]) if kept else None
        for one in (found, defined):
            if expected is not None:
                check(type(one)(*(part[row : row + 1] for part in one)), expected)
            else:
                assert (one.top[row] == torch.finfo(torch.float32).min).all()
    # What is left out weighs nothing beside anything else.
    other = type(found)(normal(B, 2, 3, 8), torch.full((B, 2, 3, 1), -50.0), torch.ones(B, 2, 3, 1))
    if len(skipped) == 100:
        assert all(torch.equal(a[:1], b[:1]) for a, b in zip(found.joined(other), other, strict=True))


@pytest.mark.parametrize("position", [0, 7, 4095, 131071, 10_000_000])
def test_angles_are_those_of_the_model(isa, position):
    """One token's key is 1 in all channels, and the score tells one channel after the other of it."""
    dim = 64
    frequencies = 500000.0 ** -(torch.arange(0, dim, 2) / dim)
    codes, scale = torch.ones(1, 1, 1, dim, dtype=torch.uint8), torch.ones(1, 1, 1, 1)
    at = torch.full((1, 1, 1, 1), position, dtype=torch.int32)
    block = RotatedBlock(codes, scale, 0 * scale, codes, scale, 0 * scale, at, 1)
    layout = RotatedLayout(8, dim, dim, 1, 1, torch.arange(dim, dtype=torch.int32)[None], frequencies)
    found = [attend_rotated(x[None, None], [block], layout).top for x in torch.eye(dim).split(FEW_QUERIES)]
    angles = (torch.tensor(float(position)) * frequencies).double()
    expected = torch.cat([angles.cos() - angles.sin(), angles.cos() + angles.sin()])
    torch.testing.assert_close(torch.cat(found, dim=2).flatten().double(), expected, rtol=0, atol=4e-7)


@pytest.mark.parametrize("sequences", [1, 2])
def test_the_same_for_any_number_of_threads(isa, sequences):
    blocks, layout = rotated((64,) * 13, 3, 4, (32, 32), (64, 16), head_group=4, spread=sequences > 1)
    blocks = [
        RotatedBlock(*(held if held is None else held[:sequences].contiguous() for held in block[:-1]), block.tokens)
        for block in blocks
    ]
    query, skipped = normal(sequences, 4, 4, 32, seed=1), torch.arange(20, dtype=torch.int32).expand(sequences, -1)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(attend_rotated(query, blocks, layout, skipped=skipped.contiguous()))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_what_is_no_number_spoils_its_own(isa):
    blocks, layout = rotated((32, 32), 4, 4, (16, 16), (32, 16), head_group=2)
    query = normal(B, 4, 2, 16)
    for odd in (torch.nan, torch.inf):
        wrong = query.clone()
        wrong[0, 1, 1, 3] = odd
        spoilt = attend_rotated(wrong, blocks, layout).out.isnan().all(dim=-1)
        assert spoilt.nonzero().tolist() == [[0, 1, 1]]
    # Groups of equal numbers have a scale of zero.
    blocks[0].key_scale[:, :, 4] = blocks[0].value_scale[:, :, 5] = 0
    check(attend_rotated(query, blocks, layout), attention64(query, list(dense64(blocks, layout, 4, 16, 16))))
    # A spoilt token spoils what sees it, and no other sequence.
    blocks[1].key_low[0, 0, 3] = torch.nan
    out = attend_rotated(query, blocks, layout).out
    assert out[0].isnan().any(dim=-1).all()
    assert out[1].isfinite().all()


def state_of(method, tokens, *, heads=2, dim=32, dtype=torch.float32, consecutive=True, turned=True, order=False):
    rotary = Rotary(10000.0 ** -(torch.arange(0, dim // 2, 2) / dim), 1.2) if turned else None
    place = Place(LayerSizes(heads, dim, dim, 2 * heads), rotary=rotary, consecutive=consecutive)
    if order:
        found = torch.randperm(heads * dim, generator=torch.Generator().manual_seed(3)).int()
        place = place.but(tensors={"order": found})
    state = method.open(place)
    keys, values, inputs = (normal(B, h, tokens, dim, seed=s).to(dtype) for s, h in ((1, heads), (2, heads), (3, 1)))
    every = Tokens.consecutive(keys, values, inputs=inputs)
    if not consecutive:
        every = every.gather(torch.arange(0, tokens, 3).expand(B, 1, -1))
    for start, stop in ((0, every.count - 60), (every.count - 60, every.count - 1), (every.count - 1, every.count)):
        state.append(every.part(start, stop))
    return state


STATES = [
    {},
    {"dtype": torch.bfloat16},
    {"consecutive": False, "tokens": 1900},
    {"turned": False},
    {"order": True},
    {"heads": 3, "dim": 24},
    {"heads": 6, "dim": 80},
    {"tokens": 62},
]


@pytest.mark.parametrize("how", STATES, ids=str)
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=["plain", "cap"])
def test_rotatekv_reads_packed_rows_by_itself(compiled, monkeypatch, how, more):
    how = {"tokens": 700, "heads": 2, "dim": 32} | how
    ran = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda name, *args: ran.append(name) or run(name, *args))
    for method in (RotateKV(bits=2), RotateKV(bits=4, group_size=16, head_group=1, sink_tokens=0)):
        state = state_of(method, how["tokens"], **{key: value for key, value in how.items() if key != "tokens"})
        for queries in (1, 3):
            query = normal(B, 2 * how["heads"], queries, how["dim"])
            call = Call(module=nn.Module(), query=query, scaling=0.3, causal=queries == 1, **more)
            ran.clear()
            found = attend_chunks(call, list(state.chunks(call)), how["heads"])
            assert ran.count("attend_rotated") == 1
            with monkeypatch.context() as patch:
                patch.setattr(native, "library", lambda: None)
                plain = attend_chunks(call, list(state.chunks(call)), how["heads"])
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=2e-5)


def test_masked_and_later_tokens_go_the_other_way(compiled, monkeypatch):
    """Sinks lie in blocks that all queries see, and in one that they do not all see."""
    state = state_of(RotateKV(bits=4, sink_tokens=300), 600)
    mask = torch.ones(B, 1, 1, 600, dtype=torch.bool)
    mask[0, ..., :40] = False
    for more in ({"query": normal(B, 4, 5, 32)}, {"query": normal(B, 4, 1, 32), "mask": mask}):
        call = Call(module=nn.Module(), scaling=0.3, **more)
        found = attend_chunks(call, list(state.chunks(call)), 2)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            torch.testing.assert_close(found, attend_chunks(call, list(state.chunks(call)), 2), rtol=1e-4, atol=2e-5)


def test_shapes_alone_and_registrations(compiled):
    blocks, layout = rotated((64, 32), 4, 2, (16, 24), (32, 8), spread=True)
    query, skipped = normal(B, 2, 3, 16), torch.zeros(B, 2, dtype=torch.int32)
    with FakeTensorMode() as mode:
        fakes = [RotatedBlock(*map(mode.from_tensor, block[:-1]), block.tokens) for block in blocks]
        fake = layout._replace(order=mode.from_tensor(layout.order), frequencies=mode.from_tensor(layout.frequencies))
        assert attend_serves(mode.from_tensor(query), fakes)
        found = attend_rotated(mode.from_tensor(query), fakes, fake, skipped=mode.from_tensor(skipped))
    assert [t.shape for t in found] == [(B, 2, 3, 24), (B, 2, 3, 1), (B, 2, 3, 1)]
    stored, tokens = [t for block in blocks for t in block[:-1]], [block.tokens for block in blocks]
    sizes = [4, 32, 8, layout.key_block, 0]
    given = (query, stored, tokens, layout.order, layout.frequencies, skipped, sizes, 1.0, 0.0)
    run = torch.ops.pintpot.attend_rotated
    torch.library.opcheck(run.default, given, test_utils=("test_schema", "test_faketensor"))
    with FlopCounterMode(display=False) as counter:
        attend_rotated(query, blocks, layout)
    assert counter.get_total_flops() == 2 * B * 2 * 3 * sum(tokens) * (16 + 24)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda q: run(q, *given[1:]))(query[None])
    trained = query.clone().requires_grad_()
    attend_rotated(trained, blocks, layout).out.sum().backward()
    assert trained.grad is not None


def test_wrong_blocks_never_reach_the_library(compiled):
    (block,), layout = rotated((64,), 4, 2, (16, 24), (32, 8), spread=True)
    query, order = normal(B, 2, 3, 16), layout.order
    wrong_blocks = [
        block._replace(tokens=0),
        block._replace(tokens=65),
        block._replace(keys=block.keys[..., :-1].contiguous()),
        block._replace(keys=block.keys.expand(-1, 2, -1, -1).contiguous()),
        block._replace(key_scale=block.key_scale[:1].contiguous()),
        block._replace(value_low=block.value_low.float()),
        block._replace(values=block.values[:, :, :50].contiguous()),
        block._replace(positions=block.positions.long()),
        block._replace(positions=block.positions[:, :, :5].contiguous()),
    ]
    for given in wrong_blocks:
        with pytest.raises(ShapeError):
            attend_rotated(query, [given], layout)
    wrong_layouts = [
        {"bits": 3},
        {"key_group": 0},
        {"key_group": 24},
        {"value_group": 4},
        {"key_block": 3},
        {"key_block": 64},
        {"order": order.long()},
        {"order": order[:, :31].contiguous()},
        {"order": order.expand(2, 2, -1).flatten(0, 1).contiguous()},
        {"order": order * 0},
        {"order": order + 1},
        {"order": order - 1},
        {"frequencies": torch.ones(9)},
        {"frequencies": torch.ones(4).double()},
    ]
    for changed in wrong_layouts:
        with pytest.raises(ShapeError):
            attend_rotated(query, [block], layout._replace(**changed))
    for skipped in (torch.zeros(B, 2), torch.zeros(1, 2, dtype=torch.int32)):
        with pytest.raises(ShapeError):
            attend_rotated(query, [block], layout, skipped=skipped)
    with pytest.raises(ShapeError):
        attend_rotated(query, [block], layout, softcap=-1.0)
