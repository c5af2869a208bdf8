"""Rounding to formats: the neighbours in a format that is written out, compiled as defined, and random by place."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import native
from pintpot.kernels.philox import philox, random_words
from pintpot.kernels.rounding import (
    FORMATS,
    MODES,
    FixedPoint,
    Integer,
    Minifloat,
    Rounding,
    format_named,
    round_definition,
    round_to,
)

SMALL = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "q43", "q52")
ODD = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 65504, 65520, 448, 464, 3.4e38, -5])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbers(count: int = 4000, seed: int = 0) -> torch.Tensor:
    """Every kind of float32: random bits, ordinary numbers, multiples of 1/32 (often halfway), and odd ones."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, generator=generator).view(torch.float32)
    plain = torch.randn(count, generator=generator) * 4
    halfway = torch.randint(-(2**9), 2**9, (count,), generator=generator) / 32
    return torch.cat([bits, plain, halfway, ODD])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, all NaN being alike."""
    equal = (a == b) & (a.signbit() == b.signbit())
    return a.dtype == b.dtype and bool((equal | (a.isnan() & b.isnan())).all())


def magnitudes(layout: Minifloat) -> list[float]:
    """All finite magnitudes of a minifloat, from its codes."""
    bias, steps = 2 ** (layout.exponent_bits - 1) - 1, 2**layout.significand_bits
    found = []
    for exponent in range(2**layout.exponent_bits - (layout.top == "exponent")):
        for field in range(steps):
            last = exponent == 2**layout.exponent_bits - 1 and field == steps - 1
            if not (layout.top == "code" and last):
                found.append(math.ldexp((exponent > 0) + field / steps, max(exponent, 1) - bias))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_numbers_become_the_neighbours_that_each_mode_names(name):
    layout = FORMATS[name]
    table = magnitudes(layout)
    assert table[-1] == layout.largest
    x = numbers()
    x = x[x.isfinite() & (x.abs() <= layout.largest)].tolist()
    found = {mode: round_to(torch.tensor(x), layout, mode, seed=3).tolist() for mode in MODES}
    codes = {value: code for code, value in enumerate(table)}
    for place, value in enumerate(x):
        size = abs(value)
        below = max(v for v in table if v <= size)
        above = min(v for v in table if v >= size)
        near = below if size - below < above - size else above
        tie = size - below == above - size
        even = below if codes[below] % 2 == 0 else above
        up, down = (above, below) if value > 0 else (below, above)
        expected = {
            Rounding.NEAREST: even if tie else near,
            Rounding.UP: up,
            Rounding.DOWN: down,
            Rounding.TOWARD_ZERO: below,
            Rounding.TIES_TO_ZERO: below if tie else near,
            Rounding.TIES_AWAY: above if tie else near,
            Rounding.TO_ODD: below + above - even,
        }
        for mode, wanted in expected.items():
            assert found[mode][place] == math.copysign(wanted, value), (value, mode)
        assert all(abs(found[mode][place]) in (below, above) for mode in MODES)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("e5m2", None)])
def test_formats_that_torch_has_are_rounded_as_torch_does(name, dtype):
    x = numbers()
    assert same(round_to(x, FORMATS[name]), x.to(dtype or torch.float8_e5m2).float())


def test_e4m3_is_torchs_and_saturates():
    x = numbers()
    x = x[x.isfinite()]
    assert same(round_to(x, FORMATS["e4m3"]), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert round_to(torch.tensor([math.inf, -math.inf]), FORMATS["e4m3"]).tolist() == [448, -448]


def test_a_format_of_the_dtype_itself_changes_nothing():
    x = numbers()
    for mode in MODES:
        assert same(round_to(x, FORMATS["float32"], mode, seed=0), x)


def test_overflow_follows_the_direction():
    x = torch.tensor([1e6, -1e6, math.inf, -math.inf])
    layout, most = FORMATS["q43"], 240.0
    assert round_to(x, layout).tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert round_to(x, layout, "toward_zero").tolist() == [most, -most, math.inf, -math.inf]
    assert round_to(x, layout, "up").tolist() == [math.inf, -most, math.inf, -math.inf]
    assert round_to(x, layout, "down").tolist() == [most, -math.inf, math.inf, -math.inf]
    assert round_to(x, Minifloat(4, 3, saturates=True)).tolist() == [most, -most, most, -most]
    assert round_to(x, Minifloat(4, 3, top="code")).isnan().all()


def test_subnormal_numbers_can_be_flushed():
    x = torch.tensor([2.0**-6, 2.0**-6 - 1e-9, -(2.0**-7), 2.0**-9])
    assert round_to(x, Minifloat(4, 3)).tolist() == [2.0**-6, 2.0**-6, -(2.0**-7), 2.0**-9]
    assert round_to(x, Minifloat(4, 3, subnormals=False)).tolist() == [2.0**-6, 0, 0, 0]


@pytest.mark.parametrize(("before", "after"), [(4, 4), (1, 7), (8, 0), (3, 20)])
def test_fixed_point_is_multiples_of_a_step_in_a_range(before, after):
    x = numbers()
    x = x[~x.isnan()]
    steps = (x.double() * 2**after).round().clamp(-(2 ** (before + after - 1)), 2 ** (before + after - 1) - 1)
    assert torch.equal(round_to(x, FixedPoint(before, after)), (steps / 2**after).float())


def test_integers_keep_both_ends():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        step = x.abs().max() / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(round_to(x, Integer(bits)), (x / step).round() * step)
        found = round_to(x, Integer(bits, symmetric=False))
        assert found.unique().numel() <= 2**bits
        assert (found - x).abs().max() <= 0.51 * (x.max() - x.min()) / (2**bits - 1)
    assert round_to(torch.tensor([0.26, 9.0]), Integer(4, scale=0.25)).tolist() == [0.25, 1.75]
    assert not round_to(torch.zeros(3), Integer(8)).any()


@pytest.mark.parametrize("mode", MODES)
def test_compiled_is_bit_for_bit_the_definition(isa, threads, mode):
    for name in ("e4m3", "q52", "e2m1", "bfloat16", "tf32", "fixed4.4", "fixed1.20"):
        lattice = format_named(name).lattice
        settings = [lattice.digits, lattice.least_exponent, int(lattice.flushes), MODES.index(mode)]
        for dtype in DTYPES:
            x = numbers().to(dtype)
            found = torch.ops.pintpot.round_to(x, settings, [*lattice.limits(mode)], [7, 3])
            assert same(found, round_definition(x, lattice, mode, 7, 3)), (name, dtype)


def test_sizes_that_fill_no_vector_and_places_that_are_not_aligned(isa):
    lattice, mode = FORMATS["e4m3"].lattice, Rounding.STOCHASTIC
    settings = [lattice.digits, lattice.least_exponent, 0, MODES.index(mode)]
    for dtype in DTYPES:
        held = numbers(100).to(dtype)
        for count in (0, 1, 3, 15, 17, 63, 64, 65, 200):
            x = held[1 : 1 + count]
            found = torch.ops.pintpot.round_to(x, settings, [*lattice.limits(mode)], [-1, 2**40])
            assert same(found, round_definition(x, lattice, mode, -1, 2**40))


def test_many_numbers_on_many_threads(isa, threads):
    x = torch.randn(1000, 131, generator=torch.Generator().manual_seed(2))
    lattice, mode = FORMATS["e5m2"].lattice, Rounding.STOCHASTIC
    settings = [lattice.digits, lattice.least_exponent, 0, MODES.index(mode)]
    found = torch.ops.pintpot.round_to(x, settings, [*lattice.limits(mode)], [1, 0])
    assert same(found, round_definition(x, lattice, mode, 1, 0))


def test_float64_is_rounded_once():
    x = torch.tensor([1 + 2.0**-4 + 2.0**-40, 1 + 2.0**-4, 2.0**-10 + 2.0**-60, 1e300], dtype=torch.float64)
    assert round_to(x, Minifloat(4, 3)).tolist() == [1.125, 1.0, 2.0**-9, math.inf]
    x = numbers()
    for name in ("e4m3", "q52", "bfloat16"):
        assert same(round_to(x.double(), FORMATS[name]).float(), round_to(x, FORMATS[name]))


def test_random_rounding_is_right_on_average():
    x = torch.full((40000,), 1 + 0.3 / 8)
    for mode, share in (("stochastic", 0.3), ("stochastic_equal", 0.5)):
        up = (round_to(x, FORMATS["e4m3"], mode, seed=5) > 1.1).float().mean()
        assert abs(up - share) < 0.01
        exact = torch.full((1000,), 1.125)
        assert torch.equal(round_to(exact, FORMATS["e4m3"], mode, seed=5), exact)


def test_what_is_drawn_depends_on_seed_stream_and_place_only():
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))

    def drawn(seed: int, stream: int, part: torch.Tensor = x) -> torch.Tensor:
        return round_to(part, FORMATS["e2m1"], "stochastic", seed=seed, stream=stream)

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert torch.equal(drawn(1, 2)[:100], drawn(1, 2, x[:100]))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    strided = torch.stack([x, x], dim=1)[:, 0]
    assert torch.equal(drawn(1, 2, strided), drawn(1, 2))


def test_philox_gives_the_published_numbers():
    """The known answers of Random123."""
    for word, key, answer in (
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        place = torch.full((1,), word)
        assert tuple(int(w) for w in philox((place, place, place, place), (key, key))) == answer
    words = random_words(100_000, 0, 0).double() / 2**32
    assert abs(words.mean() - 0.5) < 0.005


def test_gradients_pass_where_nothing_is_clipped():
    x = torch.tensor([0.3, -0.1, 500.0, -500.0, 239.0], requires_grad=True)
    for layout in (FORMATS["q43"], FORMATS["e4m3"]):
        (gradient,) = torch.autograd.grad(round_to(x, layout).sum(), x)
        assert gradient.tolist() == [1, 1, 0, 0, 1]
    (gradient,) = torch.autograd.grad(round_to(x, FixedPoint(4, 4), "stochastic", seed=0).sum(), x)
    assert gradient.tolist() == [1, 1, 0, 0, 0]


def test_fake_tensors_take_the_path_of_the_run(compiled):
    with FakeTensorMode():
        x = torch.empty(3, 5, dtype=torch.bfloat16)
        for name in ("e4m3", "fixed4.4", "int8"):
            found = round_to(x, format_named(name), "stochastic", seed=0)
            assert (found.shape, found.dtype) == (x.shape, x.dtype)
    torch.library.opcheck(
        torch.ops.pintpot.round_to.default, (torch.randn(7), [3, -6, 0, 0], [-240.0, 240.0] * 3, [0, 0])
    )


def test_names_of_formats():
    assert format_named("fp16") == format_named("half") == Minifloat(5, 10)
    assert format_named("e5m4") == Minifloat(5, 4)
    assert format_named("fixed3.5") == FixedPoint(3, 5)
    assert (format_named("int4"), format_named("uint4")) == (Integer(4), Integer(4, symmetric=False))
    for wrong in ("e9m3", "e4m0", "fp12", "fixed0.4", "fixed20.20", "int1", "e4m3x"):
        with pytest.raises(ShapeError):
            format_named(wrong)


def test_refusals(compiled):
    x = torch.randn(4)
    for wrong in (
        lambda: round_to(x, FORMATS["e4m3"], "stochastic"),
        lambda: round_to(x, FORMATS["e4m3"], "half_up"),
        lambda: round_to(x.int(), FORMATS["e4m3"]),
        lambda: Minifloat(4, 3, top="all"),
        lambda: Integer(4, symmetric=False, scale=0.5),
        lambda: torch.ops.pintpot.round_to(x.double(), [3, -6, 0, 0], [0.0] * 6, [0, 0]),
        lambda: torch.ops.pintpot.round_to(torch.randn(4, 4).t(), [3, -6, 0, 0], [0.0] * 6, [0, 0]),
        lambda: torch.ops.pintpot.round_to(x, [3, -6, 0, 9], [0.0] * 6, [0, 0]),
        lambda: torch.ops.pintpot.round_to(x, [3, -6, 0, 0], [0.0] * 5, [0, 0]),
    ):
        with pytest.raises(ShapeError):
            wrong()
    assert native.serves(x)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: round_to(row, FORMATS["e4m3"]))(torch.randn(3, 4))
