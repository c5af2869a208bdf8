"""Scales in 8-bit floats, inputs in 8-bit floats, and keys whose pairs of rotary channels have one size."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.ledger import Account
from pintpot.kernels import native
from pintpot.ledger.tracker import Tracker
from pintpot.weights import load_and_compress
from pintpot.weights.fireq import FireQ, channel_scales
from pintpot.weights.formats import Float8Scales
from pintpot.weights.formats.float8_input import round_to_float8
from pintpot.weights.paused import PausedPass
from tests.architectures import tiny_model

TEXTS = [torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(s)) for s in range(2)]


def keys_of(model) -> torch.Tensor:
    """What the first key projection gives, (tokens, K, 2, D / 2)."""
    attention = model.model.layers[0].self_attn
    seen = []
    handle = attention.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with torch.no_grad():
        for text in TEXTS:
            model(text)
    handle.remove()
    return torch.cat([keys.flatten(0, 1) for keys in seen]).unflatten(-1, (-1, 2, attention.head_dim // 2))


def spiky(architecture: str = "llama"):
    """A model whose keys have a few channels far larger than the others."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[::5] *= 20
            if layer.self_attn.k_proj.bias is not None:
                layer.self_attn.k_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def rearranged(model):
    changed, method = copy.deepcopy(model), FireQ()
    with torch.no_grad(), PausedPass(changed, TEXTS) as paused:
        for name in paused:
            method.rearrange_block_(changed.get_submodule(name), paused.calls)
            paused.advance()
    return changed


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_pairs_of_keys_get_one_size_and_the_model_stays_what_it_was(architecture):
    model = spiky(architecture)
    changed = rearranged(model)
    with torch.no_grad():
        torch.testing.assert_close(changed(TEXTS[0]).logits, model(TEXTS[0]).logits, rtol=1e-4, atol=1e-4)
    before, after = (keys_of(m).norm(dim=2).amax(0) for m in (model, changed))
    assert before.max() > 5 * before.min()
    torch.testing.assert_close(after, torch.ones_like(after), rtol=1e-4, atol=1e-4)


def test_smooth_keys_lose_less_in_four_bits():
    """What a cache that rounds each key's channels together leaves of the scores, relative to their size."""
    errors = []
    for model in (spiky(), rearranged(spiky())):
        keys = keys_of(model).flatten(2)
        step = keys.abs().amax(-1, keepdim=True) / 7
        wrong = ((keys / step).round() * step - keys).square().mean((0, 1))
        errors.append(float((wrong / keys.square().mean((0, 1))).mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_keys_without_positions_or_with_norms_after_the_projection_are_left_alone(architecture):
    model = tiny_model(architecture)
    changed = rearranged(model).state_dict()
    assert all(torch.equal(changed[name], tensor) for name, tensor in model.state_dict().items())


def test_a_scale_takes_a_byte_and_does_not_underflow():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    layout = Float8Scales(bits=4, group_size=16)
    assert layout.nbytes(8, 64) == 8 * (32 + 4) + 4
    # Far below what e4m3 holds: the matrix's own scale takes it up, and as a power of two it changes no code.
    plain, tiny = layout.encode(weight), layout.encode(weight * 2.0**-20)
    assert torch.equal(plain["packed"], tiny["packed"])
    assert torch.equal(plain["scale"], tiny["scale"])
    scale = plain["scale"].view(torch.float8_e4m3fn).double() * plain["whole"].double()
    codes = (weight.double() / scale.repeat_interleave(16, 1)).round().clamp(-8, 7)
    held = layout.decode(plain, 64, torch.float32)
    torch.testing.assert_close(held.double(), codes * scale.repeat_interleave(16, 1), rtol=1e-6, atol=0)
    assert (held - weight).abs().max() < 0.6 * scale.max()
    assert not layout.decode(layout.encode(torch.zeros(8, 64)), 64, torch.float32).any()


def test_inputs_are_rounded_to_three_bits_of_mantissa():
    numbers = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1], [1e3], [0], [9]]
    )
    rounded = round_to_float8(numbers)
    scale = numbers.abs().amax(-1, keepdim=True) / 448
    normal = numbers.abs() > scale * 2.0**-6
    assert ((rounded - numbers).abs()[normal] <= numbers.abs()[normal] * 2.0**-4).all()
    assert not torch.equal(rounded, numbers)
    assert round_to_float8(numbers.bfloat16()).dtype is torch.bfloat16


def test_input_channels_are_brought_to_one_range():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0.5, 32)
    weight[:, 3] = 0
    ranges = (weight / channel_scales(weight)).abs().amax(0)
    assert ranges[3] == 0
    ranges = ranges[torch.arange(32) != 3]
    torch.testing.assert_close(ranges, ranges[:1].expand(31))


def test_the_folder_gives_the_same_model(tmp_path):
    model = spiky()
    with torch.no_grad():
        dense = model(TEXTS[0]).logits
    model.save_pretrained(tmp_path)
    packed = load_and_compress(tmp_path, FireQ(bits=8, group_size=32), texts=TEXTS)
    with torch.no_grad():
        error = (packed(TEXTS[0]).logits - dense).norm() / dense.norm()
    assert 0 < error < 0.1


def test_settings_are_checked():
    with pytest.raises(ShapeError, match="at least 2 bits"):
        FireQ(bits=1)
    with pytest.raises(CompositionError, match="size 0"):
        FireQ(key_size=0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_with_few_inputs_read_packed_integers(bits):
    """The compiled product where there is one, without dense rows, and near to float64 either way."""
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0))
    layout = Float8Scales(bits=bits, group_size=32)
    stored = layout.encode(weight)
    dense = layout.decode(stored, 100, torch.float64)
    for rows in (1, 8, 40):
        input = torch.randn(rows, 100, generator=torch.Generator().manual_seed(1))
        exact = input.double() @ dense.T
        torch.testing.assert_close(layout.matmul(input, stored).double(), exact, rtol=1e-4, atol=1e-4)
    if native.library() is not None:
        with FlopCounterMode(display=False) as counter:
            layout.matmul(torch.ones(1, 100), stored)
        assert list(counter.get_flop_counts()["Global"]) == [torch.ops.pintpot.grid_matmul]
        with Tracker(device="cpu") as tracker:
            tracker.assign(stored, Account.WEIGHTS)
            layout.matmul(torch.ones(1, 100), stored)
        # Scales in float32, and the output.
        assert tracker.ledger().peak_of(Account.WORKSPACE) <= 2 * 4 * stored["scale"].numel() + 4 * (24 + 100)
