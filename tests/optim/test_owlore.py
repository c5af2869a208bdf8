"""OwLore: blocks drawn by their outliers, and GaLore inside them."""

import copy

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import OwLore
from pintpot.optim._groups import projected_names
from pintpot.optim._select import OutlierBlocks
from pintpot.optim._tensors import mix_seed
from tests.architectures import tiny_model
from tests.optim.test_projected import adam
from tests.optim.turns import DECAY, LR, Turns, backward, same_weights

RANK, GAP, EVERY = 4, 2, 3


def galore(names: frozenset[str]):
    """GaLore's move of one weight, by an SVD."""
    bases: dict[str, torch.Tensor] = {}

    def update(moments: dict, name: str, g: torch.Tensor, step: int) -> torch.Tensor:
        if name not in names:
            return adam(moments, name, g, step)
        wide = g.shape[0] <= g.shape[1]
        g = g if wide else g.T
        if (step - 1) % GAP == 0:
            u = torch.linalg.svd(g, full_matrices=False)[0][:, :RANK]
            bases[name] = u * u[u.abs().argmax(0), torch.arange(RANK)].sign()
        moved = bases[name] @ adam(moments, name, bases[name].T @ g, step)
        return moved if wide else moved.T

    return update


def plant(model, block: int, count: int) -> None:
    """Make some weights of a block outliers."""
    with torch.no_grad():
        model.model.layers[block].mlp.up_proj.weight.view(-1)[:count] = 3.0


def test_twenty_steps_are_those_of_the_float64_twin():
    model = tiny_model("llama", dtype=torch.float64)
    plant(model, 1, 5)
    shares = []
    for layer in model.model.layers:
        weights = torch.cat([p.detach().abs().flatten() for p in layer.parameters() if p.dim() == 2])
        shares.append((int((weights > 13 * weights.mean()).sum()) + 1) / len(weights))

    def choose(gradients: list, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(0, turn))
        return torch.multinomial(torch.tensor(shares, dtype=torch.float64), 1, generator=generator).tolist()

    twin = Turns(model, EVERY, choose, galore(projected_names(model)))
    settings = {"rank": RANK, "update_gap": GAP, "active_blocks": 1, "interval_steps": EVERY}
    optimizer = OwLore(model, lr=LR, weight_decay=DECAY, **settings)
    assert optimizer.selection.memory["shares"] == pytest.approx(shares)
    assert shares[1] == 6 * shares[0]
    for number in range(20):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        twin.step(number)
    same_weights(model, twin.model)


def test_blocks_are_drawn_as_often_as_their_outliers_say():
    generator = torch.Generator().manual_seed(0)
    blocks = [[torch.randn(16, 32, generator=generator)] for _ in range(4)]
    for block, count in zip(blocks, (0, 2, 5, 9), strict=True):
        block[0].view(-1)[:count] = 1000.0
    rule = OutlierBlocks(1, 1)
    shares = torch.tensor([rule.share_of(block) for block in blocks])
    torch.testing.assert_close(shares * 512, torch.tensor([1.0, 3.0, 6.0, 10.0]))
    memory: dict = {}
    drawn = torch.tensor([rule.choose(blocks, turn, [], memory)[0] for turn in range(4000)])
    often = torch.bincount(drawn, minlength=4) / 4000
    # Three standard deviations of a share of 4,000 draws are at most 0.024.
    torch.testing.assert_close(often, shares / shares.sum(), rtol=0, atol=0.024)


def test_a_sample_is_without_replacement_and_of_all_blocks_where_there_are_few():
    blocks = [[torch.randn(16, 32)] for _ in range(4)]
    for turn in range(20):
        assert len(set(OutlierBlocks(3, 1).choose(blocks, turn, [], {}))) == 3
    assert OutlierBlocks(9, 1).choose(blocks, 0, [], {}) == [0, 1, 2, 3]


def test_blocks_without_matrices_or_outliers_are_equally_likely():
    assert OutlierBlocks(1, 1).share_of([torch.ones(16)]) == 1.0
    assert OutlierBlocks(1, 1).share_of([torch.zeros(16, 32)]) == 1 / 512


def test_the_shares_are_those_of_the_weights_that_training_began_with():
    # So low a threshold that every step changes how many weights are above it.
    settings = {"lr": 1e-2, "rank": RANK, "active_blocks": 1, "interval_steps": 2, "outlier_threshold": 2.0}

    def run(model, optimizer, steps):
        for _ in range(steps):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()

    whole, parted = tiny_model("gemma3"), tiny_model("gemma3")
    first = OwLore(whole, **settings)
    run(whole, first, 12)
    early = OwLore(parted, **settings)
    run(parted, early, 5)
    saved = unflatten_state(*copy.deepcopy(flatten_state(early.state_dict())))
    late = OwLore(parted.requires_grad_(), **settings)
    assert late.selection.memory != first.selection.memory
    late.load_state_dict(saved)
    run(parted, late, 7)
    assert late.selection.memory == first.selection.memory
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ShapeError, match="outlier_threshold must be positive"):
        OwLore(tiny_model("llama"), outlier_threshold=0.0)
