"""Codebooks and mappings that learn together: the groups, the proximal gradient, and a model trained and packed."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot.core.errors import CompositionError
from pintpot.weights.formats import Codebook, Split
from pintpot.weights.learnable_codebooks import LearnableCodebooks, LearntMapping, _Chosen
from tests.architectures import tiny_model

METHOD = LearnableCodebooks(bits=3, groups=4)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stand_in(weight: torch.Tensor, method: LearnableCodebooks = METHOD) -> LearntMapping:
    return method.stand_in("w", weight, method.terms("w", *weight.shape, torch.float32))


def test_starts_at_the_nearest_entries_and_packs_what_it_shows():
    weight = numbers(24, 64)
    one = stand_in(weight).eval()
    (layout,) = METHOD.terms("w", 24, 64, torch.float32)
    (stored,) = one.terms((layout,))
    shown = one.weight().detach()
    assert torch.equal(shown, layout.decode(stored, 64, torch.float32))
    for row in range(24):
        entries = shown[row].unique()
        assert len(entries) <= 8
    assert (shown - weight).norm() < 0.25 * weight.norm()


def test_rows_of_like_spread_share_a_codebook():
    spread = torch.tensor([0.01, 1.0, 0.1, 10.0]).repeat(6)
    weight = numbers(24, 64) * spread[:, None]
    (layout,) = METHOD.terms("w", 24, 64, torch.float32)
    assert layout == Split(parts=(Codebook(vector_length=1, index_bits=3),) * 4, counts=(6,) * 4)
    one, single = stand_in(weight).eval(), stand_in(weight, LearnableCodebooks(bits=3, groups=1)).eval()
    order = one.order.view(4, 6)
    assert {tuple(sorted(set(spread[rows].tolist()))) for rows in order} == {(s,) for s in spread[:4].tolist()}
    lost, lost_alone = (((s.weight() - weight) / spread[:, None]).norm() for s in (one, single))
    assert lost < 0.3 * lost_alone


def test_the_mappings_gradient_favours_near_entries():
    entries = torch.tensor([[-3.0, -1.0, 0.0, 2.0, 7.0]], requires_grad=True)
    mapping = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]], requires_grad=True)
    first, group = torch.zeros((1, 1), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    out = _Chosen.apply(entries, mapping, first, group)
    assert out.item() == 0.0
    out.backward(torch.tensor([[-0.5]]))
    # The loss falls as the weight rises, so scores of the entries above fall's opposite, most for the nearest.
    below_far, below, own, above, above_far = mapping.grad[0, 0].tolist()
    assert own == 0
    assert above < above_far < 0 < below_far < below
    assert torch.equal(entries.grad, torch.tensor([[0.0, 0.0, -0.5, 0.0, 0.0]]))


def trained(joint: bool) -> tuple[LearntMapping, list[float]]:
    """A mapping that starts beside the wanted weight and learns it from what it does to inputs."""
    wanted = numbers(16, 32)
    one = stand_in(wanted + 0.3 * numbers(16, 32, seed=1))
    one.mapping.requires_grad_(joint)
    inputs = numbers(256, 32, seed=2)
    optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(60):
        loss = (inputs @ (one.weight() - wanted).t()).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return one, losses


def test_codebooks_and_mappings_both_learn():
    joint, losses = trained(joint=True)
    entries_alone, losses_alone = trained(joint=False)
    moved = joint.mapping.argmax(-1) != entries_alone.mapping.argmax(-1)
    assert losses[0] == losses_alone[0]
    assert losses_alone[-1] < 0.99 * losses[0]
    assert losses[-1] < 0.75 * losses_alone[-1]
    assert 0.02 < moved.float().mean() < 0.9


def test_a_model_is_trained_and_packed(tmp_path: Path):
    model = tiny_model("llama")
    skeleton = copy.deepcopy(model).to("meta")
    layout = METHOD.prepare_(model)
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))

    def packed_loss() -> float:
        with torch.no_grad():
            return float(model.eval()(input_ids=ids, labels=ids).loss)

    before = packed_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = packed_loss()
    assert after < before
    METHOD.finish_(model.eval(), layout, skeleton)
    assert abs(packed_loss() - after) < 1e-4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_small_matrices_have_fewer_codebooks():
    (few,) = LearnableCodebooks(bits=4, groups=8).terms("w", 32, 32, torch.float32)
    assert few == Split(parts=(Codebook(vector_length=1, index_bits=4),) * 2, counts=(16, 16))
    (one,) = LearnableCodebooks(bits=8, groups=8).terms("w", 32, 32, torch.float32)
    assert one == Codebook(vector_length=1, index_bits=8)


def test_refuses_what_it_cannot_do():
    with pytest.raises(CompositionError, match="candidates"):
        LearnableCodebooks(candidates=1)
