"""LPViT: what a block costs, who keeps how many, and a vision transformer from dense to saved."""

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import pintpot.weights
from pintpot.weights.formats import Sparse
from pintpot.weights.lpvit import LPViT, block_cost
from pintpot.weights.targets import find_targets

SIDE = {"block_rows": 16, "block_columns": 16}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Sizes that differ over a matrix, as trained ones do.
            parameter.mul_(torch.exp(torch.randn_like(parameter[..., :1])))
    return model


def images(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(count)]


def kept_in(layout) -> dict[str, float]:
    return {name: formats[0].kept_fraction for name, formats in layout.items()}


def test_cost_is_the_change_of_the_output():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(12, 24, generator=generator), torch.randn(50, 24, generator=generator)
    layout = Sparse(block_rows=4, block_columns=8, balanced=False)
    cost = block_cost(weight, layout, inputs.T @ inputs / 50)
    for row in range(3):
        for column in range(3):
            cut = torch.zeros(12, 24, dtype=torch.float64)
            at = slice(4 * row, 4 * row + 4), slice(8 * column, 8 * column + 8)
            cut[at] = weight[at].double()
            change = (inputs.double() @ cut.T).square().sum() / 50
            torch.testing.assert_close(cost[row, column].double(), change, rtol=1e-4, atol=1e-4)


def test_shares_lower_the_distortion_at_equal_bytes_and_power_moves_them():
    model = vit()
    targets, _ = find_targets(model)
    # Costs that fall steeply in one matrix and hardly in another.
    shapes = {t.parameter: t for t in targets}
    evidence = {}
    for index, target in enumerate(targets):
        count = target.numel // 256
        cost = torch.exp(-torch.arange(count) / count * (8 if index % 2 else 1))
        evidence[target.parameter] = {"cost": cost / cost.sum()}
    plain = LPViT(power=0.0, **SIDE)
    layout, uniform = plain.layout(targets, evidence), plain.layout(targets)
    assert sum(shapes[n].nbytes(f) for n, f in layout.items()) == sum(shapes[n].nbytes(f) for n, f in uniform.items())

    def distortion(formats) -> float:
        return sum(float(evidence[n]["cost"][f[0].kept(shapes[n].numel // 256) :].sum()) for n, f in formats.items())

    assert distortion(layout) < 0.9 * distortion(uniform)
    thrifty = LPViT(power=1.0, **SIDE).layout(targets, evidence)
    wide = [n for n in layout if n.endswith("fc2.weight")]
    assert sum(kept_in(thrifty)[n] for n in wide) < sum(kept_in(layout)[n] for n in wide)
    # However little it is worth, nothing goes altogether.
    assert min(kept_in(LPViT(power=100.0, **SIDE).layout(targets, evidence)).values()) >= 0.05


def test_a_vision_transformer_from_dense_to_saved(tmp_path):
    model, texts = vit(), images()
    with torch.no_grad():
        dense = model(**texts[0]).logits
        errors = {}
        for method in (LPViT(kept_fraction=0.8, **SIDE), LPViT(kept_fraction=0.4, **SIDE)):
            packed = vit()
            report = method.quantize_model_(packed, texts)
            assert report.packed_bytes < 0.41 * report.dense_bytes
            errors[method.kept_fraction] = float((packed(**texts[0]).logits - dense).norm() / dense.norm())
        shares = {f.kept_fraction for m in packed.modules() for f in getattr(m, "formats", ())}
        assert len(shares) > 3
        assert errors[0.8] < errors[0.4]
        packed.save_pretrained(tmp_path / "packed")
        assert pintpot.weights.PintpotConfig
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        assert torch.equal(again(**texts[0]).logits, packed(**texts[0]).logits)
