"""Attention to packed blocks: near to its definition in float64, the same for any threads, and what caches use."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pintpot.cache._base import Call, LayerSizes, Place
from pintpot.cache.fp8 import FP8
from pintpot.cache.kivi import KIVI
from pintpot.cache.stream import attend_chunks
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import (
    Float8Block,
    PackedBlock,
    attend_fp8,
    attend_packed,
    attend_serves,
    native,
    pack,
    unpack,
)
from pintpot.kernels.attend import FEW_QUERIES, attend_fp8_definition, attend_packed_definition

B, K = 2, 3


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def packed(rooms, bits, key_dim, value_dim, groups, *, dtype=torch.float16, seed=0, heads=K):
    """Blocks of random codes, the last with fewer tokens than room; scales such that numbers lie about -1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    key_group, value_group = groups
    blocks = []

    def rows(*shape, count, group):
        codes = torch.randint(0, 1 << bits, (B, heads, *shape, count), dtype=torch.uint8, generator=generator)
        scale = (torch.rand(B, heads, *shape, count // group, generator=generator) + 0.5) * (2 / 2**bits)
        low = -1 + 0.2 * torch.randn(B, heads, *shape, count // group, generator=generator)
        return codes, scale.to(dtype), low.to(dtype)

    for room in rooms:
        codes, scale, low = rows(key_dim, count=room, group=key_group)
        keys = pack(codes.unflatten(-1, (-1, key_group)), bits), scale, low
        codes, scale, low = rows(room, count=value_dim, group=value_group)
        blocks.append(PackedBlock(*keys, pack(codes, bits), scale, low, room))
    return [*blocks[:-1], blocks[-1]._replace(tokens=max(1, rooms[-1] - key_group))]


def dense64(block, bits, value_dim):
    """Keys and values (B, K, tokens, D) in float64, element by element."""
    key_group = block.values.shape[2] // block.keys.shape[3]
    codes = unpack(block.keys, bits, key_group).double()
    keys = (codes * block.key_scale.double()[..., None] + block.key_low.double()[..., None]).flatten(-2)
    group = torch.arange(value_dim) // (value_dim // block.value_scale.shape[-1])
    scale, low = block.value_scale.double()[..., group], block.value_low.double()[..., group]
    values = unpack(block.values, bits, value_dim).double() * scale + low
    return keys.transpose(-1, -2)[:, :, : block.tokens], values[:, :, : block.tokens]


def attention64(query, dense, softcap=None):
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*dense, strict=True))
    scores = query.double() @ keys.transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1, keepdim=True)


def check(found, expected, error=1e-5):
    """Against weighted means and logarithms of norms, relative to values and sums of scores of the order of 1."""
    mean, total = expected
    torch.testing.assert_close((found.out / found.norm).double(), mean, rtol=error, atol=error)
    torch.testing.assert_close((found.norm.log() + found.top).double(), total, rtol=error, atol=error)


SHAPES = [
    ((256, 256, 64), 64, 64, (32, 32), 1),
    ((256, 128), 48, 20, (8, 5), 3),
    ((96,), 20, 80, (32, 20), 5),
    ((64, 64, 64), 16, 7, (1, 1), 2),
    ((256,), 128, 128, (256, 128), 4),
    ((40, 24), 8, 24, (4, 24), FEW_QUERIES),
]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[0])))
def test_packed_is_near_to_float64(isa, bits, shape):
    rooms, key_dim, value_dim, groups, queries = shape
    dtype = (torch.float16, torch.bfloat16, torch.float32)[bits % 3]
    blocks = packed(rooms, bits, key_dim, value_dim, groups, dtype=dtype, seed=bits)
    query = normal(B, K, queries, key_dim) * key_dim**-0.5
    layout = {"bits": bits, "key_group": groups[0], "value_group": groups[1]}
    dense = [dense64(block, bits, value_dim) for block in blocks]
    check(attend_packed(query, blocks, **layout), attention64(query, dense))
    check(attend_packed_definition(query, blocks, *layout.values()), attention64(query, dense))
    check(attend_packed(query, blocks, softcap=0.7, **layout), attention64(query, dense, 0.7))


