"""OneBit: signs that turn over in training, directions that are distilled, and a model that is packed afterwards."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.weights.formats import Grid, SignRank
from pintpot.weights.onebit import OneBit, SignDistillation, SignOf
from pintpot.weights.trained import stand_ins
from tests.architectures import tiny_config, tiny_model


def texts() -> torch.Tensor:
    return torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def skeleton(name: str) -> torch.nn.Module:
    return ModelShape.from_config(tiny_config(name)).build("meta")


def test_the_start_is_the_decomposition_into_signs_and_one_magnitude_a_row_and_column():
    dense = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    start = OneBit().stand_in("w", dense, (SignRank(),)).weight().detach().double()
    left, values, right = torch.linalg.svd(dense.double().abs(), full_matrices=False)
    expected = dense.double().sign() * values[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-5)


def test_signs_have_the_gradient_of_tanh():
    latent = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(SignOf.apply(latent).sum(), latent)
    torch.testing.assert_close(found, 1.001 - latent.detach().tanh() ** 2)
    assert SignOf.apply(torch.zeros(1)).item() == 1


def test_the_loss_is_the_divergence_and_the_distance_of_directions():
    student, teacher, ids = tiny_model("llama"), tiny_model("llama"), texts()
    torch.nn.init.normal_(student.lm_head.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(student.model.layers[0].mlp.down_proj.weight, generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[1, 10:] = -100
    found = SignDistillation(student, teacher, 0.01, 2.0)(ids, labels).loss
    with torch.no_grad():
        one, other = (m(input_ids=ids, output_hidden_states=True) for m in (student, teacher))
    expected = torch.zeros((), dtype=torch.float64)
    for text, place in ((t, p) for t in range(2) for p in range(24)):
        if place < 23 and labels[text, place + 1] != -100:
            taught, learnt = (o.logits[text, place].double().log_softmax(-1) for o in (other, one))
            expected += 0.01 * (taught.exp() * (taught - learnt)).sum() / 2
        if labels[text, place] != -100:
            for layer in range(2):
                a, b = (o.hidden_states[layer][text, place].double() for o in (other, one))
                expected += 2.0 * (a / a.norm() - b / b.norm()).square().sum() / (24 + 10)
    assert expected > 0
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert SignDistillation(teacher, teacher, 0.01, 1.0)(ids, ids).loss < 1e-6


def test_training_turns_signs_over_and_the_packed_model_is_the_trained_one(tmp_path: Path):
    method, model = OneBit(), tiny_model("llama")
    teacher = copy.deepcopy(model)
    layout = method.prepare_(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("latent")}
    objective = method.objective(model, teacher)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(12):
        loss = objective(texts(), texts()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turned = sum(int((p.sign() != before[n].sign()).sum()) for n, p in model.named_parameters() if n in before)
    assert losses[-1] < 0.8 * losses[0]
    assert turned > 100

    trained = model(texts()).logits.detach()
    report = method.finish_(model.eval(), layout, skeleton("llama"))
    packed = model(texts()).logits.detach()
    # Magnitudes are stored with 11 bits.
    assert (packed - trained).norm() < 0.01 * trained.norm()
    assert report.packed_bytes < report.dense_bytes / 16
    assert not list(stand_ins(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(texts()).logits, packed)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UnsupportedModel, match="experts"):
        OneBit().prepare_(tiny_model("mixtral"))
    with pytest.raises(CompositionError, match="signs and factors"):
        OneBit().stand_in("w", torch.ones(4, 4), (Grid(),))
