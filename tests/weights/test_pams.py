"""PAMS: trained largest values of activations, a teacher's attention maps, and packed convolutions."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

from pintpot.weights import compress_folder, load_compressed
from pintpot.weights.by_training import follow_
from pintpot.weights.formats import Grid, StaticInput
from pintpot.weights.modules import CompressedConv2d
from pintpot.weights.pams import DECAY, PAMS, SCALE_RATE, MaxScale, map_of
from pintpot.weights.rtn import RTN
from pintpot.weights.trained import stand_ins

LAYOUT = StaticInput(inner=Grid(bits=4, group_size=-1, symmetric=True), bits=4)


def network(seed: int = 0) -> Swin2SRForImageSuperResolution:
    config = Swin2SRConfig(
        image_size=8,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        upscale=2,
        architectures=["Swin2SRForImageSuperResolution"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Swin2SRForImageSuperResolution(config).eval()


def images(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Small images, and the large ones that they are made of."""
    large = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return functional.avg_pool2d(large, 2), large


def stand_in(warm_up: float = 0.5) -> MaxScale:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    return MaxScale(weight, LAYOUT, warm_up)


def test_the_largest_value_follows_at_first_and_is_trained_afterwards():
    made = stand_in().train()
    first, second = torch.tensor([[[1.0, -3.0]], [[5.0, 0.0]]]), torch.full((2, 1, 2), 7.0)
    made.input(first)
    assert made.largest.item() * SCALE_RATE == pytest.approx((3 + 5) / 2)
    made.input(second)
    running = DECAY * 4 + (1 - DECAY) * 7
    assert made.largest.item() * SCALE_RATE == pytest.approx(running)
    made.follow_(0.6)
    made.input(second).sum().backward()
    assert made.largest.item() * SCALE_RATE == pytest.approx(running)
    # Both numbers of both rows are cut off, so that raising the largest value raises all four outputs.
    assert made.largest.grad.item() == pytest.approx(4 * SCALE_RATE, rel=1e-4)


def test_rounds_weight_and_input_as_the_definition_says():
    made = stand_in(0.0)
    dense = made.dense.detach().double()
    made.train().input(torch.tensor([[2.8, -1.0, 0.1]]))
    scale = made.grid.settle(-made.dense.abs().max(), made.dense.abs().max())[0].double()
    torch.testing.assert_close(made.weight().double(), (dense / scale).round() * scale)
    x = torch.tensor([[2.8, -1.0, 0.1, 9.0, -0.7]])
    expected = (x.double() / 0.4).round().clamp(-8, 7) * 0.4
    torch.testing.assert_close(made.input(x).double(), expected, rtol=1e-6, atol=1e-6)
    (stored,) = made.terms((LAYOUT,))
    torch.testing.assert_close(LAYOUT.decode(stored, 20, torch.float32), made.weight().detach())
    torch.testing.assert_close(LAYOUT.round(x, stored["input_step"]), made.input(x).detach())


def test_the_teacher_shows_where_to_look():
    student, teacher = network(), network()
    small, large = images()
    method = PAMS(bits=8, transfer_weight=10.0)
    method.prepare_(student)
    objective = method.objective(student.train(), teacher)
    same = objective(pixel_values=small, labels=large).loss.item()
    with torch.no_grad():
        expected = functional.l1_loss(teacher(pixel_values=small)[0], large).item()
    # At 8 bits the student is nearly its teacher, so that the task's loss is all that there is.
    assert same == pytest.approx(expected, rel=0.05)
    assert map_of(torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])).tolist()[0] == pytest.approx([17**-0.5, 4 * 17**-0.5])
    features = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(map_of(features), map_of(features.flatten(2).transpose(1, 2)))


def test_super_resolution_trains_and_loads_again(tmp_path: Path):
    model, skeleton, teacher = network(), network(), network()
    small, large = images()
    method = PAMS(bits=6, transfer_weight=10.0)
    layout = method.prepare_(model)
    objective = method.objective(model.train(), teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for step in range(12):
        loss = objective(pixel_values=small, labels=large).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow_(model, (step + 1) / 12)
    assert losses[-1] < losses[0]
    assert all(made.largest.isfinite() for made in stand_ins(model))
    model.eval()
    with torch.no_grad():
        trained = model(small)[0]
    report = method.finish_(model, layout, skeleton)
    assert report.packed_bytes < 0.35 * report.dense_bytes
    assert isinstance(model.swin2sr.encoder.stages[0].conv, CompressedConv2d)
    with torch.no_grad():
        packed = model(small)[0]
    torch.testing.assert_close(packed, trained, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "packed")(small)[0], packed)


def test_convolutions_pack_without_training_and_unpack_again(tmp_path: Path):
    model, small = network(), images()[0]
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        dense = model(small)[0]
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", RTN(bits=8, group_size=24))
    assert "swin2sr.encoder.stages.0.conv.weight" in report.compressed
    packed = load_compressed(tmp_path / "packed")
    with torch.no_grad():
        found = packed(small)[0]
        assert (found - dense).abs().max() < 0.05 * dense.abs().max()
        torch.testing.assert_close(packed.dequantize()(small)[0], found, rtol=1e-4, atol=1e-4)