def float8(rooms, key_dim, value_dim, *, by_token=True, heads=K):
    blocks = []
    for index, room in enumerate(rooms):
        generator = torch.Generator().manual_seed(index if by_token else 0)
        scale = (torch.rand(2, B, heads, room if by_token else 1, 1, generator=generator) * 0.01).bfloat16()
        keys, values = (normal(B, heads, room, dim, seed=index) * 100 for dim in (key_dim, value_dim))
        # (What lies beyond the format's greatest number is NaN in some versions of torch.)
        codes = [numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) for numbers in (keys, values)]
        blocks.append(Float8Block(codes[0], scale[0], codes[1], scale[1], room))
    return [*blocks[:-1], blocks[-1]._replace(tokens=max(1, rooms[-1] - 3))]


def dense_float8(block):
    for codes, scale in ((block.keys, block.key_scale), (block.values, block.value_scale)):
        yield (codes.view(torch.float8_e4m3fn).double() * scale.double())[:, :, : block.tokens]


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("dims", [(64, 64), (20, 7), (128, 36)])
def test_float8_is_near_to_float64(isa, by_token, queries, dims):
    blocks = float8((256, 256, 96), *dims, by_token=by_token)
    query = normal(B, K, queries, dims[0]) * dims[0] ** -0.5
    dense = [tuple(dense_float8(block)) for block in blocks]
    check(attend_fp8(query, blocks), attention64(query, dense))
    check(attend_fp8_definition(query, blocks), attention64(query, dense))
    check(attend_fp8(query, blocks, softcap=0.7), attention64(query, dense, 0.7))


