"""Kernel choices: the same numbers in another layout, one parameter after the other, and products by look-up."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.slots import conflict
from pintpot.core.work import PhaseWork, Work
from pintpot.core.workload import Generate
from pintpot.kernels import native
from pintpot.ledger.tracker import Tracker
from pintpot.weights import PintpotConfig
from pintpot.weights.awq import AWQ
from pintpot.weights.formats import BitPlanes, Grid, LowRank, Rotated, RoundedInput, Scaled
from pintpot.weights.formats.relaid_grid import PACKING_BYTES
from pintpot.weights.modules import PackedTerms
from pintpot.weights.rtn import RTN
from pintpot.weights.t_mac import TMac
from tests.architectures import tiny_config, tiny_model

IDS = torch.arange(12).view(2, 6) + 3


def packed_model(architecture="llama", **settings):
    model = tiny_model(architecture)
    RTN(**{"bits": 4, "group_size": 32, **settings}).quantize_model_(model)
    return model


def holders(model):
    return [module for module in model.modules() if isinstance(module, PackedTerms)]


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_numbers_stay_and_their_order_changes(bits, architecture):
    model = packed_model(architecture, bits=bits)
    before = [[layout.decode(t, m.columns, torch.float32) for layout, t in m.stored(r)] for m, r in each_matrix(model)]
    kept = [m._buffers["term0_scale"].data_ptr() for m in holders(model)]
    exact = logits_of(model)
    TMac().apply_(model)
    after = [[layout.decode(t, m.columns, torch.float32) for layout, t in m.stored(r)] for m, r in each_matrix(model)]
    assert all(isinstance(m.formats[0], BitPlanes) and "term0_packed" not in m._buffers for m in holders(model))
    assert all(torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
    if architecture != "mixtral":
        assert kept == [m._buffers["term0_scale"].data_ptr() for m in holders(model)]
    # Many rows at once use the numbers themselves, few rows 8-bit tables.
    many, plain = IDS.repeat(1, 2), packed_model(architecture, bits=bits)
    torch.testing.assert_close(logits_of(model, many), logits_of(plain, many), rtol=1e-4, atol=1e-4)
    few, expected = logits_of(model, IDS[:1]), exact[:1]
    assert 0 < (few - expected).norm() < 0.05 * expected.norm()


def each_matrix(model):
    for module in holders(model):
        stacked = module._buffers["term0_scale"].dim() == 3
        for row in range(module._buffers["term0_scale"].shape[0]) if stacked else (None,):
            yield module, row


def test_bytes_are_those_of_the_formula():
    grid, planes = Grid(bits=3, group_size=32), BitPlanes(bits=3, group_size=32)
    assert planes.nbytes(64, 128) == grid.nbytes(64, 128)
    # 40 rows are padded to 64, and 10 columns of a group to 12.
    assert BitPlanes(bits=2, group_size=10).nbytes(40, 30) == 2 * 16 * 2 * 9 + 40 * (2 * 3 + 1)
    with pytest.raises(ShapeError, match="5"):
        BitPlanes(bits=5)
    assert BitPlanes.of(Grid(bits=8)) is None


def test_one_parameter_is_there_twice_at_a_time():
    model = packed_model()
    sizes = [m.in_features * m.out_features for m in holders(model)]
    with Tracker(device="cpu") as tracker:
        tracker.register(model, None)
        before = tracker.ledger().peak_bytes()
        TMac().apply_(model)
    assert tracker.ledger().peak_bytes() - before < (0.5 + PACKING_BYTES) * max(sizes)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (Scaled(inner=Grid(bits=4, group_size=32)), Scaled),
        (Rotated(inner=Scaled(inner=Grid(bits=2, group_size=32)), block=32), Rotated),
        (RoundedInput(inner=Grid(bits=4, group_size=32)), RoundedInput),
    ],
)
def test_what_is_done_to_the_input_stays(layout, kind):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    stored, choice = layout.encode(weight), TMac()
    held = choice.held(layout)
    made = choice.relaid(layout, stored, 64)
    assert isinstance(held, kind)
    assert {k: (tuple(t.shape), t.dtype) for k, t in made.items()} == held.storage(48, 64)
    assert torch.equal(held.decode(made, 64, torch.float32), layout.decode(stored, 64, torch.float32))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    exact = layout.matmul(x, stored)
    assert (held.matmul(x, made) - exact).norm() < 0.02 * exact.norm()


def test_other_formats_are_left_alone():
    assert TMac().held(Grid(bits=8)) is None
    assert TMac().held(Scaled(inner=Grid(bits=5))) is None
    assert TMac().held(LowRank(rank=4)) is None


def test_a_model_without_grids_is_refused():
    for model in (tiny_model("llama"), packed_model(bits=8)):
        with pytest.raises(CompositionError, match="no packed weights") as caught:
            TMac().apply_(model)
        assert "rtn(bits=4)*t-mac" in caught.value.hint
    shape = ModelShape.from_config(tiny_config("llama"))
    dense = Ledger("predicted", (Moment("decode", {}).with_bytes(Account.WEIGHTS, shape.weight_bytes),))
    with pytest.raises(CompositionError, match="no packed weights"):
        TMac().predict(dense, shape, Generate())


def test_it_stands_beside_any_method_and_not_beside_another_kernel():
    assert not conflict(TMac(), RTN())
    assert not conflict(TMac(), AWQ())
    assert conflict(TMac(), TMac())


def test_shapes_alone_have_the_same_bytes():
    real = packed_model(bits=3)
    TMac().apply_(real)
    with FakeTensorMode():
        fake = ModelShape.from_config(tiny_config("llama")).build("cpu")
        RTN(bits=3, group_size=32).prepare_skeleton_(fake)
        TMac().apply_(fake)
        assert logits_of(fake, torch.zeros(1, 1, dtype=torch.long)).shape == (1, 1, 256)
    sizes = [[(n, tuple(b.shape), b.dtype) for n, b in m.named_buffers()] for m in (real, fake)]
    assert sizes[0] == sizes[1]


class Compressed(ModelShape):
    """A shape whose weights are packed from the start."""

    def build(self, device: str = "meta"):
        model = super().build(device)
        PintpotConfig.of(RTN(bits=2, group_size=32)).prepare_skeleton_(model)
        return model


def test_a_compressed_model_does_fewer_operations_for_fewer_bits():
    shape = Compressed.from_config(tiny_config("llama"))
    numbers = sum(p.numel for p in ModelShape.from_config(shape.config).linears())
    workload = Generate(batch=2, prompt_tokens=64, new_tokens=8)
    plain = Work({name: PhaseWork(flops={"float32": 1e9}) for name in ("prefill", "decode")})
    work = TMac().work(plain, shape, workload)
    # Two planes and four columns a look-up: half a look-up and sum for each number.
    assert plain.phases["decode"].flops["float32"] - work.phases["decode"].flops["float32"] == 2 * numbers * 2 * 0.5
    assert work.phases["prefill"] == plain.phases["prefill"]
    before = Ledger("predicted", tuple(Moment(p, {}).with_bytes(Account.WEIGHTS, 10**6) for p in ("load", "decode")))
    after = TMac().predict(before, shape, workload)
    assert after.phase("load").of(Account.WORKSPACE) > 0
    assert after.phase("decode").of(Account.WEIGHTS) >= 10**6


def test_without_the_library_the_definition_looks_up_the_same(monkeypatch):
    model = packed_model(bits=2)
    TMac().apply_(model)
    compiled = logits_of(model, IDS[:1])
    monkeypatch.setattr(native, "library", lambda: None)
    torch.testing.assert_close(logits_of(model, IDS[:1]), compiled, rtol=1e-3, atol=1e-4)
