"""QFX: fixed point whose binary points are trained."""

from pathlib import Path

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.weights import load_compressed
from pintpot.weights.formats import Grid, StaticInput
from pintpot.weights.qfx_fixed_point import POINT_RATE, QFX, FixedPoint, cast, words_with
from tests.architectures import tiny_model

LAYOUT = StaticInput(inner=Grid(bits=6, group_size=-1, symmetric=True), bits=8)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_cast(x: float, bits: int, point: int) -> float:
    """Shift left, round to even, saturate, shift back: in whole numbers."""
    word = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(x * 2**point)))
    return word / 2**point


@pytest.mark.parametrize("point", [-1, 2, 5])
def test_cast_is_the_definition(point):
    x = numbers(200) * 4
    found = cast(x, torch.tensor(float(point)), 6)
    assert found.tolist() == [plain_cast(v, 6, point) for v in x.tolist()]


def test_the_point_learns_from_overflow_and_from_coarseness():
    # Too many fractional bits cut numbers off, too few lose detail: the gradient of the error points the right way.
    x = numbers(1000)
    for start, better in ((6.0, -1), (0.0, 1)):
        point = torch.tensor(start, requires_grad=True)
        (cast(x, point, 6) - x).square().mean().backward()
        assert -point.grad.sign() == better


def test_training_finds_a_better_point():
    made = FixedPoint(numbers(8, 32), LAYOUT)
    with torch.no_grad():
        made.point += 3 / POINT_RATE
    optimizer = torch.optim.Adam([made.point], lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (made.weight() - numbers(8, 32)).square().sum()
        loss.backward()
        optimizer.step()
    start = FixedPoint(numbers(8, 32), LAYOUT)
    assert round(made.point.item() * POINT_RATE) == round(start.point.item() * POINT_RATE)


def test_words_with_few_ones():
    assert words_with(4, 1) == (0.0, 1.0, 2.0, 4.0)
    assert words_with(4, 2) == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    found = cast(numbers(500) * 3, torch.tensor(3.0), 8, most_ones=2) * 8
    assert all(int(abs(n)).bit_count() <= 2 and n == int(n) for n in found.tolist())
    every = torch.tensor(words_with(8, 2))
    codes = (numbers(500) * 3 * 8).clamp(-128, 127)
    nearest = (codes.abs()[:, None] - every).abs().min(1).values
    torch.testing.assert_close((found - codes).abs(), nearest, rtol=0, atol=1e-4)


def test_the_input_is_fitted_to_the_first_batch_and_stays_as_it_is_before():
    made = FixedPoint(numbers(8, 32), LAYOUT)
    x = numbers(4, 32, seed=1)
    assert torch.equal(made.eval().input(x), x)
    made.train().input(x)
    point = round(made.input_point.item() * POINT_RATE)
    assert x.abs().max() * 2**point <= 127 < x.abs().max() * 2 ** (point + 1)
    assert made.input(x).tolist() == [[plain_cast(v, 8, point) for v in row] for row in x.tolist()]


def test_refuses_what_is_no_word():
    with pytest.raises(CompositionError, match="no negative number"):
        QFX(most_ones=-1)


def test_trains_and_loads_again(tmp_path: Path):
    model, skeleton = tiny_model("gpt2").train(), tiny_model("gpt2")
    method = QFX(bits=5, most_ones=2)
    layout = method.prepare_(model)
    ids = torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
    method.finish_(model, layout, skeleton)
    with torch.no_grad():
        packed = model(input_ids=ids).logits
    torch.testing.assert_close(packed, trained, rtol=1e-3, atol=1e-3)
    linear = model.transformer.h[0].attn.c_attn
    assert (linear.term0_inner_scale.float().log2() % 1 == 0).all()
    assert float(linear.term0_input_step.log2()) % 1 == 0
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "packed")(input_ids=ids).logits, packed)