def test_every_float8_code_is_its_number(isa):
    """One token takes all weight, so that its values come back as they are."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 256)
    scale = torch.ones(1, 1, 1, 1)
    keys = torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
    found = attend_fp8(torch.ones(1, 1, 1, 8), [Float8Block(keys, scale, codes, scale, 1)])
    assert found.norm.item() == 1
    assert found.top.item() == 0
    assert torch.equal(found.out.nan_to_num(), codes.view(torch.float8_e4m3fn).float().nan_to_num())
    assert torch.equal(found.out.isnan(), codes.view(torch.float8_e4m3fn).float().isnan())
    # And as keys: their sum with ones.
    keys = codes.expand(1, 1, 256, 256).transpose(-1, -2).contiguous()[:, :, :, :1]
    values, scale = torch.zeros(1, 1, 256, 4, dtype=torch.uint8), torch.ones(1, 1, 256, 1)
    keep = keys.view(torch.float8_e4m3fn).float().isfinite().flatten()
    blocks = [Float8Block(keys[:, :, keep], scale[:, :, keep], values[:, :, keep], scale[:, :, keep], int(keep.sum()))]
    assert attend_fp8(torch.ones(1, 1, 1, 1), blocks).top.item() == torch.finfo(torch.float8_e4m3fn).max


@pytest.mark.parametrize("heads", [1, 5])
@pytest.mark.parametrize("kind", ["packed", "float8"])
def test_the_same_for_any_number_of_threads(isa, heads, kind):
    rooms, query = (64,) * 13, normal(B, heads, 4, 32, seed=1)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        if kind == "packed":
            blocks = packed(rooms, 3, 32, 32, (32, 16), heads=heads)
            results.append(attend_packed(query, blocks, bits=3, key_group=32, value_group=16))
        else:
            results.append(attend_fp8(query, float8(rooms, 32, 32, heads=heads)))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_scores_far_apart_and_what_is_no_number(isa):
    blocks = packed((64, 64), 4, 16, 16, (32, 16))
    layout = {"bits": 4, "key_group": 32, "value_group": 16}
    query = normal(B, K, 2, 16) * 200
    expected = attention64(query, [dense64(block, 4, 16) for block in blocks])
    found = attend_packed(query, blocks, **layout)
    # Scores of hundreds, rounded to 24 bits, make weights of about 13 bits less.
    torch.testing.assert_close((found.out / found.norm).double(), expected[0], rtol=1e-3, atol=1e-3)
    for odd in (torch.nan, torch.inf):
        wrong = query.clone()
        wrong[0, 1, 1, 3] = odd
        found = attend_packed(wrong, blocks, **layout)
        spoilt = found.out.isnan().all(dim=-1)
        assert spoilt.sum() == 1
        assert spoilt[0, 1, 1]
    # A group of equal numbers has a scale of zero.
    blocks[0].key_scale[:, :, 0] = blocks[0].value_scale[:, :, 5] = 0
    expected = attention64(query / 200, [dense64(block, 4, 16) for block in blocks])
    check(attend_packed(query / 200, blocks, **layout), expected)
    # One spoilt token spoils what sees it, and the head beside it nothing.
    blocks[1].value_scale[0, 0, 3] = torch.nan
    out = attend_packed(query / 200, blocks, **layout).out
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()
    assert out[1].isfinite().all()


def test_parts_are_joined_to_the_whole():
    blocks = packed((64, 32, 96), 4, 16, 16, (32, 16))
    layout = {"bits": 4, "key_group": 32, "value_group": 16}
    query = normal(B, K, 2, 16)
    whole = attend_packed(query, blocks, **layout)
    parts = [attend_packed(query, some, **layout) for some in (blocks[:1], blocks[1:])]
    check(parts[1].joined(parts[0]), ((whole.out / whole.norm).double(), (whole.norm.log() + whole.top).double()))


def cache_of(method, tokens, dtype=torch.float32, dim=32):
    state = method.open(Place(LayerSizes(K, dim, dim)))
    keys, values = (normal(B, K, tokens, dim, seed=seed).to(dtype) for seed in (1, 2))
    for start, stop in ((0, tokens - 60), (tokens - 60, tokens - 1), (tokens - 1, tokens)):
        state.append(Tokens.consecutive(keys, values).part(start, stop))
    return state


STORES = [KIVI(bits=2), KIVI(bits=3, residual_length=0), KIVI(bits=4, group_size=64), FP8(), FP8(scales="head")]


@pytest.mark.parametrize("method", STORES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": torch.ones(2 * K)}], ids=["plain", "cap", "sinks"])
def test_caches_read_packed_blocks_by_themselves(compiled, monkeypatch, method, dtype, more):
    state = cache_of(method, 700, dtype)
    ran = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda name, *args: ran.append(name) or run(name, *args))
    for queries in (1, 3):
        query = normal(B, 2 * K, queries, 32)
        call = Call(module=nn.Module(), query=query, scaling=0.3, causal=queries == 1, **more)
        ran.clear()
        found = attend_chunks(call, list(state.chunks(call)), K)
        assert any(name.startswith("attend_") for name in ran)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain = attend_chunks(call, list(state.chunks(call)), K)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_what_is_hidden_or_many_or_trained_goes_the_other_way(compiled):
    state = cache_of(FP8(), 300)
    chunks = list(state.chunks(Call(module=nn.Module(), query=normal(B, K, 1, 32))))
    mask = torch.ones(B, 1, 1, 300, dtype=torch.bool)
    mask[0, ..., :40] = False
    for query, more in (
        (normal(B, K, 1, 32), {"mask": mask}),
        (normal(B, K, 5, 32), {}),
        (normal(B, K, FEW_QUERIES + 1, 32), {"causal": False}),
    ):
        call = Call(module=nn.Module(), query=query, scaling=0.3, **more)
        dense = [chunk.scores(torch.eye(32).expand(B, K, 32, 32)).transpose(-1, -2) for chunk in chunks]
        keys = torch.cat(dense, dim=2).double()
        values = torch.cat([c.mix(torch.eye(c.tokens).expand(B, K, -1, -1)) for c in chunks], dim=2).double()
        scores = query.double() @ keys.transpose(-1, -2) * 0.3
        if "mask" in more:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif call.causal:
            scores = scores.masked_fill(torch.arange(300) > torch.arange(295, 300)[:, None], -torch.inf)
        expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
        torch.testing.assert_close(attend_chunks(call, chunks, K).double(), expected, rtol=1e-4, atol=1e-5)
    blocks = float8((64,), 16, 16)
    query = normal(B, K, 2, 16).requires_grad_()
    assert not attend_serves(query, blocks)
    attend_fp8(query, blocks).out.sum().backward()
    assert query.grad is not None
    strided = normal(B, 2, K, 16).transpose(1, 2)
    assert attend_serves(strided, blocks)
    assert torch.equal(attend_fp8(strided, blocks).out, attend_fp8(strided.contiguous(), blocks).out)


def test_shapes_alone_and_registrations(compiled):
    blocks = packed((64, 32), 4, 16, 24, (32, 8))
    query = normal(B, K, 2, 16)
    with FakeTensorMode() as mode:
        fakes = [PackedBlock(*(mode.from_tensor(t) for t in block[:-1]), block.tokens) for block in blocks]
        assert attend_serves(mode.from_tensor(query), fakes)
        found = attend_packed(mode.from_tensor(query), fakes, bits=4, key_group=32, value_group=8)
    assert [t.shape for t in found] == [(B, K, 2, 24), (B, K, 2, 1), (B, K, 2, 1)]
    stored, tokens = [t for block in blocks for t in block[:-1]], [block.tokens for block in blocks]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.pintpot.attend_packed.default, (query, stored, tokens, 4, 32, 8, 0.0), test_utils=checks
    )
    others = float8((64, 32), 16, 24)
    listed = [t for block in others for t in block[:-1]], [block.tokens for block in others]
    torch.library.opcheck(torch.ops.pintpot.attend_fp8.default, (query, *listed, 1.0), test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        attend_packed(query, blocks, bits=4, key_group=32, value_group=8)
        attend_fp8(query, others)
    assert counter.get_total_flops() == 2 * B * K * 2 * (sum(tokens) + sum(listed[1])) * (16 + 24)


def test_wrong_blocks_never_reach_the_library(compiled):
    blocks, query = packed((64,), 4, 16, 24, (32, 8)), normal(B, K, 2, 16)
    (block,) = blocks
    layout = {"bits": 4, "key_group": 32, "value_group": 8}
    wrong = [
        block._replace(tokens=0),
        block._replace(tokens=65),
        block._replace(keys=block.keys[..., :-1].contiguous()),
        block._replace(key_scale=block.key_scale[:1].contiguous()),
        block._replace(value_low=block.value_low.float()),
        block._replace(values=block.values.to(torch.int8)),
        block._replace(values=block.values[:, :, :50].contiguous()),
    ]
    for given in wrong:
        with pytest.raises(ShapeError):
            attend_packed(query, [given], **layout)
    for changed in ({"bits": 3}, {"key_group": 16}, {"key_group": 0}, {"value_group": 4}, {"softcap": -1.0}):
        with pytest.raises(ShapeError):
            attend_packed(query, blocks, **{**layout, **changed})
    with pytest.raises(ShapeError, match="blocks"):
        torch.ops.pintpot.attend_packed(query, list(block[:-1])[:5], [64], 4, 32, 8, 0.0)
    with pytest.raises(ShapeError, match="queries"):
        torch.ops.pintpot.attend_packed(query.double(), list(block[:-1]), [64], 4, 32, 8, 0.0)
    (other,) = float8((64,), 16, 24)
    for given in (other._replace(tokens=65), other._replace(key_scale=other.key_scale[:, :, :5].contiguous())):
        with pytest.raises(ShapeError):
            attend_fp8(query, [given])
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda q: torch.ops.pintpot.attend_fp8(q, list(other[:-1]), [64], 0.0))(query[None])
