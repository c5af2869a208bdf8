"""VPTQ against a plain float64 reference, and what each of its parts is for."""

from dataclasses import replace

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.weights.clustering import cluster, nearest
from pintpot.weights.formats import Codebook, Scaled, SplitInput, Transposed
from pintpot.weights.gptq import GPTQ
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.vptq import VPTQ

ROWS, COLUMNS = 96, 48


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = COLUMNS) -> InputStatistics:
    """Inputs that go together, some of them large."""
    inputs = InputStatistics.empty(columns, torch.device("cpu"))
    size = torch.ones(columns)
    size[::8] = 6.0
    inputs.add_(numbers(400, columns // 3, seed=1) @ numbers(columns // 3, columns, seed=2) * size)
    inputs.add_(numbers(400, columns, seed=3) * size)
    return inputs


def result(method: VPTQ, weight: torch.Tensor, inputs: InputStatistics | None):
    formats = method.terms("layer.weight", *weight.shape, torch.float32)
    (stored,) = method.find("layer.weight", weight, formats, inputs)
    return formats[0], stored, formats[0].decode(stored, weight.shape[1], torch.float32)


SMALL = VPTQ(vector_length=4, index_bits=6, book_share=1.0)


def test_channels_are_rounded_as_the_plain_algorithm_does():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    method = replace(SMALL, channel_scales=False, activation_order=False)
    layout, stored, found = result(method, weight, inputs)
    assert layout == Transposed(inner=Codebook(vector_length=4, index_bits=6), out_features_held=ROWS)
    entries = stored["inner_entries"].double()

    hessian = inputs.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    left, expected = weight.double().clone(), torch.empty(ROWS, COLUMNS).double()
    for column in range(COLUMNS):
        inverse = torch.linalg.inv(hessian[column:, column:])
        vectors = left[:, column].view(-1, 4)
        expected[:, column] = entries[torch.cdist(vectors, entries).argmin(1)].flatten()
        error = (left[:, column] - expected[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    torch.testing.assert_close(found.double(), expected)


def test_an_error_is_made_up_for_by_the_channels_after_it():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    alone = InputStatistics.empty(COLUMNS, torch.device("cpu"))
    alone.hessian.copy_(torch.diag(inputs.hessian.diagonal()))
    with_it, without = (result(SMALL, weight, seen)[2] for seen in (inputs, alone))
    assert inputs.error(weight - with_it).sum() < 0.8 * inputs.error(weight - without).sum()


def test_k_means_weighs_channels_by_their_inputs():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    large = inputs.hessian.diagonal() > 10
    weight[:, large] += 3
    equal = InputStatistics.empty(COLUMNS, torch.device("cpu"))
    equal.hessian.copy_(torch.eye(COLUMNS))
    inputs.hessian.copy_(torch.diag(inputs.hessian.diagonal()))
    method = replace(SMALL, channel_scales=False)
    errors = [(result(method, weight, seen)[2] - weight)[:, large].norm() for seen in (inputs, equal)]
    assert errors[0] < 0.98 * errors[1]


def test_the_residual_codebook_holds_what_the_first_leaves_over():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    one = result(SMALL, weight, inputs)[2]
    _, stored, two = result(replace(SMALL, residual_bits=4, book_share=2.0), weight, inputs)
    assert stored["inner_inner_residual_entries"].shape == (16, 4)
    assert inputs.error(weight - two).sum() < 0.6 * inputs.error(weight - one).sum()


def test_outliers_are_the_channels_with_the_largest_inputs_and_lose_less():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    method = replace(SMALL, outlier_share=0.125, outlier_length=2, outlier_bits=6)
    layout, stored, found = result(method, weight, inputs)
    assert isinstance(layout, Scaled)
    assert isinstance(layout.inner, SplitInput)
    assert layout.inner.counts == (6, 42)
    largest = inputs.hessian.diagonal().argsort(descending=True)[:6]
    assert torch.equal(stored["inner_order"][:6].long(), largest)
    plain = result(SMALL, weight, inputs)[2]
    assert (found - weight)[:, largest].norm() < 0.7 * (plain - weight)[:, largest].norm()


def test_channels_of_unlike_spread_share_a_codebook_by_their_scales():
    weight = numbers(ROWS, COLUMNS) * torch.linspace(0.05, 4, COLUMNS)
    inputs = correlated()
    errors = [inputs.error(weight - result(replace(SMALL, channel_scales=s), weight, inputs)[2]).sum() for s in (1, 0)]
    assert errors[0] < errors[1]


def test_loses_less_than_a_grid_in_no_more_bytes():
    weight, inputs = numbers(256, 96), correlated(96)
    method = VPTQ(vector_length=4, index_bits=8)
    layout, _, found = result(method, weight, inputs)
    gptq = GPTQ(bits=2, group_size=48)
    (grid,) = gptq.terms("layer.weight", 256, 96, torch.float32)
    (codes,) = gptq.find("layer.weight", weight, (grid,), inputs)
    assert layout.nbytes(256, 96) <= grid.nbytes(256, 96)
    on_grid = grid.decode(codes, 96, torch.float32)
    assert inputs.error(weight - found).sum() < 0.9 * inputs.error(weight - on_grid).sum()


def test_small_matrices_have_short_vectors_at_the_same_bits():
    method = VPTQ(vector_length=8, index_bits=16, channel_scales=False)
    for size, length in ((4096, 8), (512, 5), (64, 2)):
        (layout,) = method.terms("layer.weight", size, size, torch.float32)
        assert layout.inner == Codebook(vector_length=length, index_bits=2 * length)


def test_inputs_that_are_always_zero_and_channels_without_spread_do_no_harm():
    weight, inputs = numbers(ROWS, COLUMNS), correlated()
    inputs.hessian[3] = inputs.hessian[:, 3] = 0
    weight[:, 5] = 0.25
    found = result(SMALL, weight, inputs)[2]
    assert torch.isfinite(found).all()


def test_experts_that_met_no_token_are_rounded_to_the_nearest():
    weight = numbers(ROWS, COLUMNS)
    found = result(SMALL, weight, None)[2]
    assert (found - weight).norm() < 0.6 * weight.norm()


def test_refuses_what_it_cannot_do():
    with pytest.raises(ShapeError, match="1 to 16 bits"):
        VPTQ(index_bits=17)
    with pytest.raises(CompositionError, match="outlier_share"):
        VPTQ(outlier_share=1.0)


class TestCluster:
    def test_finds_clusters_that_are_there(self):
        centres = 10 * numbers(5, 3, seed=4)
        vectors = centres.repeat(40, 1) + 0.01 * numbers(200, 3, seed=5)
        entries = cluster(vectors, 20)
        assert torch.cdist(centres, entries).amin(1).max() < 0.05

    def test_centres_are_weighted_means(self):
        vectors, weight = numbers(60, 2, seed=6), torch.rand(60, generator=torch.Generator().manual_seed(7))
        entries = cluster(vectors, 4, weight)
        own = nearest(vectors, entries)
        for entry in range(4):
            mine = own == entry
            mean = (vectors[mine].double() * weight[mine, None]).sum(0) / weight[mine].sum()
            torch.testing.assert_close(entries[entry].double(), mean, rtol=1e-3, atol=1e-3)

    def test_more_entries_than_vectors_hold_every_vector(self):
        vectors = numbers(3, 2)
        entries = cluster(vectors, 8)
        torch.testing.assert_close(entries[nearest(vectors, entries)], vectors)

    def test_does_not_touch_the_global_generator(self):
        before = torch.get_rng_state()
        assert torch.equal(cluster(numbers(50, 2), 4), cluster(numbers(50, 2), 4))
        assert torch.equal(torch.get_rng_state(), before)
