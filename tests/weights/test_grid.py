"""The idea of rounding to nearest, the exact bytes of the format, and storage that is really packed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pintpot.core.errors import CompositionError, PintpotError, ShapeError
from pintpot.core.expression import parse
from pintpot.weights import CompressedLinear, Dense, Grid
from pintpot.weights.modules import place_
from pintpot.weights.rtn import RTN
from pintpot.weights.targets import Target
from tests.architectures import tiny_model


def weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [16, 40, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_each_number_goes_to_the_nearest_point_of_its_group(bits, group_size, symmetric):
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    dense = weight()
    stored = grid.encode(dense)
    assert sum(t.nbytes for t in stored.values()) == grid.nbytes(*dense.shape)
    back = grid.decode(stored, dense.shape[1], torch.float32)
    column = torch.arange(dense.shape[1]) // grid.group(dense.shape[1])
    step = stored["scale"].float()[:, column]
    # Half a step is the most that rounding may cost. Scales are rounded to 11 bits and zeros to integers, which can
    # cut the ends of the range by up to another half step.
    assert ((back - dense).abs() <= 1.01 * step).all()
    inner = (back - dense).abs() <= 0.5001 * step
    assert inner.float().mean() > 0.9


def test_bytes_by_the_formula():
    assert Grid(bits=4, group_size=32).nbytes(10, 128) == 10 * (64 + 4 * 2 + 2)
    assert Grid(bits=3, group_size=32, symmetric=True).nbytes(10, 128) == 10 * (48 + 4 * 2)
    assert Grid(bits=4, group_size=50).nbytes(1, 128) == 64 + 3 * 2 + 2
    assert Grid(bits=8, group_size=-1).nbytes(1, 128) == 128 + 2 + 1
    assert Dense(dtype=torch.bfloat16).nbytes(3, 5) == 30


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_zero_groups_constant_groups_and_extreme_scales(scale_dtype):
    grid = Grid(bits=8, group_size=32, scale_dtype=scale_dtype)
    dense = weight(4, 128)
    dense[:, :32] = 0
    dense[0, 32:64] = 3.5
    dense[1, 64:96] = -1e-3
    dense[2] *= 1e-4
    dense[3] *= 1e4
    back = grid.decode(grid.encode(dense), 128, torch.float32)
    assert torch.equal(back[:, :32], dense[:, :32])
    assert ((back - dense).norm(dim=1) < 0.02 * dense.norm(dim=1)).all()


def test_a_weight_is_a_sum_of_terms():
    """A second grid on what the first one left over comes nearer."""
    dense = weight()
    layer = torch.nn.Module()
    layer.part = torch.nn.Linear(96, 24, bias=False)
    target = Target("part.weight", "part", "part", (24, 96), False, torch.float32)
    errors = []
    for formats in ((Grid(bits=3),), (Grid(bits=3), Grid(bits=3))):
        layer.part = torch.nn.Linear(96, 24, bias=False)
        place_(layer, target, formats, RTN().find("part.weight", dense, formats))
        errors.append(float((layer.part.weight - dense).norm()))
        x = torch.randn(5, 96)
        torch.testing.assert_close(layer.part(x), x @ layer.part.weight.T, rtol=1e-4, atol=1e-4)
    assert errors[1] < 0.2 * errors[0]


def test_more_bits_and_smaller_groups_come_nearer():
    dense = weight()

    def error(**settings) -> float:
        grid = Grid(**settings)
        return float((grid.decode(grid.encode(dense), 96, torch.float32) - dense).norm())

    by_bits = [error(bits=b, group_size=32) for b in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[0] > 60 * by_bits[-1]
    assert error(bits=4, group_size=16) < error(bits=4, group_size=96)


@pytest.mark.parametrize("bad", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": -2}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(PintpotError):
        RTN(**bad)


def test_unknown_scale_dtype_and_expression():
    with pytest.raises(ShapeError, match="float64"):
        Grid(scale_dtype="float64")
    assert parse("rtn3") == (RTN(bits=3),)
    with pytest.raises(CompositionError, match="2 to 8 bits"):
        parse("rtn(bits=12)")


def test_storage_is_small_and_holds_no_dense_weight():
    model = tiny_model("llama")
    RTN(bits=2, group_size=32).quantize_model_(model)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, CompressedLinear)
    assert isinstance(layer, torch.nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == []
    assert sorted(layer.state_dict()) == ["term0_packed", "term0_scale", "term0_zero"]
    assert layer.term0_packed.nbytes == layer.in_features * layer.out_features * 2 // 8


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_train_on_packed_weights_and_merge_into_them(architecture):
    model = tiny_model(architecture)
    RTN(bits=8, group_size=16).quantize_model_(model)
    modules = ["q_proj", "down_proj"] if architecture == "llama" else ["c_attn", "c_proj"]
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    ids = torch.arange(20).view(2, 10) + 3
    output = adapted(input_ids=ids, labels=ids)
    output.loss.backward()
    trained = [p for n, p in adapted.named_parameters() if "lora" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with adapted.disable_adapter(), torch.no_grad():
        plain = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        change = (merged(input_ids=ids).logits - output.logits).abs().max()
    assert any(isinstance(m, CompressedLinear) for m in merged.modules())
    assert change < 0.02 * (output.logits - plain).abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dequantize_gives_ordinary_layers_with_the_same_logits(architecture, tmp_path):
    model = tiny_model(architecture)
    kinds = [type(m) for m in model.modules()]
    RTN(bits=4, group_size=32).quantize_model_(model)
    ids = torch.arange(20).view(2, 10) + 3
    with torch.no_grad():
        packed = model(input_ids=ids).logits
        model.dequantize()
        dense = model(input_ids=ids).logits
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(dense, packed, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, dense)
