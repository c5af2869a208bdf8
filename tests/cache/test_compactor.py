"""Compactor keeps tokens by the leverage of their keys and the attention of their block."""

import pytest
import torch
from torch import nn

from pintpot.cache._base import Call, LayerSizes, Place, Seen
from pintpot.cache.compactor import Compactor
from pintpot.cache.rotary import Rotary
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError

torch.set_num_threads(1)
B, H, K, D, T = 2, 4, 2, 16, 90


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def seen(keys, values, query, rotary=None, decided=T):
    call = Call(module=nn.Module(), query=query, scaling=0.25)
    place = Place(LayerSizes(K, D, D), rotary=rotary)
    return Seen(Tokens.consecutive(keys, values), decided, query, call, lambda: iter(()), place)


def leverage(keys):
    """The diagonal of the hat matrix of one head's centred keys (T, D), by its definition, in float64."""
    centred = keys.double() - keys.double().mean(dim=0)
    hat = centred @ torch.linalg.inv(centred.T @ centred + 1e-2 * torch.eye(D).double()) @ centred.T
    return hat.diagonal()


def standard(scores):
    return (scores - scores.mean()) / scores.std()


@pytest.mark.parametrize("with_rotary", [False, True])
def test_scores_are_leverage_and_the_attention_of_blocks(with_rotary):
    bare, values, query = normal(B, K, T, D), normal(B, K, T, D, seed=1), normal(B, H, T, D, seed=2)
    rotary = Rotary(10.0 ** -torch.arange(0, D, 2).div(D)) if with_rotary else None
    keys = bare if rotary is None else rotary.rotate(bare, torch.arange(T)[None, None])
    method = Compactor(block_tokens=40)
    found = method.score(seen(keys, values, query, rotary, decided=70))
    for b in range(B):
        expected_leverage = torch.stack([leverage(bare[b, k]) for k in range(K)])
        attention = torch.zeros(K, T, dtype=torch.float64)
        for k in range(K):
            for start in range(0, T, 40):
                here = slice(start, start + 40)
                for h in range(k * 2, k * 2 + 2):
                    weights = (query[b, h, here].double() @ keys[b, k, here].double().T * 0.25).softmax(dim=-1)
                    attention[k, here] += weights.sum(dim=0) / 2 * values[b, k, here].double().norm(dim=-1)
        padded = torch.nn.functional.pad(attention, (1, 1))
        smooth = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        expected = 0.5 * standard(expected_leverage) + standard(smooth)
        torch.testing.assert_close(found[b], expected[:, :70].float(), rtol=1e-3, atol=1e-3)


def test_a_key_in_a_direction_of_its_own_stays():
    keys = normal(B, K, T, D)
    keys[..., -1] = 0
    keys[:, :, 33, -1] = 5.0
    query = torch.zeros(B, H, 1, D)
    scores = Compactor(attention_weight=0.0).score(seen(keys, normal(B, K, T, D, seed=1), query))
    assert (scores.argmax(dim=-1) == 33).all()


def test_wide_heads_are_sketched_the_same_way_every_time():
    keys, values, query = normal(1, 2, T, 64), normal(1, 2, T, 64, seed=1), normal(1, 4, 1, 64, seed=2)
    method = Compactor(sketch_dim=24)
    first, second = (method.score(seen(keys, values, query)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, Compactor(sketch_dim=24, seed=1).score(seen(keys, values, query)))


def test_queries_that_are_not_at_hand_leave_leverage():
    keys, values = normal(B, K, T, D), normal(B, K, T, D, seed=1)
    part = Compactor().score(seen(keys, values, normal(B, H, 10, D), decided=80))
    alone = Compactor(attention_weight=0.0).score(seen(keys, values, normal(B, H, 10, D), decided=80))
    assert torch.equal(part, alone)


def test_impossible_parameters_are_refused():
    with pytest.raises(CompositionError):
        Compactor(sketch_dim=0)
