"""Models of hardware that looks sums up: what they forecast beside what the papers state, and that they say so."""

import pytest

from pintpot.core.errors import CompositionError
from pintpot.core.registry import get
from pintpot.core.slots import conflict
from pintpot.core.technique import Saving
from pintpot.weights.formats import BitPlanes, Grid, Scaled
from pintpot.weights.lut_tensor_core import LutTensorCore
from pintpot.weights.sail import Sail
from pintpot.weights.t_mac import TMac


def claim(name, metric):
    return next(c.figure for c in get(name).facts.claims if c.metric == metric)


def test_one_adder_takes_the_place_of_four_multipliers_and_adders():
    unit = LutTensorCore()
    assert unit.compute_density(1) == pytest.approx(4 * 3000 / 1360)
    assert unit.energy_efficiency(1) == pytest.approx(4 * 1.5 / 0.4)
    for bits in (2, 3, 4):
        assert unit.compute_density(bits) == pytest.approx(unit.compute_density(1) / bits)


def test_ratios_beside_those_that_are_reported_of_the_paper():
    """Energy within 35 %. Density is less than half: the model has no parts but adders and multipliers."""
    unit = LutTensorCore()
    energy, density = (claim("lut-tensor-core", m) for m in ("energy efficiency, times", "compute density, times"))
    assert unit.energy_efficiency(1) / energy == pytest.approx(1, abs=0.35)
    assert 0.4 < unit.compute_density(1) / density < 0.45
    stated = claim("lut-tensor-core", "density and efficiency, times, more than")
    assert unit.energy_efficiency(1) > stated > unit.compute_density(1)


def test_tables_are_built_once_for_a_batch():
    cache = Sail()
    # 16 sums of 4 weights, of which 5 are there; then an addition a bit of an input instead of four.
    assert cache.additions(1) == pytest.approx(11 + 8 * 0.862)
    assert cache.additions_without_tables(1) == 32
    ratios = [cache.of_bits(4, rows) for rows in (1, 2, 8, 32)]
    assert ratios == sorted(ratios, reverse=True)
    assert 1 / ratios[-1] < 4 / (1 - claim("sail", "cycles saved by patterns"))
    assert cache.of_bits(2, 8) == cache.of_bits(4, 8)


def test_the_speed_up_of_the_paper_is_not_claimed_for_the_model():
    assert 1 / Sail().of_bits(4, 32) < 0.5 * claim("sail", "speed-up")
    assert "could not be seen" in Sail.facts.fidelity


@pytest.mark.parametrize("kind", [LutTensorCore, Sail])
def test_it_says_that_it_is_simulated_and_computes_by_bit_planes(kind):
    assert kind.facts.saving is Saving.SIMULATED
    assert isinstance(kind().held(Grid(bits=2)), BitPlanes)
    assert kind().relative_operations(Scaled(inner=BitPlanes(bits=1)), 1) < 1
    assert conflict(kind(), TMac())


def test_settings_are_checked():
    with pytest.raises(CompositionError, match="9 weights"):
        Sail(table_weights=9)
