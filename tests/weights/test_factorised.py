"""LoRD, WeLore, Greenformers and LoRC: what each paper is about, and the path from a folder to a smaller one."""

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError, UnsupportedModel
from pintpot.weights.formats import Dense, Grid, LowRank
from pintpot.weights.greenformers import Greenformers, semi_nmf
from pintpot.weights.load import load_compressed
from pintpot.weights.lord import LoRD
from pintpot.weights.modules import CompressedLinear
from pintpot.weights.ranks import parity_rank
from pintpot.weights.rtn import RTN
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.streaming import compress_folder
from pintpot.weights.targets import find_targets
from pintpot.weights.welore import WeLore
from pintpot.weights.zeroquant_v2_lorc import ZeroQuantV2LoRC
from tests.architectures import tiny_model


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def of_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    return matrix(rows, rank, seed) @ matrix(rank, columns, seed + 1) / rank**0.5


def decoded(method, weight, inputs=None) -> torch.Tensor:
    formats = method.terms("w", *weight.shape, weight.dtype)
    found = method.find("w", weight, formats, inputs)
    return sum(f.decode(t, weight.shape[1], torch.float32) for f, t in zip(formats, found, strict=True))


def correlated_inputs(columns: int) -> InputStatistics:
    inputs = InputStatistics.empty(columns, torch.device("cpu"))
    inputs.add_(matrix(512, columns, 3) @ (matrix(columns, columns, 4) * torch.logspace(-1, 1, columns)))
    return inputs


class TestLoRC:
    def test_the_factors_hold_the_leading_part_of_the_rounding_error(self):
        weight = matrix(96, 128)
        weight[:8] *= 8
        method = ZeroQuantV2LoRC(bits=3, group_size=128)
        grid = decoded(RTN(bits=3, group_size=128), weight)
        error = (weight - grid).double()
        left = torch.linalg.svdvals(error)[8:].square().sum()
        kept = (weight - decoded(method, weight)).double().square().sum()
        assert kept == pytest.approx(float(left), rel=0.02)
        assert kept < 0.7 * error.square().sum()

    def test_bytes_by_the_formula(self):
        grid, low = ZeroQuantV2LoRC().terms("w", 256, 512, torch.float32)
        assert isinstance(grid, Grid)
        assert isinstance(low, LowRank)
        assert low.nbytes(256, 512) == 256 * (8 + 2) + 8 * (512 + 2)

    def test_the_rank_follows_small_matrices(self):
        assert ZeroQuantV2LoRC(rank=8).terms("w", 16, 512, torch.float32)[1].rank == 2
        with pytest.raises(ShapeError, match="rank of 1 or more"):
            ZeroQuantV2LoRC(rank=0)


class TestLoRD:
    def test_outputs_lose_less_than_by_the_singular_vectors_of_the_weight(self):
        weight, inputs = matrix(64, 128), correlated_inputs(128)
        method = LoRD(kept_rank_fraction=0.4)
        seen = inputs.error(weight - decoded(method, weight, inputs)).sum()
        blind = inputs.error(weight - decoded(method, weight)).sum()
        assert seen < 0.5 * blind

    def test_what_would_not_get_smaller_stays_dense(self):
        model = tiny_model("llama")
        targets, _ = find_targets(model)
        method = LoRD(kept_rank_fraction=0.6)
        layout = method.layout(targets)
        assert "model.layers.0.self_attn.o_proj.weight" not in layout
        assert layout["model.layers.0.mlp.up_proj.weight"][0].rank == 38
        with pytest.raises(UnsupportedModel, match="no matrix gets smaller"):
            LoRD(kept_rank_fraction=0.99).layout(targets)
        assert method.terms("w", 64, 64, torch.float32) == (Dense(),)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
    def test_refuses_what_is_no_share(self, fraction):
        with pytest.raises(ShapeError, match="share of the full rank"):
            LoRD(kept_rank_fraction=fraction)


