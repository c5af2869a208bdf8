"""DenseShift: signed powers of two without zero, with a latent number behind every bit."""

from pathlib import Path

import torch

from pintpot.weights import load_compressed
from pintpot.weights.denseshift import DenseShift, Shifted
from pintpot.weights.formats import LevelGrid
from pintpot.weights.trained import stand_ins
from tests.architectures import tiny_model

LAYOUT = LevelGrid(levels="pow3", group_size=16)


def weight(rows: int = 6, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def stand_in() -> Shifted:
    return Shifted(weight(), LAYOUT)


def plain_weight(made: Shifted) -> torch.Tensor:
    """The definition, number by number, in float64."""
    latent, scale = made.latent.detach().double(), made.scale().detach().double()
    out = torch.zeros(latent.shape[1:], dtype=torch.float64)
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            sign, *steps = latent[:, row, column].tolist()
            shift = 0
            for step in steps:
                shift = (shift + 1) * (step >= 0)
            out[row, column] = (1 if sign >= 0 else -1) * 2.0 ** (shift - len(steps)) * scale[row, column // 16]
    return out


def test_the_weight_is_the_definition():
    made = stand_in()
    with torch.no_grad():
        made.latent.add_(torch.randn(made.latent.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    torch.testing.assert_close(made.weight().double(), plain_weight(made), rtol=1e-5, atol=0)


def test_every_weight_is_a_signed_power_of_two_and_none_is_zero():
    made = stand_in()
    powers = (made.weight().detach() / LAYOUT.by_column(made.scale().detach(), 40)).abs().log2()
    assert set(powers.round().flatten().tolist()) == {0.0, -1.0, -2.0, -3.0}
    torch.testing.assert_close(powers, powers.round(), rtol=0, atol=1e-5)


def test_starts_at_the_nearest_levels():
    found = stand_in().weight().detach()
    scale = LAYOUT.by_column(stand_in().scale().detach(), 40)
    levels = LAYOUT.table(found.device)
    nearest = (weight()[..., None] / scale[..., None] - levels).abs().min(-1).values * scale
    torch.testing.assert_close((found - weight()).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_a_sign_turns_over_without_passing_through_small_weights():
    # The decomposition's point: one small step of the sign's latent number, and the weight is its own negative.
    made = stand_in()
    before = made.weight().detach()
    with torch.no_grad():
        made.latent[0].neg_()
    torch.testing.assert_close(made.weight().detach(), -before)


def test_gradients_are_those_of_the_gentler_function():
    made = stand_in()
    made.weight().sum().backward()
    latent = made.latent.detach().requires_grad_()
    shift = latent[1] * 0 + (latent[1].detach() >= 0)
    through = [latent[k] + ((latent[k] >= 0).float() - latent[k]).detach() for k in range(4)]
    shift = through[1]
    for step in through[2:]:
        shift = (shift + 1) * step
    gentle = (2 * through[0] - 1) * (shift + 1).sqrt() * LAYOUT.by_column(made.scale().detach(), 40) / 8
    gentle.sum().backward()
    torch.testing.assert_close(made.latent.grad, latent.grad, rtol=1e-4, atol=1e-6)
    assert made.log_scale.grad.abs().min() > 0


def test_what_is_packed_is_what_was_trained():
    made = stand_in()
    with torch.no_grad():
        made.latent.add_(torch.randn(made.latent.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
        made.log_scale.copy_(LAYOUT.settle(made.scale() * 1.1).log())
    (stored,) = made.terms((LAYOUT,))
    torch.testing.assert_close(LAYOUT.decode(stored, 40, torch.float32), made.weight().detach(), rtol=1e-5, atol=0)


def test_trains_and_loads_again(tmp_path: Path):
    model, skeleton = tiny_model("llama"), tiny_model("llama")
    method = DenseShift(shift_bits=2, group_size=32)
    layout = method.prepare_(model)
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        for made in stand_ins(model):
            made.log_scale.copy_(made.scale().half().float().log())
        trained = model(input_ids=ids).logits
    method.finish_(model, layout, skeleton)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "packed")
    again = load_compressed(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
