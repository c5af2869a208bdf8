"""Q-HyViT: hybrid vision transformers, whose stages are unlike, on grids that the loss chooses."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTModel,
    MobileViTV2Config,
    MobileViTV2ForImageClassification,
)

from pintpot.core.errors import CompositionError, DataError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape, block_names
from pintpot.core.workload import Compress, Generate
from pintpot.weights import compress_folder, load_and_compress, load_compressed
from pintpot.weights.curved_rows import CurvedRows, draw_classes, observe_curved
from pintpot.weights.gptq import GPTQ
from pintpot.weights.modules import PackedTerms
from pintpot.weights.q_hyvit import BRIDGE, QHyViT
from pintpot.weights.targets import find_targets
from tests.architectures import tiny_model

QUICK = {"steps": 6, "rounds": 1, "samples": 64}
SIDE = 64


def hybrid(version: int = 1) -> MobileViTForImageClassification | MobileViTV2ForImageClassification:
    common = {"image_size": SIDE, "num_labels": 5, "initializer_range": 0.2}
    if version == 1:
        kind: type = MobileViTForImageClassification
        config = MobileViTConfig(
            **common,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=2,
            expand_ratio=2.0,
        )
    else:
        kind = MobileViTV2ForImageClassification
        config = MobileViTV2Config(**common, width_multiplier=0.125, n_attn_blocks=[1, 1, 1])
    config.architectures = [kind.__name__]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                # As a trained one has them: channels of unlike ranges.
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.2)
    return model


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(4, 3, SIDE, SIDE, generator=generator)} for _ in range(2)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**images()[0]).logits


def assert_same(one, other) -> None:
    """Equal tensors; convolutions may add in another order where memory is aligned otherwise."""
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-5)


def packed_bytes(model) -> int:
    return sum(b.nbytes for m in model.modules() if isinstance(m, PackedTerms) for b in m.buffers(recurse=False))


def test_unlike_stages_are_the_blocks_where_no_list_is_uniform():
    assert block_names(hybrid()) == tuple(f"mobilevit.encoder.layer.{i}" for i in range(5))
    targets, dense = find_targets(hybrid())
    assert {t.block for t in targets} == set(block_names(hybrid()))
    assert all("conv_3x3" in name for name, _ in dense)
    bridges = [t.module for t in targets if t.module.removeprefix(f"{t.block}.") in BRIDGE]
    assert len(bridges) == 3 * 4


@pytest.mark.parametrize("version", [1, 2])
def test_every_way_gives_the_same_model_near_the_dense_one(version, tmp_path: Path):
    method, model = QHyViT(**QUICK), hybrid(version)
    before = logits(model)
    model.save_pretrained(tmp_path / "dense")
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", method, texts=images())
    in_place = hybrid(version)
    assert method.quantize_model_(in_place, images()) == report
    found = logits(in_place)
    in_place.save_pretrained(tmp_path / "saved")
    for folder in ("packed", "saved"):
        assert_same(load_compressed(tmp_path / folder), in_place)
    assert_same(load_and_compress(tmp_path / "dense", method, texts=images()), in_place)
    assert 0 < (found - before).norm() < 0.1 * before.norm()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("version", [1, 2])
def test_bytes_are_those_that_shapes_tell(version):
    method, model = QHyViT(**QUICK), hybrid(version)
    shape = ModelShape.from_config(model.config)
    before = sum(p.nbytes for p in model.parameters())
    plain = Ledger("predicted", (Moment("decode", {}).with_bytes(Account.WEIGHTS, before),))
    buffers = sum(b.nbytes for b in model.buffers())
    report = method.quantize_model_(model, images())
    after = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - buffers
    assert packed_bytes(model) == report.packed_bytes
    assert method.predict(plain, shape, Generate()).peak_of(Account.WEIGHTS) == after < before
    skeleton = shape.build("meta")
    assert method.prepare_skeleton_(skeleton).packed_bytes == report.packed_bytes
    assert method.predict(plain, shape, Compress()).peak_bytes() > 0


def test_other_methods_take_stages_too(tmp_path: Path):
    model = hybrid()
    model.save_pretrained(tmp_path / "dense")
    before = logits(model)
    method = GPTQ(bits=8, group_size=32)
    compress_folder(tmp_path / "dense", tmp_path / "packed", method, texts=images())
    method.quantize_model_(model, images())
    assert_same(load_compressed(tmp_path / "packed"), model)
    assert 0 < (logits(model) - before).norm() < 0.05 * before.norm()


def layer(outputs: int = 6, inputs: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(64, inputs, generator=generator)


def seen(rows: torch.Tensor, curvature: torch.Tensor) -> CurvedRows:
    return CurvedRows(rows, curvature, rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0))


def loss_of(method: QHyViT, weight: torch.Tensor, own: CurvedRows, found: dict[str, torch.Tensor]) -> float:
    """The weighted error of what is stored, in float64, written down once more."""
    layout = method.terms("w", *weight.shape, torch.float32)[0]
    half = (1 << (method.bits - 1)) - 1
    scale = (weight.abs().amax(1, keepdim=True) * found["share"] / half).half().double()
    held = (weight.double() / scale).round().clamp(-half - 1, half) * scale
    top = (1 << method.activation_bits) - 1
    step, zero = found["step"].double(), found["zero"].double()
    given = ((own.rows.double() / step).round() + zero).clamp(0, top).sub(zero) * step
    assert layout.symmetric is False
    return float(((given @ held.T - own.rows.double() @ weight.double().T).square() * own.curvature).sum())


def test_the_search_is_no_worse_than_any_single_choice_and_much_better_than_the_whole_range():
    method = QHyViT(bits=4, activation_bits=4, steps=40, rounds=2)
    layout = method.terms("w", 6, 8, torch.float32)[0]
    weight, rows = layer()
    rows = rows.abs() * torch.tensor([1.0, 30.0, 1.0, 2.0, 1.0, 0.5, 1.0, 8.0])
    weight[:, 1] /= 30
    own = seen(rows, torch.ones(64, 6))
    found = method.search(weight, own, layout)
    best = loss_of(method, weight, own, found)
    for low, high in (own.range_of_all(), (own.low, own.high)):
        for symmetric in (True, False):
            other, error = method._search_in(weight, own, layout, low, high, symmetric)
            assert loss_of(method, weight, own, other) == pytest.approx(error, rel=1e-3)
            assert best <= error * 1.001
    # Positive inputs of unlike ranges: each channel for itself, and no codes for numbers below zero.
    assert len(found["step"].unique()) > 1
    assert torch.equal(found["zero"], torch.zeros(8))
    whole = {"share": torch.ones(6, 1), "step": torch.full((8,), float(rows.max()) / 7), "zero": torch.full((8,), 8.0)}
    assert best < 0.3 * loss_of(method, weight, own, whole)


def test_what_the_loss_curves_most_for_is_fitted_best():
    method = QHyViT(bits=3, activation_bits=8, steps=60, rounds=1)
    layout = method.terms("w", 1, 8, torch.float32)[0]
    weight = layer(1)[0]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 8, generator=generator)
    half = torch.zeros(64, 1)
    half[:8] = 1
    errors = []
    for curvature in (half, torch.ones(64, 1)):
        found = method.search(weight, seen(rows, curvature), layout)
        errors.append(loss_of(method, weight, seen(rows, half), found))
    assert errors[0] < errors[1]


def test_curvature_is_the_squared_gradient_and_the_model_is_left_as_it_was():
    model, batch = hybrid(), images()
    classes = draw_classes(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(classes, draw_classes(model, batch), strict=True))
    name = "mobilevit.encoder.layer.2.conv_1x1.convolution"
    own = observe_curved(model, [name], batch, classes, 10**9)[name]
    module = model.get_submodule(name)
    outputs = []
    handle = module.register_forward_hook(lambda m, args, out: outputs.append((args[0].detach(), out)))
    for one, drawn in zip(batch, classes, strict=True):
        loss = functional.cross_entropy(model(**one).logits, drawn, reduction="sum")
        outputs[-1] = (outputs[-1][0], torch.autograd.grad(loss, outputs[-1][1])[0])
    handle.remove()
    expected = torch.cat([g.square().flatten(2).transpose(1, 2).flatten(0, 1) for _, g in outputs])
    scale = expected.mean(0).max()
    torch.testing.assert_close(own.curvature.sum(0), (expected / scale).sum(0), rtol=1e-3, atol=1e-4)
    rows = torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1) for x, _ in outputs])
    torch.testing.assert_close(own.low, rows.amin(0).clamp(max=0))
    assert own.rows.shape == rows.shape
    assert all(p.grad is None for p in model.parameters())


def test_layers_after_a_bridge_are_fitted_to_what_the_rounded_bridge_gives(monkeypatch):
    model = hybrid()
    kinds: list[list[str]] = []
    method = QHyViT(**QUICK)

    def watched(model, names, *rest):
        kinds.append([n for n, m in model.named_modules() if isinstance(m, PackedTerms)])
        return observe_curved(model, names, *rest)

    monkeypatch.setattr("pintpot.weights.q_hyvit.observe_curved", watched)
    targets, _ = find_targets(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    method.examine_model(model, targets, images())
    assert [len(names) for names in kinds] == [0, 1, 4, 5, 8, 9, 12]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(isinstance(m, PackedTerms) for m in model.modules())


def test_refusals():
    with pytest.raises(UnsupportedModel, match="bridge block"):
        QHyViT().quantize_model_(tiny_model("llama"), [torch.ones(1, 4, dtype=torch.long)])
    with pytest.raises(CompositionError, match="no images"):
        QHyViT(**QUICK).quantize_model_(hybrid(), [torch.ones(1, 4, dtype=torch.long)])
    bare = MobileViTModel(hybrid().config).eval()
    with pytest.raises(UnsupportedModel, match="predicts no classes"):
        QHyViT(**QUICK).quantize_model_(bare, images())
    broken = images()
    broken[0]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        QHyViT(**QUICK).quantize_model_(hybrid(), broken)
    for wrong in ({"bits": 9}, {"activation_bits": 1}, {"rounds": 0}, {"least_share": 2.0}):
        with pytest.raises(CompositionError):
            QHyViT(**wrong)
