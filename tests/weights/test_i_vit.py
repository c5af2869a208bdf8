"""I-ViT: blocks of a vision transformer in whole numbers."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

from pintpot.core.errors import UnsupportedModel
from pintpot.weights import compress_folder, load_and_compress, load_compressed
from pintpot.weights.i_vit import IViT
from pintpot.weights.integer_arithmetic import dyadic, integer_norm, rescale, shift_gelu, shiftmax
from pintpot.weights.integer_vit import IntegerViTLayer


def vit(**changes) -> ViTForImageClassification:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=5, initializer_range=0.15, **{**sizes, **changes})
    config.architectures = ["ViTForImageClassification"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(2)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**images()[0]).logits


def words(*shape: int, bits: int = 8) -> torch.Tensor:
    top = 1 << (bits - 1)
    return torch.randint(-top, top, shape, generator=torch.Generator().manual_seed(0))


def test_rescaling_is_a_whole_number_and_a_shift():
    ratio = torch.tensor([0.3, 3e-7, 1.7, -0.02], dtype=torch.float64)
    numbers = words(5, 4, bits=30)
    found = rescale(numbers, *dyadic(ratio), bits=16)
    expected = (numbers * ratio).clamp(-(2**15), 2**15 - 1)
    assert found.dtype is torch.int64
    assert (found - expected).abs().max() <= 0.51 + 2**15 * 2.0**-23


def test_shiftmax_is_nearly_the_softmax():
    numbers, scale = words(20, 30), 0.04
    found = shiftmax(numbers, scale, 16)
    expected = (numbers.double() * scale).softmax(-1)
    assert found.dtype is torch.int64
    assert ((found / 2**15) - expected).abs().max() < 0.02
    assert found.min() >= 0


def test_shift_gelu_is_nearly_gelu():
    numbers, scale = words(20, 30), 0.04
    found = shift_gelu(numbers, scale, 8) * scale / 2**7
    sigmoid = numbers * scale * (1.702 * numbers.double() * scale).sigmoid()
    assert (found - sigmoid).abs().max() < 0.1
    assert (found - functional.gelu(numbers.double() * scale)).abs().max() < 0.12
    # Whatever a row's largest number is, also below zero.
    assert shift_gelu(-torch.arange(1, 9).view(1, 8), 0.5, 8).abs().max() <= 128


def test_small_scales_fit_in_32_bits():
    for scale in (1e-6, 1e-3, 3.0):
        found = shiftmax(words(4, 10), scale, 16) / 2**15
        assert (found - (words(4, 10).double() * scale).softmax(-1)).abs().max() < 0.05


def test_the_norm_is_nearly_layer_normalisation():
    numbers = words(20, 48, bits=15)
    offset = words(48, bits=28)
    found = integer_norm(numbers, offset) / 2**30 * 48**0.5
    expected = functional.layer_norm(numbers.double(), (48,)) + offset / 2**30 * 48**0.5
    assert (found - expected).abs().max() < 2e-3
    assert integer_norm(torch.full((1, 48), 7), offset).isfinite().all()


def test_a_block_computes_in_whole_numbers_near_the_dense_one():
    model = vit()
    dense = logits(model)
    IViT().quantize_model_(model, images())
    block = model.vit.layers[0]
    assert isinstance(block, IntegerViTLayer)
    seen: list[torch.Tensor] = []
    for part in block.modules():
        part.register_forward_hook(lambda module, args, out: seen.extend([args[0], out]))
    assert block.compute(words(2, 17, 48, bits=15)).dtype is torch.int64
    assert len(seen) > 20
    assert {tensor.dtype for tensor in seen} == {torch.int64}
    found = logits(model)
    assert (found - dense).norm() < 0.1 * dense.norm()
    assert (found.argmax(-1) == dense.argmax(-1)).float().mean() >= 0.75


def test_every_way_gives_the_same_model(tmp_path: Path):
    model = vit()
    model.save_pretrained(tmp_path / "dense")
    method = IViT()
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", method, texts=images())
    in_place = vit()
    assert method.quantize_model_(in_place, images()) == report
    expected = logits(in_place)
    assert torch.equal(logits(load_compressed(tmp_path / "packed")), expected)
    assert torch.equal(logits(load_and_compress(tmp_path / "dense", method, texts=images())), expected)
    assert torch.equal(logits(ViTForImageClassification.from_pretrained(tmp_path / "packed")), expected)
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "dense" / "model.safetensors"
    ).stat().st_size


def test_refuses_other_activations():
    with pytest.raises(UnsupportedModel, match="not relu"):
        IViT().quantize_model_(vit(hidden_act="relu"), images())
