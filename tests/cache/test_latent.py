"""Latent attention against its definition in float64, head by head and token by token."""

import pytest
import torch

from pintpot.cache.conversions import LatentConfig, LatentForCausalLM
from pintpot.cache.conversions.latent import stored_numbers
from tests.cache.sources import tokens

torch.set_num_threads(1)
HIDDEN, HEADS, HEAD_DIM, NOPE, RANK = 64, 4, 16, 12, 20


def model_of(rope_dim, **changes):
    settings = {
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": rope_dim,
        "kv_lora_ranks": [RANK, 0],
        "attention_bias": True,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentForCausalLM(LatentConfig(**settings)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def angles(rope_dim, position):
    """The rotary key's angles: every n-th frequency, or all of them n times."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    chosen = frequencies[:: HEAD_DIM // rope_dim] if rope_dim < HEAD_DIM else frequencies.repeat(rope_dim // HEAD_DIM)
    return position * chosen


def turned(vector, rope_dim, position):
    real, imaginary = vector.chunk(2, dim=-1)
    turn = angles(rope_dim, position)
    return torch.cat([real * turn.cos() - imaginary * turn.sin(), real * turn.sin() + imaginary * turn.cos()], dim=-1)


def defined(attention, hidden, rope_dim):
    """The layer's output for one sequence (T, E), by its definition."""
    attention = attention.double()
    down = attention.kv_a_proj_with_mqa(hidden)
    up = attention.kv_b_proj(down[:, :RANK]).view(-1, HEADS, NOPE + HEAD_DIM)
    query = attention._query(hidden).view(-1, HEADS, NOPE + rope_dim)
    heads = []
    for head in range(HEADS):
        rows = []
        for now in range(len(hidden)):
            rotary = turned(query[now, head, NOPE:], rope_dim, now)
            scores = torch.stack(
                [
                    query[now, head, :NOPE] @ up[then, head, :NOPE] + rotary @ turned(down[then, RANK:], rope_dim, then)
                    for then in range(now + 1)
                ]
            )
            rows.append((scores / HEAD_DIM**0.5).softmax(0) @ up[: now + 1, head, NOPE:])
        heads.append(torch.stack(rows))
    return attention.o_proj(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("rope_dim", "q_rank"), [(8, 0), (4, 24), (16, 0), (32, 0)])
@torch.no_grad()
def test_both_ways_of_attending_follow_the_definition(rope_dim, q_rank, implementation):
    model = model_of(rope_dim, q_lora_ranks=[q_rank, 0])
    model.set_attn_implementation(implementation)
    ids = tokens(1, 7)
    attention, taken = model.model.layers[0].self_attn, []

    def take(module, arguments, named, output):
        taken[:] = [named["hidden_states"], output[0]]

    handle = attention.register_forward_hook(take, with_kwargs=True)
    model(ids)
    handle.remove()
    hidden, output = taken
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    one_by_one = model(ids[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(one_by_one, model(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)
    expected = defined(attention, hidden[0].double(), rope_dim)
    torch.testing.assert_close(output[0].double(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_cache_holds_latents_in_converted_layers_and_keys_and_values_in_the_others():
    model = model_of(8)
    layers = model(tokens(2, 10), use_cache=True).past_key_values.layers
    shapes = [tuple(tuple(t.shape) for t in (layer.keys, layer.values)) for layer in layers]
    assert shapes == [((2, 1, 10, RANK), (2, 1, 10, 8)), ((2, 2, 10, HEAD_DIM), (2, 2, 10, HEAD_DIM))]
    assert stored_numbers(model.config) == RANK + 8 + 2 * 2 * HEAD_DIM


def test_gradients_reach_every_parameter():
    model = model_of(8, q_lora_ranks=[24, 0])
    model(tokens(), labels=tokens()).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "k_proj" not in name
    )


def test_wrapped_projections_are_not_absorbed():
    class Wrapped(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = model_of(8)
    attention = model.model.layers[0].self_attn
    wrapped = Wrapped(RANK, attention.kv_b_proj.out_features, bias=False)
    wrapped.weight = attention.kv_b_proj.weight
    attention.kv_b_proj = wrapped
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last, model(ids).logits[:, -1:], atol=1e-4, rtol=1e-4)