class TestWeLore:
    def layout(self, weights: dict[str, torch.Tensor], **fields):
        model = tiny_model("llama")
        targets = [t for t in find_targets(model)[0] if t.parameter in weights]
        method = WeLore(**fields)
        evidence = {name: method.examine(name, weight, None) for name, weight in weights.items()}
        layout = method.layout(targets, evidence)
        budget = sum(t.nbytes(method.layout(targets)[t.parameter]) for t in targets)
        assert sum(t.nbytes(layout[t.parameter]) for t in targets) == budget
        return layout

    def test_low_rank_components_give_their_bytes_to_the_others(self):
        low = {f"model.layers.0.self_attn.{n}_proj.weight": of_rank(64, 64, 5) for n in "qo"}
        high = {"model.layers.1.self_attn.q_proj.weight": torch.linalg.qr(matrix(64, 64))[0]}
        layout = self.layout(low | high, kept_fraction=0.48)
        assert [layout[name][0].rank for name in low] == [5, 5]
        # Its singular values are all alike, so that one threshold takes all of them or none: it stays dense.
        assert isinstance(layout[next(iter(high))][0], Dense)

    def test_one_threshold_for_all(self):
        names = [f"model.layers.{i}.mlp.{n}_proj.weight" for i in range(2) for n in ("up", "down")]
        weights = {}
        for i, name in enumerate(names):
            u, _, v = torch.linalg.svd(matrix(*((64, 128) if "down" in name else (128, 64)), seed=i), False)
            weights[name] = u * torch.logspace(0, -(i + 1) / 2, 64) @ v
        layout = self.layout(weights, kept_fraction=0.5)
        method = WeLore()
        ranks = {name: layout[name][0].rank for name in names}
        values = {name: method.examine(name, w, None)["normalised"] for name, w in weights.items()}
        lowest = min(float(values[n][r - 1]) for n, r in ranks.items())
        highest = max(float(values[n][r]) for n, r in ranks.items() if r < parity_rank(64, 128))
        assert lowest >= 0.9 * highest
        assert len(set(ranks.values())) == len(names)


class TestGreenformers:
    def test_semi_nmf_keeps_one_factor_from_being_negative_and_gets_better(self):
        weight = matrix(40, 64)
        errors = []
        for iterations in (0, 5, 20):
            left, right = semi_nmf(weight, 12, iterations)
            assert (left >= 0).all()
            errors.append(float((weight - left @ right).norm()))
        assert errors[2] < errors[1] < errors[0] < float(weight.norm())

    def test_random_factors_follow_the_seed_and_the_name(self):
        weight = matrix(32, 64)
        one, two = (Greenformers(solver="random", seed=s).factors("a", weight, 4)[0] for s in (0, 1))
        assert torch.equal(one, Greenformers(solver="random").factors("a", weight, 4)[0])
        assert not torch.equal(one, two)
        assert not torch.equal(one, Greenformers(solver="random").factors("b", weight, 4)[0])

    def test_refuses_an_unknown_solver(self):
        with pytest.raises(CompositionError, match="svd, snmf, random"):
            Greenformers(solver="nmf")

    def test_a_model_of_low_rank_is_held_without_loss_in_fewer_bytes(self, tmp_path):
        model = tiny_model("llama")
        for target in find_targets(model)[0]:
            model.get_parameter(target.parameter).data.copy_(of_rank(*target.shape, 4) * 0.02)
        model.save_pretrained(tmp_path / "dense")
        ids = torch.arange(20).view(2, 10) + 3
        with torch.no_grad():
            before = model(ids).logits
        report = compress_folder(tmp_path / "dense", tmp_path / "small", Greenformers(kept_fraction=0.4))
        small = load_compressed(tmp_path / "small")
        with torch.no_grad():
            after = small(ids).logits
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert report.packed_bytes < 0.41 * report.dense_bytes
        assert isinstance(small.model.layers[0].self_attn.q_proj, CompressedLinear)
