"""Attention to packed blocks on a GPU: that of float64 over what the blocks hold, for every layout."""

import pytest
import torch

from pintpot.cache.packed import Block, Layout
from pintpot.core.errors import ShapeError
from pintpot.kernels import PackedBlock, attend_packed, attend_serves

pytest.importorskip("triton", reason="the kernels for GPUs need Triton (the extra gpu)")
from pintpot.kernels.triton import attend

STORED = ("keys", "key_scale", "key_low", "values", "value_scale", "value_low")


def make(bits, groups, dims, lead, tokens, dtype=torch.float16):
    """Blocks of random tokens, and the keys and values that they hold in float64."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(bits, *groups)
    blocks, keys, values = [], [], []
    for count in tokens:
        room = -(-count // layout.key_group) * layout.key_group
        own = [torch.randn(*lead, room, dim, generator=generator).to(dtype) for dim in dims]
        block = Block(*own, layout, room)
        block.write_keys(0, own[0])
        block.write_values(0, own[1])
        blocks.append(block)
        keys.append(block.read_keys(0, room)[..., :count].double())
        values.append(block.read_values(0, room)[:, :, :count].double())
    return blocks, torch.cat(keys, dim=-1), torch.cat(values, dim=2)


def run(device, query, blocks, tokens, layout, softcap=0.0):
    stored = [getattr(block, name).to(device) for block in blocks for name in STORED]
    sizes = layout.bits, layout.key_group, layout.value_group
    return [part.cpu() for part in attend.attend_packed(query.to(device), stored, tokens, *sizes, softcap)]


CASES = [(bits, (32, 32), (32, 32), (1, 1 + bits % 2), 1 + bits % 4, [32, 23]) for bits in range(1, 9)] + [
    (4, (32, 16), (80, 48), (2, 1), 1, [64, 32, 37]),  # head dims that are no powers of 2
    (3, (128, 32), (24, 32), (1, 1), 5, [128, 130]),  # groups larger than a tile
    (4, (64, 64), (64, 64), (1, 1), 17, [128, 64]),
    (2, (4, 8), (16, 8), (1, 2), 2, [60]),
    (1, (1, 1), (8, 4), (1, 1), 1, [5]),
]


@pytest.mark.parametrize(("bits", "groups", "dims", "lead", "queries", "tokens"), CASES)
def test_attention_is_that_of_float64(device, bits, groups, dims, lead, queries, tokens):
    blocks, keys, values = make(bits, groups, dims, lead, tokens, torch.bfloat16 if bits % 2 else torch.float16)
    query = torch.randn(*lead, queries, dims[0], generator=torch.Generator().manual_seed(1))
    out, top, norm = run(device, query, blocks, tokens, blocks[0].layout)
    scores = query.double() @ keys
    torch.testing.assert_close(top.double(), scores.amax(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((top + norm.log()).double(), scores.logsumexp(-1, keepdim=True), rtol=1e-4, atol=1e-4)
    expected = scores.softmax(-1) @ values
    assert ((out / norm).double() - expected).norm() < 1e-5 * expected.norm()


def test_parts_are_put_together_in_order(device, monkeypatch):
    tokens = [32, 32, 32, 7]
    blocks, _, _ = make(2, (32, 16), (16, 16), (2, 1), tokens)
    query = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(1))
    split = run(device, query, blocks, tokens, blocks[0].layout)
    again = run(device, query, blocks, tokens, blocks[0].layout)
    assert all(torch.equal(one, other) for one, other in zip(split, again, strict=True))
    monkeypatch.setattr(attend, "PROGRAMS", 1)
    whole = run(device, query, blocks, tokens, blocks[0].layout)
    for one, other in zip(split, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_there_yet_takes_no_part(device):
    blocks, _, _ = make(4, (32, 16), (16, 16), (1, 1), [64])
    query = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(1))
    expected = run(device, query, blocks, [37], blocks[0].layout)
    blocks[0].value_scale[:, :, 37:] = torch.nan
    blocks[0].value_low[:, :, 37:] = torch.inf
    blocks[0].values[:, :, 37:] = 255
    found = run(device, query, blocks, [37], blocks[0].layout)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_scores_are_capped(device):
    blocks, keys, values = make(4, (32, 16), (16, 16), (1, 1), [40])
    query = 5 * torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(1))
    out, _, norm = run(device, query, blocks, [40], blocks[0].layout, softcap=3.0)
    expected = (3 * (query.double() @ keys / 3).tanh()).softmax(-1) @ values
    assert ((out / norm).double() - expected).norm() < 1e-5 * expected.norm()


def test_what_does_not_belong_together_is_refused(device):
    blocks, _, _ = make(4, (32, 16), (16, 16), (1, 1), [32])
    query = torch.zeros(1, 1, 2, 16)
    for wrong in ((query[..., :8].contiguous(), [32]), (query, [33]), (query.double(), [32])):
        with pytest.raises(ShapeError):
            run(device, wrong[0], blocks, wrong[1], blocks[0].layout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cache_on_a_gpu_attends_by_the_kernel():
    blocks, keys, values = make(4, (32, 32), (64, 64), (1, 2), [256, 64])
    query = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(1))
    packed = [PackedBlock(*(getattr(block, name).cuda() for name in STORED), block.values.shape[2]) for block in blocks]
    assert attend_serves(query.cuda(), packed)
    found = attend_packed(query.cuda(), packed, bits=4, key_group=32, value_group=32)
    expected = (query.double() @ keys).softmax(-1) @ values
    assert ((found.out / found.norm).cpu().double() - expected).norm() < 1e-4 * expected.norm()
