"""TransMLA: exact where nothing is left out, principal where something is, and worse only as ranks fall."""

import argparse
import ast
import inspect
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot import reference
from pintpot.cache.conversions._base import mean_loss, output_covariances
from pintpot.cache.conversions.directions import leading_directions, rotate_heads
from pintpot.cache.conversions.transmla import TransMLA
from pintpot.core.errors import DataError
from pintpot.reference.tokenizer import load_tokenizer
from tests.cache.sources import SOURCES, source, tokens

torch.set_num_threads(1)
HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM


def rotate(states, position):
    """Rotary positions of several heads in float64, by complex numbers: (..., K*D)."""
    parts = states.unflatten(-1, (-1, 2, HEAD_DIM // 2))
    angles = position * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turned = torch.complex(parts[..., 0, :], parts[..., 1, :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.stack([turned.real, turned.imag], dim=-2).flatten(-3)


def covariance(seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, WIDTH, generator=random, dtype=torch.float64)
    mixing = torch.randn(WIDTH, WIDTH, generator=random, dtype=torch.float64)
    return rows @ mixing, (rows @ mixing).T @ (rows @ mixing)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_nothing_left_out_is_the_source(name):
    model, ids = source(name), tokens()
    exact = TransMLA(rank=WIDTH, rope_dim=WIDTH).convert(model, [tokens(seed=1)])
    torch.testing.assert_close(exact(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_at_the_first_position_only_the_rank_is_an_approximation(name):
    model, ids = source(name), tokens(4, 1)
    whole = TransMLA(rank=2 * WIDTH - 8, rope_dim=8).convert(model, [tokens(seed=1)])
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)
    cut = TransMLA(rank=4, rope_dim=8).convert(model, [tokens(seed=1)])
    assert (cut(ids).logits - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("rope_dim", "fold"), [(32, 1), (16, 1), (8, 2), (8, 4), (16, 8), (32, 2), (2, 8)])
def test_the_components_are_an_orthogonal_basis(rope_dim, fold):
    rotary, plain = rotate_heads(covariance()[1], HEADS, rope_dim, fold)
    basis = torch.cat([rotary, plain], dim=1)
    assert rotary.shape == (WIDTH, rope_dim)
    torch.testing.assert_close(basis.T @ basis, torch.eye(WIDTH, dtype=torch.float64))


def test_mixing_the_heads_of_a_frequency_commutes_with_rotation():
    keys, found = covariance()
    rotary, _ = rotate_heads(found, HEADS, WIDTH, 1)
    # The table repeats all frequencies for each head: (half, head, frequency), where keys are (head, half, frequency).
    order = torch.arange(WIDTH).reshape(2, HEADS, HEAD_DIM // 2).transpose(0, 1).flatten()
    components = rotary[:, order]
    torch.testing.assert_close(rotate(keys, 7) @ components, rotate(keys @ components, 7))


def test_the_first_head_of_components_holds_the_most_of_the_keys():
    keys, found = covariance()
    rotary, plain = rotate_heads(found, HEADS, HEAD_DIM, 1)
    kept, first = (keys @ rotary).square().sum(), keys[:, :HEAD_DIM].square().sum()
    assert kept > first
    assert kept > 1.2 * (keys @ plain).square().sum()
    folded = rotate_heads(found, HEADS, HEAD_DIM, 4)[0]
    assert (keys @ folded).square().sum() > kept


def test_leading_directions_lose_the_least():
    rows, found = covariance()
    leading = leading_directions(found, 10)
    lost = (rows - rows @ leading @ leading.T).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(rows)[10:].square().sum())


@torch.no_grad()
def test_large_keys_do_not_crowd_the_values_out():
    model, texts = source("llama"), [tokens(4, 64, seed=1)]
    for block in model.model.layers:
        block.self_attn.k_proj.weight.mul_(30)
        block.self_attn.q_proj.weight.div_(30)

    def lost_values(balance):
        made = TransMLA(rank=30, rope_dim=16, freq_fold=1, balance=balance).convert(model, texts)
        attention, before = made.model.layers[0].self_attn, model.model.layers[0].self_attn
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(texts[0])).flatten(0, 1)
        latent = attention.kv_a_proj_with_mqa(hidden)[:, :30]
        values = attention.kv_b_proj(latent).unflatten(-1, (4, 32))[:, ::2, 16:].flatten(1)
        return float((values - before.v_proj(hidden)).norm() / before.v_proj(hidden).norm())

    assert lost_values(1.0) < 0.8 * lost_values(30.0)


def test_covariances_are_those_of_all_tokens():
    model, texts = source("qwen2"), [tokens(2, 9), tokens(3, 9, seed=1)]
    layer = model.model.layers[0]
    with torch.no_grad():
        seen = [layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(t))) for t in texts]
    rows = torch.cat([s.flatten(0, 1) for s in seen]).double()
    found = output_covariances(model, {"k": layer.self_attn.k_proj}, texts)["k"]
    torch.testing.assert_close(found, rows.T @ rows, rtol=1e-5, atol=1e-3)
    assert not layer.self_attn.k_proj._forward_hooks


def test_the_embedded_model_loses_little_and_more_the_less_it_keeps():
    model = AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(reference.path())
    text, held_out = (
        torch.tensor(tokenizer.encode(inspect.getsource(module)).ids[: 8 * 128]).view(1, 8, 128)
        for module in (argparse, ast)
    )
    losses = [
        mean_loss(TransMLA(rank=rank, rope_dim=rope_dim, freq_fold=1).convert(model, [*text]), [*held_out])
        for rank, rope_dim in ((64, 64), (64, 32), (32, 32))
    ]
    plain = mean_loss(model, [*held_out])
    assert math.isclose(losses[0], plain, rel_tol=1e-4)
    assert losses[0] < losses[1] < losses[2]
    assert losses[1] < 1.1 * plain


def test_text_is_needed():
    with pytest.raises(DataError, match="no text"):
        TransMLA(rank=24, rope_dim=8).convert(source("llama"), [])
