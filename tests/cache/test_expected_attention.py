"""Expected Attention scores keys by Gaussian queries at positions to come."""

import pytest
import torch

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.expected_attention import ExpectedAttention
from pintpot.cache.rotary import Rotary
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_model
from tests.cache.layers import normal
from tests.cache.seeing import SCALING, B, D, H, K, filled, place_of, seen_by, tensors

torch.set_num_threads(1)
ROTARY = Rotary(1.0 / 100.0 ** (torch.arange(0, D - 2, 2) / D), scaling=1.1)


def matrices(positions):
    """The rotation of each position as a matrix, (n, D, D), float64; the last two channels stay."""
    angles = positions[:, None].double() * ROTARY.frequencies.double()
    count = len(ROTARY.frequencies)
    out = torch.eye(D, dtype=torch.float64).repeat(len(positions), 1, 1)
    for i in range(count):
        out[:, i, i] = out[:, i + count, i + count] = angles[:, i].cos() * ROTARY.scaling
        out[:, i + count, i] = angles[:, i].sin() * ROTARY.scaling
        out[:, i, i + count] = -out[:, i + count, i]
    return out


def scores_by_definition(queries, keys, values, last, future, epsilon, rotary=True):
    """From unrotated queries (B, H, n, D) and rotated keys, token by token, in float64."""
    average = matrices(last + torch.arange(1, future + 1)).mean(dim=0) if rotary else torch.eye(D).double()
    queries = queries.double()
    mean = queries.mean(dim=2)
    spread = torch.stack([torch.stack([q.T.cov(correction=0) for q in row]) for row in queries])
    mean, spread = mean @ average.T, average @ spread @ average.T
    grouped = keys.double().repeat_interleave(H // K, dim=1)
    linear = torch.einsum("bhtd,bhd->bht", grouped, mean) * SCALING
    square = torch.einsum("bhti,bhij,bhtj->bht", grouped, spread, grouped) * SCALING**2 / 2
    weights = (linear + square).softmax(dim=-1).unflatten(1, (K, -1)).mean(dim=2)
    return (weights + epsilon) * values.double().norm(dim=-1)


def rotated(states, positions):
    return torch.einsum("tij,bhtj->bhti", matrices(positions), states.double()).float()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_scores_of_a_prompt_are_the_papers(sinks, epsilon):
    method = ExpectedAttention(future_tokens=50, epsilon=epsilon, observed_tokens=8, sink_tokens=sinks)
    query, keys, values = tensors(700)
    positions = torch.arange(700)
    query[:, :, :sinks] *= 50
    keys = rotated(keys, positions)
    seen = seen_by(method, rotated(query, positions), keys, values, sinks=sinks, rotary=ROTARY)
    expected = scores_by_definition(query[:, :, sinks:], keys[:, :, sinks:], values[:, :, sinks:], 699, 50, epsilon)
    got = method.score(seen)
    torch.testing.assert_close(got, expected[..., : got.shape[-1]].float(), rtol=1e-3, atol=1e-6)


def test_models_without_rotation_need_none():
    method = ExpectedAttention(observed_tokens=8)
    query, keys, values = tensors(130)
    got = method.score(seen_by(method, query, keys, values))
    expected = scores_by_definition(query, keys, values, 0, 1, 0.0, rotary=False)
    torch.testing.assert_close(got, expected[..., :128].float(), rtol=1e-3, atol=1e-6)


def test_token_by_token_the_last_queries_count():
    method = ExpectedAttention(observed_tokens=40, future_tokens=30, sink_tokens=4, kept_fraction=0.25)
    query, keys, values = tensors(68)
    positions = torch.arange(68)
    keys, asked = rotated(keys, positions), rotated(query, positions)
    layer = filled(method, asked, keys, values, [10, 20] + [1] * 38, place_of(rotary=ROTARY))
    expected = scores_by_definition(query[:, :, -40:], keys[:, :, 4:], values[:, :, 4:], 67, 30, 0.0)
    best = expected.topk(16).indices.sort().values + 4
    kept, _ = layer.stored.whole()
    for b in range(B):
        for k in range(K):
            assert torch.equal(kept[b, k, 4:], keys[b, k][best[b, k]])


def test_the_score_is_the_mean_over_gaussian_queries():
    method = ExpectedAttention(observed_tokens=8, sink_tokens=0)
    query, keys, values = normal(1, H, 64, D) * 0.7 + 0.3, normal(1, K, 64, D, seed=1), torch.ones(1, K, 64, D)
    seen = seen_by(method, query, keys, values)
    mean, covariance = (part.double() for part in method.statistics(seen))
    root = torch.linalg.cholesky(covariance)
    drawn = normal(1, K, H // K, 40_000, D, seed=2).double() @ root.mT + mean[..., None, :]
    received = (drawn @ keys.double()[:, :, None].mT * SCALING).exp().mean(dim=3)
    weights = (received / received.sum(dim=-1, keepdim=True)).mean(dim=2) * D**0.5
    torch.testing.assert_close(method.score(seen).double(), weights, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "phi", "gpt2"])
def test_generate(name):
    model = tiny_model(name)
    keep = ExpectedAttention(observed_tokens=16)
    cache = build_cache(model.config, keep=keep, store=KIVI(bits=8))
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    with use_cache_attention(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=70, min_new_tokens=70, do_sample=False)
    assert out.shape == (2, 220)
    assert cache.nbytes() == cache_bytes(model.config, 219, keep=keep, store=KIVI(bits=8), batch=2)


@pytest.mark.parametrize("wrong", [{"future_tokens": 0}, {"observed_tokens": 0}, {"epsilon": -1.0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        ExpectedAttention(**wrong)
    assert caught.value.hint
