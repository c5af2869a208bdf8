"""CLOVER: a block computes the same after its heads are turned, and the leading directions are worth keeping."""

import pytest
import torch

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.shape import block_names
from pintpot.weights.clover import Clover, ordered
from pintpot.weights.formats import Leading
from pintpot.weights.load import load_compressed
from pintpot.weights.streaming import compress_folder
from pintpot.weights.targets import find_targets
from tests.architectures import TINY, tiny_config, tiny_model

IDS = torch.arange(24).view(2, 12) + 3
KNOWN = [name for name in sorted(TINY) if tiny_config(name).model_type in Clover.model_types]


def logits_of(model) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def shaken(architecture: str):
    """A model whose biases are not zero."""
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_rearranged_block_computes_the_same(architecture):
    model = shaken(architecture)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = logits_of(model)
    for name in block_names(model):
        Clover().rearrange_block_(model.get_submodule(name))
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {t.parameter for t in find_targets(model)[0] if t.parameter in Clover().layout(find_targets(model)[0])} <= {
        *changed
    }


def test_ordered_factors_have_the_product_and_its_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((30, 20), (3, 20), (20, 4)):
        left, right = torch.randn(rows, 6, generator=generator), torch.randn(6, columns, generator=generator)
        one, two = ordered(left, right)
        assert one.shape == left.shape
        assert two.shape == right.shape
        product = left.double() @ right.double()
        torch.testing.assert_close(one @ two, product)
        values = torch.linalg.svdvals(product)[:3]
        torch.testing.assert_close(one.norm(dim=0)[:3].square(), values)
        torch.testing.assert_close(two.norm(dim=1)[:3].square(), values)


def test_heads_with_idle_directions_lose_them_without_loss():
    model = tiny_model("gpt2")
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer.h:
        attention = block.attn
        heads = attention.c_attn.weight.data.unflatten(1, (-1, 16))
        mixed = torch.randn(heads.shape[1], 6, 16, generator=generator)
        heads.copy_(torch.einsum("ihr,hrd->ihd", heads[..., :6] * 3, mixed))
    wanted = logits_of(model)
    report = Clover(kept_fraction=0.5).quantize_model_(model)
    assert report.packed_bytes == report.dense_bytes // 2
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)


def test_pruned_directions_cost_less_than_pruned_channels():
    dense = logits_of(shaken("gpt2"))
    turned, plain = shaken("gpt2"), shaken("gpt2")
    Clover(kept_fraction=0.5).quantize_model_(turned)
    for target in find_targets(plain)[0]:
        own = target.module.rpartition(".")[2]
        if target.head_dim:
            layout = Leading(size=16, kept=8, inputs=own == "c_proj")
            weight = plain.get_parameter(target.parameter)
            weight.data.copy_(layout.decode(layout.encode(weight.t()), target.shape[1], torch.float32).t())
    assert (logits_of(turned) - dense).norm() < 0.8 * (logits_of(plain) - dense).norm()


def test_rotary_queries_and_keys_stay_dense():
    model = tiny_model("llama")
    layout = Clover().layout(find_targets(model)[0])
    assert {name.split(".")[-2] for name in layout} == {"v_proj", "o_proj"}
    assert {name.split(".")[-2] for name in Clover().layout(find_targets(tiny_model("opt"))[0])} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }


def test_a_folder_is_compressed_and_loaded(tmp_path):
    model = shaken("opt")
    model.save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "small", Clover(kept_fraction=0.75))
    loaded = logits_of(load_compressed(tmp_path / "small"))
    Clover(kept_fraction=0.75).quantize_model_(model)
    assert torch.equal(loaded, logits_of(model))


def test_refusals():
    with pytest.raises(UnsupportedModel, match=r"in_proj|mixer"):
        Clover().quantize_model_(tiny_model("mamba"))
    with pytest.raises(ShapeError, match="share of the heads' width"):
        Clover(kept_fraction=1.0)
