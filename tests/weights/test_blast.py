"""BLaST: which blocks go, which come back, and what is stored after training."""

import copy

import torch
from transformers import AutoModelForCausalLM

from pintpot.weights.blast import BLaST, GrowingSparse
from pintpot.weights.by_training import follow_
from pintpot.weights.formats import Sparse
from pintpot.weights.modules import CompressedLinear
from tests.architectures import tiny_model

LAYOUT = Sparse(kept_fraction=0.25, block_rows=4, block_columns=4, balanced=False)


def growing(settled: float = 1.0, every: int = 1) -> GrowingSparse:
    dense = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    return GrowingSparse(dense, LAYOUT, settled, every)


def backward(stand_in: GrowingSparse, wanted: torch.Tensor) -> None:
    """One backward pass whose gradient is ``wanted``."""
    (stand_in.weight() * wanted).sum().backward()


def test_more_and_more_is_cut_up_to_the_share():
    stand_in = growing(settled=0.8)
    kept = []
    for step in range(10):
        stand_in.follow_((step + 1) / 10)
        kept.append(int(stand_in.mask.sum()))
    assert kept == sorted(kept, reverse=True)
    # Without gradients nothing grows: 16 blocks less 12 * (1 - (1 - 0.125)^3) after the first tenth.
    assert kept[0] == 12
    assert kept[-1] == kept[7] == 4
    (stored,) = stand_in.terms((LAYOUT,))
    assert torch.equal(LAYOUT.decode(stored, 16, torch.float32), stand_in.weight().detach().half().float())


def test_blocks_grow_back_from_zero_where_the_gradient_is_large():
    stand_in = growing()
    norms = stand_in.norms(stand_in.dense)
    weak = divmod(int(norms.argmin()), 4)
    at = slice(4 * weak[0], 4 * weak[0] + 4), slice(4 * weak[1], 4 * weak[1] + 4)
    stand_in.follow_(0.5)
    assert not stand_in.mask[weak]
    assert (stand_in.weight()[at] == 0).all()
    gradient = torch.full((16, 16), 0.01)
    gradient[at] = 1.0
    backward(stand_in, gradient)
    stand_in.follow_(0.6)
    assert stand_in.mask[weak]
    assert (stand_in.weight()[at] == 0).all()
    # It learns again, and stays where it has become strong.
    with torch.no_grad():
        stand_in.dense[at] += 5.0
    stand_in.wanted = None
    stand_in.follow_(0.9)
    assert stand_in.mask[weak]


def test_the_pattern_changes_only_when_it_is_due():
    stand_in = growing(every=3)
    for _ in range(2):
        stand_in.follow_(0.5)
        assert stand_in.mask.all()
    stand_in.follow_(0.5)
    assert not stand_in.mask.all()


def train(model, ids: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        follow_(model, (step + 1) / steps)
        losses.append(float(loss.detach()))
    return losses


def test_training_with_growing_blocks_beats_cutting_afterwards(tmp_path):
    ids = torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    method = BLaST(kept_fraction=0.2, block_size=8, every=4)
    dense = tiny_model("llama").train()
    skeleton = copy.deepcopy(dense).to("meta")
    model = copy.deepcopy(dense)

    layout = method.prepare_(model)
    train(model, ids, 60)
    report = method.finish_(model.eval(), layout, skeleton)
    assert all("mlp" in name for name in report.compressed)
    assert report.packed_bytes < 0.13 * report.dense_bytes

    train(dense, ids, 60)
    method.quantize_model_(dense.eval())
    with torch.no_grad():
        trained, cut = (float(m(input_ids=ids, labels=ids).loss) for m in (model, dense))
    assert trained < 0.7 * cut

    assert isinstance(model.model.layers[0].mlp.up_proj, CompressedLinear)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert float(again(input_ids=ids, labels=ids).loss) == trained
