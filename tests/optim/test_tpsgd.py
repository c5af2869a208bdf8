"""tpSGD against its rule written out, and that each layer learns by itself."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from pintpot.core.errors import CompositionError, ShapeError, TrainingError, UnsupportedModel
from pintpot.core.slots import check
from pintpot.ledger.tracker import Tracker
from pintpot.optim import TpSgd, TpSgdRule
from pintpot.optim._tensors import mix_seed
from pintpot.optim.tpsgd import absolute_error
from tests.architectures import tiny_model

LR, DECAY = 0.1, 0.01


def mlp(*sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def blobs(count: int = 60, classes: int = 3, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    centres = 4 * torch.randn(classes, width, generator=generator)
    return centres[labels] + 0.5 * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_twenty_steps_are_those_of_the_rule(loss):
    model = mlp(4, 6, 5, 3).double()
    inputs, labels = blobs()
    inputs = inputs.double()
    weights = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model[::2]]
    settings = {"loss": absolute_error} if loss == "l1" else {}
    optimizer = TpSgd(model, lr=LR, weight_decay=DECAY, seed=9, **settings)
    for _ in range(20):
        optimizer.step(lambda: (inputs, labels))
        hidden = inputs
        for number, (w, b) in enumerate(weights):
            last = number == 2
            outputs = hidden @ w.T + b
            outputs = outputs if last else outputs.tanh()
            generator = torch.Generator().manual_seed(mix_seed(9, number))
            projection = torch.eye(3) if last else 2 * torch.rand(3, w.shape[0], generator=generator) - 1
            error = projection.double()[labels] - outputs
            error = error.sign() if loss == "l1" else error
            delta = error if last else error * (1 - outputs**2)
            kept = 1 - LR * DECAY
            weights[number] = (
                kept * w + LR * delta.T @ hidden / len(labels),
                kept * b + LR * delta.mean(0),
            )
            hidden = outputs
    for module, (w, b) in zip(model[::2], weights, strict=True):
        torch.testing.assert_close(module.weight.detach(), w, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(module.bias.detach(), b, rtol=1e-9, atol=1e-9)


def test_it_learns_to_classify():
    model, batch = mlp(4, 16, 16, 3), blobs()
    optimizer = TpSgd(model, lr=0.1)
    losses = [float(optimizer.step(lambda: batch)) for _ in range(100)]
    assert losses[-1] < losses[0] / 3
    assert (model(batch[0]).argmax(-1) == batch[1]).float().mean() > 0.95


def test_no_layer_hears_of_those_behind_it():
    one, other = mlp(4, 8, 8, 3), mlp(4, 8, 8, 3)
    with torch.no_grad():
        other[2].weight.mul_(-3)
        other[4].weight.zero_()
    for model in (one, other):
        TpSgd(model, lr=0.1).step(blobs)
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, mlp(4, 8, 8, 3)[0].weight)


@pytest.mark.parametrize("depth", [2, 12])
def test_one_layer_is_held_at_a_time(depth):
    model = mlp(64, *[64] * depth, 3)
    inputs, labels = torch.randn(64, 64), torch.arange(64) % 3
    optimizer = TpSgd(model)
    with Tracker(samples=None) as tracker:
        tracker.register(model, optimizer)
        tracker.note()
        before = tracker.current_bytes()
        optimizer.step(lambda: (inputs, labels))
        peak = tracker.ledger().peak_bytes()
    # Inputs, two outputs, targets, error, and gradients: whatever the depth.
    assert peak - before < 9 * inputs.nbytes
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_norms_and_pooling(dtype):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    model = nn.Sequential(nn.Identity(), body, nn.Flatten(), nn.Linear(36, 3)).to(dtype)
    labels = torch.arange(24) % 3
    inputs = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 4
    inputs[range(24), 0, :, labels] += 2
    optimizer = TpSgd(model, lr=0.02)
    before = copy.deepcopy(model.state_dict())
    losses = [float(optimizer.step(lambda: (inputs.to(dtype), labels))) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_it_cannot_train_is_named():
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        TpSgdRule().optimizer(tiny_model("llama"), lr=0.1)
    with pytest.raises(UnsupportedModel, match=r"1 \(LSTM\), 2.0 \(Embedding\)"):
        TpSgd(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2), nn.Sequential(nn.Embedding(2, 2))))
    with pytest.raises(UnsupportedModel, match="without layers"):
        TpSgd(nn.Sequential(nn.Tanh()))
    with pytest.raises(CompositionError, match="does not serve finetune"):
        check([TpSgdRule()], "finetune")
    with pytest.raises(CompositionError, match="state_bits"):
        TpSgdRule().optimizer(mlp(2, 2), lr=0.1, state_bits=8)


def test_batches_that_make_no_sense():
    with pytest.raises(TrainingError, match="batch"):
        TpSgd(mlp(4, 3)).step()
    with pytest.raises(TrainingError, match="batch"):
        TpSgd(mlp(4, 3)).step(lambda: torch.ones(1))
    with pytest.raises(ShapeError, match="last output"):
        TpSgd(nn.Sequential(nn.Conv1d(1, 3, 2))).step(lambda: (torch.ones(2, 1, 5), torch.zeros(2, dtype=torch.long)))
    model = mlp(4, 3)
    with pytest.raises(TrainingError, match="NaN"):
        TpSgd(model).step(lambda: (torch.full((2, 4), float("nan")), torch.zeros(2, dtype=torch.long)))
    assert model[0].weight.isfinite().all()


def test_same_seed_same_run_and_resume():
    runs = []
    for resume in (False, False, True):
        model = mlp(4, 8, 3)
        optimizer = TpSgd(model, lr=0.1, seed=2)
        for _ in range(2):
            optimizer.step(blobs)
        if resume:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = TpSgd(model, lr=0.5, seed=2)
            optimizer.load_state_dict(saved)
        torch.randn(3)
        optimizer.step(blobs)
        runs.append([p.detach().clone() for p in model.parameters()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
