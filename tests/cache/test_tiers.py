"""Rows on slower tiers come back as they were, whatever is asked for, and fail with a way out."""

import copy
import gc
import os
import resource

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.cache import build_cache, cache_bytes, use_cache_attention
from pintpot.cache.kcache import KCache
from pintpot.cache.recall import Recalled
from pintpot.cache.tiers import BLOCK_TOKENS, DiskRows, HostRows, Runs, open_rows, tier_below, tier_bytes
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.ledger import Tier
from tests.architectures import tiny_model
from tests.cache.layers import normal

torch.set_num_threads(1)
B, K, W, T = 2, 3, 5, 2 * BLOCK_TOKENS + 77


def rows(dtype=torch.float32, tokens=T):
    return normal(B, K, tokens, W).to(dtype)


def filled(kind, given, pieces=(1, 200, 90, 256)):
    held = kind(given[:, :, :0])
    for piece in given.split([*pieces, given.shape[2] - sum(pieces)], dim=2):
        held.append(piece)
    return held


def everything(held):
    return torch.cat([held.block(i) for i in range(held.blocks)], dim=2)


@pytest.mark.parametrize("kind", [HostRows, DiskRows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back(kind, dtype):
    given = rows(dtype)
    held = filled(kind, given)
    assert torch.equal(everything(held), given)
    assert held.nbytes() == tier_bytes(T, K, W, B, dtype) == 3 * BLOCK_TOKENS * B * K * W * dtype.itemsize
    chosen = torch.randint(0, T, (B, K, 40), generator=torch.Generator().manual_seed(3))
    chosen[0, 0] = torch.arange(BLOCK_TOKENS - 20, BLOCK_TOKENS + 20)
    expected = given.gather(2, chosen[..., None].expand(-1, -1, -1, W))
    assert torch.equal(held.gather(chosen), expected)
    wanted = torch.rand(B, K, 40, generator=torch.Generator().manual_seed(4)) < 0.5
    out = held.gather(chosen, torch.zeros_like(expected), wanted)
    assert torch.equal(out, expected * wanted[..., None])


def test_tokens_that_follow_one_another_are_one_read():
    chosen = torch.tensor([[[5, 6, 7, 9, 255, 256, 257], [3, 2, 1, 0, 10, 11, 12]]])
    found = list(Runs.of(chosen, None))
    assert [run[:4] for run in found] == [
        (0, 0, 5, 3),
        (0, 0, 9, 1),
        (0, 0, 255, 1),
        (1, 0, 0, 2),
        *[(0, 1, token, 1) for token in (3, 2, 1, 0)],
        (0, 1, 10, 3),
    ]


@pytest.mark.parametrize("kind", [HostRows, DiskRows])
def test_sequences_change_places(kind):
    given = rows()
    held = filled(kind, given)
    other = copy.deepcopy(held)
    held.over_batch_(lambda tensor: tensor[torch.tensor([1, 1, 0])])
    more = normal(3, K, 10, W, seed=7)
    held.append(more)
    assert torch.equal(everything(held), torch.cat([given[[1, 1, 0]], more], dim=2))
    assert torch.equal(everything(other), given)


def test_what_is_recalled_again_is_not_fetched_again(monkeypatch):
    held = filled(DiskRows, rows())
    recalled, fetched = Recalled(), []
    recalled.resize(rows()[:, :, :0], 4)
    plain = DiskRows.gather
    monkeypatch.setattr(DiskRows, "gather", lambda self, c, o, w: fetched.append(int(w.sum())) or plain(self, c, o, w))
    for numbers in ([1, 2, 3, 4], [2, 3, 4, 9], [9, 4, 3, 2], [0, 500, 3, 588]):
        chosen = torch.tensor(numbers).expand(B, K, 4)
        expected = rows().gather(2, chosen[..., None].expand(-1, -1, -1, W))
        assert torch.equal(recalled.fetch(held, chosen), expected)
    assert fetched == [4 * B * K, B * K, 0, 3 * B * K]


def test_the_tier_is_below_the_device(tmp_path):
    assert tier_below("", torch.device("cuda")) is Tier.HOST
    assert tier_below("", torch.device("cpu")) is Tier.DISK
    assert tier_below("/data", torch.device("cuda")) is Tier.DISK
    held = open_rows(rows(), str(tmp_path))
    held.append(rows())
    assert isinstance(held, DiskRows)
    # The file has no name, so that nothing is left of it, whatever ends the process.
    assert list(tmp_path.iterdir()) == []
    file = held._file.fileno()
    assert os.fstat(file).st_nlink == 0
    assert os.fstat(file).st_size == held.nbytes()
    del held
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file)


def test_a_missing_folder_is_named(tmp_path):
    missing = tmp_path / "gone"
    model = tiny_model("llama")
    cache = build_cache(model.config, store=KCache(folder=str(missing)))
    with use_cache_attention(model), torch.no_grad(), pytest.raises(CompositionError, match="gone") as caught:
        model(torch.full((1, 300), 5), past_key_values=cache)
    assert "folder=" in caught.value.hint


def test_a_full_disk_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = DiskRows(rows()[:, :, :0], str(tmp_path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        held.append(rows(tokens=BLOCK_TOKENS)[:, :, :100])
        with pytest.raises(BudgetError, match="no room") as caught:
            held.append(rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in caught.value.message
    assert "folder" in caught.value.hint


def test_shapes_alone_open_no_file(monkeypatch):
    monkeypatch.setattr("pintpot.cache.tiers._open", lambda folder: pytest.fail("a rehearsal opened a file"))
    store = KCache(top_tokens=32, group_tokens=16)
    with FakeTensorMode():
        model = tiny_model("llama")
        cache = build_cache(model.config, store=store)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 222, dtype=torch.int64), past_key_values=cache)
            for count in (1, 30, 1):
                model(torch.zeros(2, count, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(model.config, 254, batch=2, store=store)
