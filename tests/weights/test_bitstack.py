"""BitStack: residual blocks that count active channels for more, one order over the model, one folder of any size."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.model_folder import open_model
from pintpot.weights import compress_folder, load_compressed
from pintpot.weights.bitstack import BitStack, block_order, decompose, input_scale
from pintpot.weights.formats import SignRank
from pintpot.weights.modules import PackedTerms
from pintpot.weights.quantizer import PintpotConfig
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.rtn import RTN
from pintpot.weights.sorting import sort_terms_
from pintpot.weights.statistics import InputStatistics
from tests.architectures import tiny_model

METHOD = BitStack(blocks=3, rank=2)


def weight(rows: int = 20, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def inputs(columns: int = 32) -> InputStatistics:
    rows = torch.randn(200, columns, generator=torch.Generator().manual_seed(1))
    rows[:, ::4] *= 10
    seen = InputStatistics.empty(columns, rows.device)
    seen.add_(rows)
    return seen


def texts() -> list[torch.Tensor]:
    return [torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))]


def held_bytes(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *(b for m in model.modules() if isinstance(m, PackedTerms) for b in m.buffers())]
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bitstack")
    tiny_model("llama").save_pretrained(folder / "dense")
    compress_folder(folder / "dense", folder / "packed", METHOD, texts=texts())
    return folder / "packed"


def test_blocks_are_the_iterative_absolute_value_decomposition():
    stack, scale = [SignRank(rank=2)] * 3, input_scale(weight(), inputs())
    found = list(decompose(weight(), stack, scale))
    rest = weight().double() * scale.double()
    for tensors, left_over in found:
        left, values, right = torch.linalg.svd(rest.abs(), full_matrices=False)
        block = torch.where(rest >= 0, 1.0, -1.0) * ((left[:, :2] * values[:2]) @ right[:2])
        held = SignRank(rank=2).decode(tensors, 32, torch.float32).double() * scale.double()
        # Factors are stored with 11 bits.
        assert (held - block).norm() < 2e-3 * block.norm()
        rest = rest - block
        torch.testing.assert_close(left_over.double() * scale.double(), rest, rtol=0, atol=0.01)


def test_channels_count_by_their_activations():
    seen, formats = inputs(), (SignRank(rank=2),) * 2

    def error(statistics: InputStatistics | None) -> float:
        terms = METHOD.find("w", weight(), formats, statistics)
        held = sum(SignRank(rank=2).decode(t, 32, torch.float32) for t in terms)
        return float(seen.error(held - weight()).sum())

    assert error(seen) < 0.75 * error(None)


def test_channels_that_are_never_active_do_no_harm():
    seen = inputs()
    seen.hessian[3], seen.hessian[:, 3] = 0, 0
    terms = METHOD.find("w", weight(), (SignRank(rank=2),) * 3, seen)
    assert all(torch.isfinite(t).all() for term in terms for t in term.values())


def test_evidence_is_the_share_of_output_energy_that_each_block_wins():
    won = METHOD.examine("w", weight(), inputs())["won"]
    terms = METHOD.find("w", weight(), METHOD.terms("w", 20, 32, torch.float32), inputs())
    held = sum(SignRank(rank=2).decode(t, 32, torch.float32) for t in terms)
    left = inputs().error(weight() - held).sum() / inputs().error(weight()).sum()
    assert won.shape == (3,)
    torch.testing.assert_close(1 - won.sum(), left, rtol=1e-3, atol=1e-5)
    assert torch.equal(METHOD.examine("w", torch.zeros(20, 32), None)["won"], torch.zeros(3))


def test_order_is_by_height_and_then_by_what_a_byte_wins():
    won = {"a": torch.tensor([0.5, 0.2, 0.1]), "b": torch.tensor([0.5, 0.3, 0.02]), "c": torch.tensor([0.5, 0.5, 0.5])}
    assert block_order(won, {"a": 1, "b": 1, "c": 4}) == ("b", "a", "c", "c", "a", "b")


def test_a_prefix_of_the_order_fits_and_one_block_more_does_not():
    one = SignRank()
    layout = RankedLayout({"a": (one,) * 3, "b": (one,) * 2}, ["b", "a", "a"])
    sizes = {"a": [10, 10, 10], "b": [5, 5]}
    for size, kept in ((15, (1, 1)), (19, (1, 1)), (20, (1, 2)), (30, (2, 2)), (39, (2, 2)), (99, (3, 2))):
        part = layout.within(sizes, size)
        assert (len(part["a"]), len(part["b"])) == kept
        assert len(part.order) == sum(kept) - 2
    with pytest.raises(BudgetError, match="first terms"):
        layout.within(sizes, 14)


def test_one_folder_is_loaded_in_any_size(packed, tmp_path):
    whole, ids = load_compressed(packed), texts()[0]
    full = held_bytes(whole)
    assert full == open_model(packed).weight_bytes
    dense = tiny_model("llama")(ids).logits
    dense, errors, sizes = dense.detach(), [], []
    smallest = full - sum(
        b.nbytes for m in whole.modules() if isinstance(m, PackedTerms) for n, b in m.named_buffers() if n[4] != "0"
    )
    for size in (smallest, (smallest + full) // 2, full - 1, full):
        model = load_compressed(packed, size_bytes=size)
        sizes.append(held_bytes(model))
        assert sizes[-1] <= size
        heights = [len(m.formats) for m in model.modules() if isinstance(m, PackedTerms)]
        assert max(heights) - min(heights) <= 1
        errors.append(float((model(ids).logits.detach() - dense).norm()))
    assert sizes[0] == smallest
    assert sizes[-1] == full
    assert sizes == sorted(set(sizes))
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    with pytest.raises(BudgetError):
        load_compressed(packed, size_bytes=smallest - 1)

    part = load_compressed(packed, size_bytes=sizes[1])
    part.save_pretrained(tmp_path / "part")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert torch.equal(again(ids).logits, part(ids).logits)
    less = load_compressed(tmp_path / "part", size_bytes=smallest)
    assert torch.equal(less(ids).logits, load_compressed(packed, size_bytes=smallest)(ids).logits)


def test_blocks_that_are_left_off_are_not_read(packed, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    opened = open_model(folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    smallest = sum(e.nbytes for name, e in opened.entries.items() if "term1" not in name and "term2" not in name)
    for name, entry in opened.entries.items():
        if "term1_left" in name or "term2_left" in name:
            data[entry.offset : entry.offset + entry.nbytes] = b"\xff" * entry.nbytes
    (folder / "model.safetensors").write_bytes(data)
    assert torch.isfinite(load_compressed(folder, size_bytes=smallest)(texts()[0]).logits).all()


def test_sorting_puts_first_what_lowers_the_loss_of_the_whole_model_most(packed, tmp_path):
    folder, ids = tmp_path / "packed", texts()[0]
    shutil.copytree(packed, folder)
    found = sort_terms_(folder, texts())
    before = PintpotConfig(**open_model(packed).quantization).read_layout()
    assert found == before
    assert sorted(found.order) == sorted(before.order)
    stacks = list(found)
    assert set(found.order[: len(stacks)]) == set(found.order[len(stacks) :]) == set(stacks)

    whole, dense = load_compressed(packed), tiny_model("llama")
    held = {n: [f.decode(t, f_in, torch.float32) for f, t, f_in in _terms(whole, n)] for n in stacks}
    losses = []
    for name in found.order[: len(stacks)]:
        state = {n: sum(held[n][: 2 if n == name else 1]) for n in stacks}
        dense.load_state_dict(state, strict=False)
        with torch.no_grad():
            losses.append(float(dense(input_ids=ids, labels=ids).loss))
    # Products of packed and of dense weights differ by rounding.
    assert all(one <= other + 1e-5 for one, other in itertools.pairwise(losses))
    assert losses[0] < losses[-1]
    assert PintpotConfig(**open_model(folder).quantization).read_layout().order == found.order
    assert torch.equal(load_compressed(folder)(ids).logits, whole(ids).logits)


def _terms(model, name):
    module = model.get_submodule(name.removesuffix(".weight"))
    return [(layout, tensors, module.in_features) for layout, tensors in module.stored()]


def test_other_folders_have_one_size(tmp_path):
    model = tiny_model("llama")
    RTN().quantize_model_(model)
    model.save_pretrained(tmp_path / "rtn")
    with pytest.raises(CompositionError, match="one size only"):
        load_compressed(tmp_path / "rtn", size_bytes=1 << 30)
    with pytest.raises(CompositionError, match="does not rank"):
        sort_terms_(tmp_path / "rtn", texts())
    with pytest.raises(CompositionError, match="at least one"):
        BitStack(blocks=0)
