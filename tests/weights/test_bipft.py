"""BiPFT: single bits times single bits, and estimates of low rank for queries, keys and values."""

import pytest
import torch
from torch.nn import functional

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.weights.bipft import OF_ATTENTION, BiPFT
from pintpot.weights.formats import Grid, LowRank, SignedInput, SignRank
from pintpot.weights.formats.signed_input import sign_of_input
from pintpot.weights.trained import stand_ins
from tests.architectures import tiny_config, tiny_model


def weight(rows: int = 12, columns: int = 20) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) + 0.1


def inputs(columns: int = 20) -> torch.Tensor:
    return torch.randn(7, columns, generator=torch.Generator().manual_seed(1))


def texts() -> torch.Tensor:
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def test_weights_are_signs_around_their_mean_times_the_mean_magnitude():
    stand_in = BiPFT().stand_in("mlp.up_proj.weight", weight(), (SignedInput(inner=SignRank()),))
    dense = weight().double()
    expected = (dense - dense.mean()).sign() * dense.abs().mean()
    torch.testing.assert_close(stand_in.weight().detach().double(), expected)


def test_inputs_are_signs_with_a_learnt_scale_and_shift():
    layout = SignedInput(inner=SignRank(rank=12))
    stored = layout.encode_with(layout.inner.encode(weight()), torch.tensor([0.7]), torch.full((20,), 0.2))
    held = layout.decode(stored, 20, torch.float32).double()
    expected = 0.7 * (inputs().double() + 0.2).sign() @ held.T
    torch.testing.assert_close(layout.matmul(inputs(), stored).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_to_inputs_within_the_scale():
    input, scale = inputs().requires_grad_(), torch.tensor([0.5], requires_grad=True)
    back = torch.randn(7, 20, generator=torch.Generator().manual_seed(2))
    to_input, to_scale = torch.autograd.grad(sign_of_input(input, scale), (input, scale), back)
    assert torch.equal(to_input, back * (input.abs() <= 0.5))
    torch.testing.assert_close(to_scale, (input.sign() * back).sum().reshape(1) / 140**0.5)


def test_only_queries_keys_and_values_have_estimates_and_these_see_the_input_itself():
    assert [
        len(BiPFT().terms(f"model.layers.0.{n}.weight", 8, 8, torch.float32)) for n in ("mlp.up_proj", "q_proj")
    ] == [
        1,
        2,
    ]
    names = ("self.query.weight", "SelfAttention.k.weight", "attn.c_attn.weight", "Wqkv.weight".lower())
    assert all(OF_ATTENTION.search(name) for name in names)
    assert not any(OF_ATTENTION.search(n) for n in ("self_attn.o_proj.weight", "attn.c_proj.weight", "mlp.fc1.weight"))

    formats = (SignedInput(inner=SignRank()), LowRank(rank=2))
    stand_in = BiPFT(rank=2).stand_in("q_proj.weight", weight(), formats).train()
    found = stand_in.product(inputs(), None).detach().double()
    scale = 2 * inputs().double().abs().mean()
    dense = weight().double()
    binary = (dense - dense.mean()).sign() * dense.abs().mean()
    left, values, right = torch.linalg.svd(dense - binary)
    estimate = (left[:, :2] * values[:2]) @ right[:2]
    expected = functional.linear(scale * inputs().double().sign(), binary) + functional.linear(
        inputs().double(), estimate
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_trained_model_is_the_same_when_packed():
    method, model, ids = BiPFT(), tiny_model("llama"), texts()
    layout = method.prepare_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    model.eval()
    assert all(stand_in.scale > 0 for stand_in in stand_ins(model))
    layer, given = (
        model.model.layers[0].self_attn.q_proj,
        torch.randn(5, 64, generator=torch.Generator().manual_seed(3)),
    )
    trained = layer(given).detach()
    report = method.finish_(model, layout, ModelShape.from_config(tiny_config("llama")).build("meta"))
    packed = model.model.layers[0].self_attn.q_proj(given).detach()
    # Scales and factors are stored with 11 bits.
    assert (packed - trained).norm() < 3e-3 * trained.norm()
    assert report.packed_bytes < report.dense_bytes / 8
    assert torch.isfinite(model(ids).logits).all()


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UnsupportedModel, match="experts"):
        BiPFT().prepare_(tiny_model("mixtral"))
    with pytest.raises(CompositionError, match="low-rank factors"):
        BiPFT().stand_in("w", torch.ones(4, 4), (Grid(),))
