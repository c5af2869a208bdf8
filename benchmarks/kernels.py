"""The compiled CPU kernels beside the plain torch definitions and what others offer: products and optimizer steps.

Run with ``python -m benchmarks.kernels`` (some minutes on a quiet machine; ``--quick`` tries everything at small sizes
and writes nothing). Before each part the rate of reading memory is measured in the same process, with the same threads.

Products: weights of several widths in groups of 128 (4 bits also of 32), and inputs of 1, 8 and 64 rows. One weight
after the other is used out of so many copies that none is still in the processor's cache when its turn comes again,
as in decoding a model. Factors: two thin factors and sparse weights, likewise. Optimizer steps: one parameter, float32
or bfloat16, with normal noise for gradients. Times are medians. ``plain torch`` is the same call without the library.

Peers: torch's dense product (the baseline) and its 4-bit product for CPUs; bitsandbytes' 4-bit product (NF4) and its
8-bit AdamW; torchao's 8-bit and 4-bit AdamW; torch's fused AdamW (the baseline). They are measured where they are
installed: ``pip install --no-deps bitsandbytes``, and ``pip install --no-deps --target out/peers torchao``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.rows import append_rows, stamp
from torch import Tensor, nn
from torch.nn import functional

from pintpot.kernels import native
from pintpot.ledger.tracker import Tracker
from pintpot.optim import AdamW
from pintpot.weights.formats import Dense, Format, Grid, LowRank, Sparse, Tiled

ELSEWHERE = Path(__file__).parent.parent / "out" / "peers"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
WIDTHS = ((1, 128), (2, 128), (3, 128), (4, 128), (4, 32), (5, 128), (6, 128), (8, 128))
INPUT_ROWS = (1, 8, 64)
DTYPES = (torch.float32, torch.bfloat16)
CACHE_BYTES = 64 << 20
"""More than the last cache of the processors that this is run on, or of the share of it that one process gets."""
NUMEL = 1 << 25
SEED = 0
BASE_PRODUCT, BASE_STEP = "torch dense", "torch AdamW fused"
Run = Callable[[], object]


@contextmanager
def plain_torch() -> Iterator[None]:
    """Without the library."""
    kept = native.library
    native.library = lambda: None
    try:
        yield
    finally:
        native.library = kept


def median_seconds(run: Run, most_seconds: float) -> float:
    """The median of as many runs as fit, three at least, after one that is not counted."""
    run()
    times: list[float] = []
    end = time.perf_counter() + most_seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_rate(most_seconds: float) -> float:
    """Bytes per second of reading memory with all threads."""
    data = torch.ones(CACHE_BYTES)
    return data.nbytes / median_seconds(data.sum, most_seconds)


def workspace_of(run: Run) -> int:
    """The most bytes of tensors that a run holds beside those that were there before."""
    with Tracker(device="cpu") as tracker:
        run()
    return tracker.ledger().peak_bytes


def packed_product(layout: Format, weight: Tensor, x: Tensor) -> tuple[Run, int]:
    """Ours, over copies of a weight in turn, and the bytes of one."""
    stored = [layout.encode(weight)]
    size = layout.nbytes(*weight.shape)
    stored += [{name: t.clone() for name, t in stored[0].items()} for _ in range(CACHE_BYTES // size + 1)]
    turns = itertools.cycle(stored)
    return lambda: layout.matmul(x, next(turns)), size


def dense_product(weight: Tensor, x: Tensor) -> tuple[Run, int]:
    """Torch's dense product."""
    dense = weight.to(x.dtype)
    turns = itertools.cycle([dense.clone() for _ in range(CACHE_BYTES // dense.nbytes + 2)])
    return lambda: functional.linear(x, next(turns)), dense.nbytes


def torch_int4_product(weight: Tensor, x: Tensor, group: int) -> tuple[Run, int]:
    """Torch's own 4-bit product, with the codes of our grid."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(SEED))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.full((columns // group, rows, 2), 0.01, dtype=x.dtype)
    size = packed.nbytes + scales.nbytes
    turns = itertools.cycle([(packed.clone(), scales.clone()) for _ in range(CACHE_BYTES // size + 2)])

    def run() -> Tensor:
        held, scale = next(turns)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, held, group, scale)

    return run, size


def bitsandbytes_product(weight: Tensor, x: Tensor, group: int) -> tuple[Run, int]:
    """The NF4 product of bitsandbytes for one row."""
    functions = importlib.import_module("bitsandbytes.functional")
    packed, state = functions.quantize_4bit(weight.to(x.dtype), quant_type="nf4", blocksize=group)
    size = packed.nbytes + state.absmax.nbytes
    turns = itertools.cycle([packed.clone() for _ in range(CACHE_BYTES // size + 2)])
    return lambda: functions.gemv_4bit(x, next(turns).t(), state=state), size


def product_ways(weight: Tensor, x: Tensor, bits: int, group: int) -> dict[str, Callable[[], tuple[Run, int]]]:
    """What multiplies a weight of this width."""
    scale = "bfloat16" if x.dtype == torch.bfloat16 else "float16"
    grid = Grid(bits=bits, group_size=group, scale_dtype=scale)
    ways = {BASE_PRODUCT: lambda: dense_product(weight, x), "pintpot": lambda: packed_product(grid, weight, x)}
    ways["pintpot, plain torch"] = ways["pintpot"]
    if bits == 4:
        ways["torch int4"] = lambda: torch_int4_product(weight, x, group)
        # Its smallest block is of 64.
        if importlib.util.find_spec("bitsandbytes") and x.shape[0] == 1 and group >= 64:
            ways["bitsandbytes NF4"] = lambda: bitsandbytes_product(weight, x, group)
    return ways


def products(
    shapes: tuple[tuple[int, int], ...], widths: tuple[tuple[int, int], ...], most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of all products."""
    rate = read_rate(most_seconds)
    for (rows, columns), dtype, (bits, group), count in itertools.product(shapes, DTYPES, widths, INPUT_ROWS):
        generator = torch.Generator().manual_seed(SEED)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        x = torch.randn(count, columns, generator=generator).to(dtype)
        about = {"model": f"linear {rows}x{columns}", "data": f"{count} rows, {_name(dtype)}"}
        about["config"] = f"{bits} bits, groups of {group}"
        yield from _rows(product_ways(weight, x, bits, group), BASE_PRODUCT, about, rate, most_seconds)


def factor_layouts(columns: int, dtype: torch.dtype) -> dict[str, Format]:
    """Factors and sparse weights, with numbers of 16 bits (the type of the model's, if that has 16), and a grid."""
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    dense = Dense(dtype=half)
    layouts: dict[str, Format] = {f"rank {r}": LowRank(rank=r, factor=dense) for r in (columns // 32, columns // 8)}
    for kept in (0.5, 0.2):
        layouts[f"1x1, {kept} kept"] = Sparse(kept_fraction=kept, balanced=False, values=dense)
    for side in ((1, 16), (16, 16)):
        sides = {"block_rows": side[0], "block_columns": side[1]}
        layouts[f"{side[0]}x{side[1]}, 0.5 kept"] = Sparse(kept_fraction=0.5, balanced=False, values=dense, **sides)
    grid = Grid(bits=4, group_size=16, scale_dtype=_name(half))
    layouts["1x16, 0.5 kept, 4 bits"] = Sparse(kept_fraction=0.5, block_columns=16, balanced=False, values=grid)
    layouts["tiles, 0.2 kept"] = Tiled(out_features_held=columns, kept_fraction=0.2, dtype=half)
    return layouts


def factors(columns: int, most_seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of products of factors and sparse weights."""
    rate = read_rate(most_seconds)
    for dtype, count in itertools.product(DTYPES, INPUT_ROWS):
        generator = torch.Generator().manual_seed(SEED)
        weight = torch.randn(columns, columns, generator=generator) / columns**0.5
        x = torch.randn(count, columns, generator=generator).to(dtype)
        for config, layout in factor_layouts(columns, dtype).items():
            about = {"model": f"linear {columns}x{columns}", "data": f"{count} rows, {_name(dtype)}", "config": config}
            # A random weight is as good as any for timing, and the leading singular vectors of a large one take long.
            given = layout if not isinstance(layout, LowRank) else _RandomFactors(**vars(layout))
            ways = {
                BASE_PRODUCT: partial(dense_product, weight, x),
                "pintpot": partial(packed_product, given, weight, x),
            }
            ways["pintpot, plain torch"] = ways["pintpot"]
            yield from _rows(ways, BASE_PRODUCT, about, rate, most_seconds)


class _RandomFactors(LowRank):
    """Factors of no weight."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self.encode_factors(weight[:, : self.rank], weight[: self.rank])


def step_of(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], numel: int, dtype: torch.dtype) -> Run:
    """One step of an optimizer on one parameter."""
    generator = torch.Generator().manual_seed(SEED)
    p = nn.Parameter(torch.randn(numel // 1024, 1024, generator=generator).to(dtype))
    p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return make([p]).step


def step_ways(numel: int, dtype: torch.dtype, bits: int) -> dict[str, Callable[[], tuple[Run, int]]]:
    """What steps with moments of so many bits; the bytes are those of moments, gradient and parameter."""
    moments = 2 * bits * numel // 8
    wide = 2 * numel * dtype.itemsize

    def way(make: Callable[..., Any], held: int) -> Callable[[], tuple[Run, int]]:
        return lambda: (step_of(make, numel, dtype), held + wide)

    base = way(lambda params: torch.optim.AdamW(params, fused=True), 2 * numel * dtype.itemsize)
    ours = way(lambda params: AdamW(params, state_bits=bits), moments)
    ways = {BASE_STEP: base, "pintpot": ours, "pintpot, plain torch": ours}
    if importlib.util.find_spec("bitsandbytes") and bits == 8:
        optimizers = importlib.import_module("bitsandbytes").optim
        ways["bitsandbytes AdamW8bit"] = way(lambda params: optimizers.AdamW8bit(params), moments)
    if (ELSEWHERE / "torchao").is_dir():
        name = f"AdamW{bits}bit"
        ways[f"torchao {name}"] = way(lambda params: getattr(_torchao(), name)(params), moments)
    return ways


def steps(numel: int, most_seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of all optimizer steps."""
    rate = read_rate(most_seconds)
    for dtype, bits in itertools.product(DTYPES, (8, 4)):
        about = {"model": f"parameter of {numel}", "data": _name(dtype), "config": f"AdamW, states of {bits} bits"}
        yield from _rows(step_ways(numel, dtype, bits), BASE_STEP, about, rate, most_seconds)


def _rows(
    ways: dict[str, Callable[[], tuple[Run, int]]], base: str, about: dict, rate: float, most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Time and share of the read rate of every way; what cannot run keeps its row, with the reason."""
    base_seconds = None
    for name, make in ways.items():
        row = {**about, "technique": name, "context_tokens": "", "seed": SEED, "metric": "time", "unit": "ms"}
        path = native.path() if name == "pintpot" else ""
        row["config"] = f"{about['config']}{', ' + path if path else ''}"
        try:
            with plain_torch() if name.endswith("plain torch") else _as_it_is():
                run, size = make()
                seconds = median_seconds(run, most_seconds)
                # Under the tracker a peer may not be compiled, and what it compiles has tensors that are not seen.
                workspace = workspace_of(run) if name.startswith("pintpot") else ""
        except (RuntimeError, ValueError, NotImplementedError, TypeError, ImportError) as error:
            yield {**row, "value": "", "status": f"not run: {str(error).splitlines()[0][:100]}"}
            continue
        base_seconds = seconds if name == base else base_seconds
        row |= {"value": round(seconds * 1e3, 4), "seconds": round(seconds, 6), "peak_bytes": workspace}
        row |= {"baseline": base, "baseline_value": round(base_seconds * 1e3, 4)}
        row["status"] = f"{size} bytes at {size / seconds / rate:.2f} of the read rate of {rate / 1e9:.1f} GB/s"
        yield row


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torchao() -> Any:
    if str(ELSEWHERE) not in sys.path:
        sys.path.append(str(ELSEWHERE))
    return importlib.import_module("torchao.optim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--only", choices=("products", "factors", "steps"))
    options = parser.parse_args()
    seconds = 0.01 if options.quick else 0.5
    shapes, widths = (((512, 1024),), WIDTHS[3:4]) if options.quick else (SHAPES, WIDTHS)
    parts = {
        "products": lambda: products(shapes, widths, seconds),
        "factors": lambda: factors(512 if options.quick else 4096, seconds),
        "steps": lambda: steps(1 << 18 if options.quick else NUMEL, seconds),
    }
    for name, part in parts.items():
        if options.only not in (None, name):
            continue
        rows = []
        for row in part():
            what = f"{row['technique']:22} {row['model']:22} {row['data']:18} {row['config']:32}"
            print(f"{what} {row['value']:>10} ms  {row['status']}", flush=True)
            rows.append(row)
        if not options.quick:
            stamps = stamp({})
            print(f"{append_rows('kernels', [{**row, **stamps} for row in rows])}: {len(rows)} rows")


if __name__ == "__main__":
    main()
