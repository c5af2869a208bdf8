"""LeoAM finds the chunks that may hold large scores by bounds on their keys, from large chunks to small ones."""

import pytest
import torch

from pintpot.cache.leoam import Abstracts, LeoAM
from pintpot.core.errors import CompositionError
from tests.cache.recalling import B, D, H, K, attended, exact, filled, numbers_of, tensors

torch.set_num_threads(1)
SMALL = {"chunk_tokens": 16, "least_tokens": 4, "recent_tokens": 8}


def test_no_score_is_above_its_bound():
    query, keys, _ = tensors(64)
    grouped = query[:, :, -1].unflatten(1, (K, -1))
    scores = (grouped.double() @ keys.double().transpose(-1, -2)).amax(dim=2)
    for size in (4, 16):
        bounds = Abstracts.of(keys, size).bounds(grouped)
        assert (bounds.double() >= scores.unflatten(-1, (-1, size)).amax(dim=-1) - 1e-5).all()
    single = Abstracts.of(keys, 1).bounds(grouped)
    torch.testing.assert_close(single.double(), scores, rtol=1e-5, atol=1e-5)


def test_larger_chunks_follow_from_smaller_ones():
    keys = tensors(64)[1]
    small, large = Abstracts.of(keys, 4), Abstracts.of(keys, 16)
    chosen = torch.tensor([3, 0]).expand(B, K, 2)
    joined = small.joined(chosen, 4)
    assert torch.equal(joined.low, large.low[:, :, [3, 0]])
    assert torch.equal(joined.high, large.high[:, :, [3, 0]])


def test_one_important_token_is_found_in_a_desert():
    query, keys, values = tensors(8 + 160)
    keys = keys * 0.01
    keys[:, :, 77] = 5.0
    layer, _ = filled(LeoAM(budget_tokens=8, **SMALL), query, keys, values, [8 + 160])
    found = numbers_of(attended(layer, torch.ones(B, H, 1, D))[0], keys)
    assert found[:, :, 76:80].all()
    assert (found[:, :, :160].sum(dim=-1) == 8).all()
    assert found[:, :, 160:].all()


def test_chunks_that_promise_nothing_are_not_looked_into(monkeypatch):
    """The work of a query depends on its budget: only the large chunks are all looked at."""
    query, keys, values = tensors(8 + 320)
    layer, _ = filled(LeoAM(budget_tokens=8, **SMALL), query, keys, values, [8 + 320])
    seen, plain = [], Abstracts.bounds
    monkeypatch.setattr(Abstracts, "bounds", lambda self, q: seen.append(self.low.shape[2]) or plain(self, q))
    attended(layer, query[:, :, -1:])
    assert seen == [320 // 16, 4, 4]


def test_up_to_the_budget_nothing_is_lost():
    query, keys, values = tensors(250)
    layer, out = filled(LeoAM(budget_tokens=256, **SMALL), query, keys, values, [90, 1, 100, *[1] * 59])
    assert layer.state.rows.tokens == 240
    for t in (90, 191, 249):
        expected = exact(query[:, :, t : t + 1], keys[:, :, : t + 1], values[:, :, : t + 1])
        torch.testing.assert_close(out[:, t : t + 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_attention_is_exact_over_what_is_recalled():
    query, keys, values = tensors(250)
    layer, _ = filled(LeoAM(budget_tokens=32, **SMALL), query, keys, values, [249])
    chosen = numbers_of(attended(layer, query[:, :, -1:])[0], keys)
    chosen[:, :, 249] = True
    _, out = filled(LeoAM(budget_tokens=32, **SMALL), query, keys, values, [249, 1])
    torch.testing.assert_close(
        out[:, -1:].double(), exact(query[:, :, -1:], keys, values, chosen), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "wrong", [{"least_tokens": 24}, {"chunk_tokens": 48}, {"budget_tokens": 100}, {"recent_tokens": -1}]
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        LeoAM(**wrong)
    assert caught.value.hint
