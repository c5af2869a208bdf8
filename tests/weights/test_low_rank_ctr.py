"""Low-rank CTR on a small click model: tables and layers shrink by their outputs, and clicks are told as well."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.weights.factorised import leading_factors
from pintpot.weights.low_rank_ctr import LowRankCTR

FIELDS, VALUES, WIDTH = 5, 200, 16


class ClickModel(nn.Module):
    """One table for each field, and a network that reads their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VALUES, WIDTH) for _ in range(FIELDS))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.01)
        self.layers = nn.Sequential(nn.Linear(FIELDS * WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.click = nn.Linear(64, 1)

    def forward(self, fields: Tensor) -> Tensor:
        rows = torch.cat([table(fields[:, i]) for i, table in enumerate(self.tables)], -1)
        return self.click(self.layers(rows))[:, 0]


def clicks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fields whose values are taken unevenly, and clicks that follow three hidden numbers of each value."""
    hidden = torch.randn(FIELDS, VALUES, 3, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    fields = (torch.rand(count, FIELDS, generator=generator).square() * VALUES).long()
    each = torch.stack([hidden[i, fields[:, i]] for i in range(FIELDS)], 1)
    score = each[:, :, 0].sum(1) + (each[:, 0] * each[:, 1]).sum(1) + each[:, 2, 1].sin()
    return fields, (score + 0.5 * torch.randn(count, generator=generator) > 0).float()


def auc(model: nn.Module) -> float:
    fields, clicked = clicks(4000, 2)
    with torch.no_grad():
        order = model(fields).argsort()
    ranks = torch.empty(len(order)).scatter_(0, order, torch.arange(1.0, len(order) + 1))
    yes = float(clicked.sum())
    return (float(ranks[clicked > 0].sum()) - yes * (yes + 1) / 2) / (yes * (len(order) - yes))


@pytest.fixture(scope="module")
def trained() -> ClickModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ClickModel()
    fields, clicked = clicks(16000, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        part = slice(step % 32 * 500, step % 32 * 500 + 500)
        loss = nn.functional.binary_cross_entropy_with_logits(model(fields[part]), clicked[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_three_times_smaller_and_clicks_are_told_as_well(trained):
    model = copy.deepcopy(trained)
    before = auc(model)
    report = LowRankCTR(kept_fraction=0.3).factorise_network_(model, [clicks(2000, 1)[:1]])
    assert before > 0.75
    assert auc(model) > before - 0.03
    assert sum(p.nbytes for p in model.parameters()) == report.packed_bytes < report.dense_bytes / 3
    assert len(report.compressed) == FIELDS + 2
    assert isinstance(model.click, nn.Linear)


def test_outputs_lose_less_than_by_the_weight_alone(trained):
    model, fields = copy.deepcopy(trained), clicks(2000, 1)[0]
    table, layer = model.tables[0], model.layers[0]
    LowRankCTR(kept_fraction=0.3).factorise_network_(model, [(fields,)])
    with torch.no_grad():
        rows = torch.cat([t(fields[:, i]) for i, t in enumerate(trained.tables)], -1)
        for old, new, given in ((table, model.tables[0], fields[:, 0]), (layer, model.layers[0], rows)):
            wanted = old(given)
            rank = new[1].in_features
            left, right = leading_factors(old.weight, rank)
            blind = (left @ right)[given] if old is table else nn.functional.linear(given, left @ right, old.bias)
            assert (new(given) - wanted).square().sum() < 0.95 * (blind - wanted).square().sum()


def test_by_the_covariance_of_outputs_to_double_precision():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 16)
    inputs = torch.randn(300, 24, generator=generator) + 1
    layer.weight.data = torch.randn(16, 24, generator=generator)
    network = nn.Sequential(layer)
    outputs = layer(inputs).detach().double()
    LowRankCTR(kept_fraction=0.6).factorise_network_(network, [inputs])
    mean = outputs.mean(0)
    _, _, directions = torch.linalg.svd(outputs - mean, full_matrices=False)
    rank = network[0][1].in_features
    wanted = mean + (outputs - mean) @ directions[:rank].T @ directions[:rank]
    torch.testing.assert_close(network(inputs).double(), wanted, rtol=1e-4, atol=1e-4)


def test_refusals(trained):
    with pytest.raises(ShapeError, match="share of each layer's bytes"):
        LowRankCTR(kept_fraction=1.5)
    with pytest.raises(CompositionError, match="there is none"):
        LowRankCTR().factorise_network_(copy.deepcopy(trained), [])
    with pytest.raises(UnsupportedModel, match="gets smaller"):
        LowRankCTR().factorise_network_(nn.Sequential(nn.ReLU()), [torch.ones(1)])


def test_what_must_stay_stays_and_data_of_any_form_is_taken(trained):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(trained)
            self.never = nn.Linear(64, 64)
            self.padded = nn.Embedding(VALUES, WIDTH, padding_idx=0)

        def forward(self, fields: Tensor) -> Tensor:
            return self.inner(fields) + self.padded(fields[:, 0]).sum(-1)

    model = Wrapped().train()
    report = LowRankCTR().factorise_network_(model, [{"fields": clicks(500, 1)[0]}])
    assert report.left_dense == (("never.weight", "the data never reaches it"),)
    assert type(model.padded) is nn.Embedding
    assert model.training
