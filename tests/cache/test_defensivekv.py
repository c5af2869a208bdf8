"""DefensiveKV and its layer version go by the worst case over recent queries, not by the mean."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes
from pintpot.cache.defensivekv import DefensiveKV, output_weight, smooth_weights
from pintpot.cache.layer_defensivekv import LayerDefensiveKV
from pintpot.core.errors import CompositionError, UnsupportedModel
from tests.architectures import tiny_model
from tests.cache.layers import cascaded, normal
from tests.cache.seeing import B, D, H, K, all_weights, seen_by, tensors

torch.set_num_threads(1)
WINDOW = 32


def projection(seed=9):
    linear = torch.nn.Linear(H * D, 16, bias=True)
    linear.weight.data.copy_(normal(16, H * D, seed=seed))
    return linear


def one_by_one(projected, query, keys, values, decided, kernel_size, mass, survivors):
    """Scores of the authors, head by head and query by query, in float64."""
    weights = all_weights(query, keys)[..., -WINDOW:, :decided]
    worst = torch.zeros(B, K, decided, dtype=torch.float64)
    for rows in weights.movedim(-2, 0).movedim(3, 0).flatten(0, 1):
        smooth = torch.zeros_like(rows)
        for i in range(decided):
            near = slice(max(0, i - kernel_size // 2), i + kernel_size // 2 + 1)
            smooth[..., i] = rows[..., near].sum(dim=-1) / kernel_size
        smooth *= rows.sum(dim=-1, keepdim=True) / smooth.sum(dim=-1, keepdim=True)
        worst = torch.maximum(worst, smooth)
    risk = torch.maximum(worst, worst.mean(dim=-1, keepdim=True))
    matrix = projected.weight.detach().double().T.unflatten(0, (H, D))
    lengths = values[:, :, :decided].double().repeat_interleave(H // K, dim=1) @ matrix
    lengths = lengths.abs().sum(dim=-1).unflatten(1, (K, -1)).mean(dim=2)
    risk = risk * lengths / lengths.sum(dim=1, keepdim=True)
    top, mean = risk.amax(dim=(1, 2)), weights.mean(dim=(2, 3))
    for b in range(B):
        for k in range(K):
            held = 1 - float(mean[b, k].sum())
            for rank, i in enumerate(mean[b, k].argsort(descending=True).tolist()):
                held += float(mean[b, k, i])
                if held >= mass or rank == survivors:
                    break
                risk[b, k, i] = top[b]
    return risk


@pytest.mark.parametrize("tokens", [150, 620])
@pytest.mark.parametrize("mass", [0.0, 0.9])
def test_scores_are_those_of_the_whole_attention_matrix(tokens, mass):
    method, linear = DefensiveKV(kept_fraction=0.25, attention_mass=mass), projection()
    query, keys, values = tensors(tokens)
    seen = seen_by(method, query * 3, keys, values, module=linear)
    survivors = method.decided(tokens)[1]
    expected = one_by_one(linear, query * 3, keys, values, seen.decided, 5, mass, survivors)
    torch.testing.assert_close(method.score(seen), expected.float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_smoothing_does_not_depend_on_the_pieces(kernel_size):
    method = DefensiveKV(kernel_size=kernel_size)
    seen = seen_by(method, *tensors(1200))
    pairs = list(smooth_weights(seen, kernel_size))
    weights, smooth = (torch.cat(parts, dim=-1) for parts in zip(*pairs, strict=True))
    rows = weights.flatten(0, 3)[:, None]
    expected = torch.nn.functional.avg_pool1d(rows, kernel_size, stride=1, padding=kernel_size // 2)
    assert len(pairs) == 3
    torch.testing.assert_close(smooth.flatten(0, 3)[:, None], expected)


def test_a_token_that_one_query_wants_outranks_what_all_want_a_little():
    method = DefensiveKV(kept_fraction=1 / 64, kernel_size=1, attention_mass=0.0)
    query, keys, values = tensors(96)
    one, two = torch.eye(D)[:2]
    query, keys = torch.zeros_like(query), keys * 0.01
    keys[:, :, 20], keys[:, :, 50] = one * 6, two * 6
    query[:, :, -WINDOW:] = two
    query[:, :, -7] = one * 6 - two
    seen = seen_by(method, query, keys, values, module=projection())
    assert (all_weights(query, keys)[..., -WINDOW:, :].mean(dim=(2, 3)).argmax(dim=-1) == 50).all()
    assert (method.score(seen).argmax(dim=-1) == 20).all()


def test_low_risks_are_corrected_to_the_mean_so_that_values_decide():
    method = DefensiveKV(attention_mass=0.0)
    query, keys, values = tensors(96)
    seen = seen_by(method, torch.zeros_like(query), torch.zeros_like(keys), values, module=projection())
    inside = method.score(seen)[..., 4:-4]
    shares = inside.sum(dim=1)
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares))


def test_the_output_projection_is_found_whatever_its_kind_and_name():
    module, plain = torch.nn.Module(), projection()
    module.c_proj = Conv1D(16, H * D)
    module.c_proj.weight.data.copy_(plain.weight.T)
    other = torch.nn.Module()
    other.dense = plain
    assert torch.equal(output_weight(module), output_weight(other))
    with pytest.raises(UnsupportedModel) as caught:
        output_weight(torch.nn.Module())
    assert caught.value.hint


def test_layers_get_by_their_share_of_the_highest_risks():
    keep = LayerDefensiveKV(kept_fraction=0.25, attention_mass=0.0)
    query, keys, values = tensors(WINDOW + 128)
    layers = cascaded(keep, 3, LayerSizes(K, D, D, H))
    for number, layer in enumerate(layers):
        # The middle layer looks at few tokens sharply; the others look at all of them alike.
        sharp = 8.0 if number == 1 else 0.1
        keyed = keys.clone()
        handle, _ = layer.update(keyed, values)
        module = torch.nn.Module()
        module.num_key_value_groups, module.o_proj = H // K, projection()
        layer.attend(handle, seen_by(keep, query * sharp, keyed, values, module=module.o_proj).call)
    held = [layer.stored.tokens for layer in layers]
    assert sum(held) == 3 * keep.decided(WINDOW + 128)[1]
    assert held[1] > 2 * max(held[0], held[2])


@pytest.mark.parametrize("kind", [DefensiveKV, LayerDefensiveKV])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi", "gemma2"])
def test_generate(kind, name):
    model = tiny_model(name)
    cache = build_cache(model.config, keep=kind(), store=KIVI(bits=8))
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(0))
    with use_cache_attention(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 154)
    assert cache.nbytes() == cache_bytes(model.config, 153, keep=kind(), store=KIVI(bits=8), batch=2)


@pytest.mark.parametrize("wrong", [{"attention_mass": 1.5}, {"kernel_size": 4}, {"window_tokens": 0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(CompositionError) as caught:
        DefensiveKV(**wrong)
    assert caught.value.hint
