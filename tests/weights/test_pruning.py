"""Endor, Flash-LLM and GQSA: what is cut, what makes up for it, and the path from a folder to generated text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot.core.errors import CompositionError
from pintpot.weights import compress_folder
from pintpot.weights.endor import Endor
from pintpot.weights.flash_llm import FlashLLM
from pintpot.weights.formats import Dense, Grid, Sparse
from pintpot.weights.gqsa import GQSA
from pintpot.weights.modules import PackedTerms
from pintpot.weights.pruning import cut_with_compensation, input_weighted_score, inverse_hessian_score
from pintpot.weights.statistics import InputStatistics
from tests.architectures import tiny_model


def inputs_of(columns: int, seed: int = 0) -> tuple[torch.Tensor, InputStatistics]:
    """Inputs that go together, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 3, columns, generator=generator)
    inputs = torch.randn(400, columns // 3, generator=generator) @ mixing
    inputs += 0.3 * torch.randn(400, columns, generator=generator)
    inputs[:, ::7] *= 6
    statistics = InputStatistics.empty(columns, torch.device("cpu"))
    statistics.add_(inputs)
    return inputs, statistics


def weight(rows: int = 40, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


def output_error(method, dense: torch.Tensor, inputs: torch.Tensor, statistics: InputStatistics | None) -> float:
    (layout,) = method.terms("layer.weight", *dense.shape, torch.float32)
    (stored,) = method.find("layer.weight", dense, (layout,), statistics)
    held = layout.decode(stored, dense.shape[1], torch.float64)
    return float(
        ((inputs.double() @ (held - dense.double()).T) ** 2).sum() / ((inputs.double() @ dense.double().T) ** 2).sum()
    )


def test_scores_are_those_of_the_papers():
    inputs, statistics = inputs_of(24)
    dense = weight(8, 24)
    hessian = (inputs.double().T @ inputs.double()) / 400
    wanda = dense.double().abs() * inputs.double().norm(dim=0) / 20
    torch.testing.assert_close(input_weighted_score(dense, statistics).double(), wanda, rtol=1e-4, atol=1e-5)
    assert torch.equal(input_weighted_score(dense, None), dense.abs())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    saliency = (dense.double() / torch.linalg.inv(damped).diagonal()) ** 2
    torch.testing.assert_close(
        inverse_hessian_score(dense, statistics.hessian, 0.01).double(), saliency, rtol=1e-2, atol=1e-5
    )


def test_compensation_is_the_best_change_of_later_columns():
    inputs, statistics = inputs_of(12)
    dense = weight(3, 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, 0] = False
    cut = cut_with_compensation(dense, mask, statistics.hessian, 1e-6)
    x = inputs.double()
    # With one column cut, the others are the least-squares fit of the output without it.
    best = torch.linalg.lstsq(x[:, 1:], x @ dense.double().T).solution.T
    torch.testing.assert_close(cut[:, 1:].double(), best, rtol=5e-3, atol=5e-3)
    assert (cut[:, 0] == 0).all()


@pytest.mark.parametrize("kind", [Endor, FlashLLM, GQSA])
def test_inputs_tell_what_matters(kind):
    inputs, statistics = inputs_of(96)
    method = kind(kept_fraction=0.5)
    informed = output_error(method, weight(), inputs, statistics)
    assert informed < 0.6 * output_error(method, weight(), inputs, None)


def test_compensation_lowers_the_error():
    inputs, statistics = inputs_of(96)
    plain = output_error(Endor(compensate=False), weight(), inputs, statistics)
    assert output_error(Endor(), weight(), inputs, statistics) < 0.6 * plain


def test_endor_keeps_exactly_its_share_and_on_a_grid_nearly_the_same():
    inputs, statistics = inputs_of(96)
    for kept in (0.3, 0.5):
        method = Endor(kept_fraction=kept)
        (layout,) = method.terms("layer.weight", 40, 96, torch.bfloat16)
        assert layout.values == Dense(dtype=torch.bfloat16)
        (stored,) = method.find("layer.weight", weight(), (layout,), statistics)
        held = layout.decode(stored, 96, torch.float32)
        assert int((held != 0).sum()) == round(kept * 40 * 96)
    exact, rounded = (output_error(Endor(bits=bits), weight(), inputs, statistics) for bits in (16, 8))
    assert rounded < 1.02 * exact
    with pytest.raises(CompositionError, match="not 12"):
        Endor(bits=12)


def test_gqsa_cuts_whole_groups_and_obeys_another_layout():
    _, statistics = inputs_of(96)
    (layout,) = GQSA().terms("layer.weight", 40, 96, torch.float32)
    (stored,) = GQSA().find("layer.weight", weight(), (layout,), statistics)
    groups = layout.decode(stored, 96, torch.float32).view(40, 6, 16)
    assert int((groups != 0).any(-1).sum()) <= 120
    assert layout.nbytes(40, 96) == sum(t.nbytes for t in stored.values())
    other = Sparse(kept_fraction=0.4, block_rows=8, block_columns=8, values=Grid(bits=3, group_size=-1))
    (stored,) = GQSA().find("layer.weight", weight(), (other,), statistics)
    assert int((other.blocks(other.decode(stored, 96, torch.float32)) != 0).any(-1).sum()) <= 5 * 5


def test_gqsa_tunes_blocks_on_their_output():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 256, (2, 32), generator=generator) for _ in range(2)]
    errors = {}
    for epochs in (0, 3):
        model = tiny_model("llama")
        with torch.no_grad():
            dense = [model(text, output_hidden_states=True).hidden_states[1] for text in texts]
            GQSA(epochs=epochs, kept_fraction=0.6).quantize_model_(model, texts)
            packed = [model(text, output_hidden_states=True).hidden_states[1] for text in texts]
        errors[epochs] = sum(float((a - b).square().sum()) for a, b in zip(dense, packed, strict=True))
        (layout,) = model.model.layers[0].self_attn.q_proj.formats
        assert isinstance(layout, Sparse)
    assert errors[3] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [Endor(), FlashLLM(), GQSA(epochs=1)], ids=str)
def test_from_a_folder_to_text_in_the_bytes_that_were_said(method, tmp_path: Path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    texts = [torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))]
    report = compress_folder(tmp_path / "dense", tmp_path / "packed", method, texts=texts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    held = sum(b.nbytes for m in model.modules() if isinstance(m, PackedTerms) for b in m.buffers(recurse=False))
    assert held == report.packed_bytes < 0.6 * report.dense_bytes
    files = sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    before = sum(p.stat().st_size for p in (tmp_path / "dense").glob("*.safetensors"))
    assert before - files > 0.9 * (report.dense_bytes - report.packed_bytes) - 16384
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
