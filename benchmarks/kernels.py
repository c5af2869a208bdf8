"""The compiled CPU kernels beside the plain torch definitions and what others offer.

Products of packed weights, optimizer steps on packed moments, and attention to packed caches.

Run with ``python -m benchmarks.kernels`` (some minutes on a quiet machine; ``--quick`` tries everything at small sizes
and writes nothing). Before each part the rate of reading memory is measured in the same process, with the same threads.

Products: weights of several widths in groups of 128 (4 bits also of 32), and inputs of 1 and 8 rows. One weight
after the other is used out of so many copies that none is still in the processor's cache when its turn comes again,
as in decoding a model. Look-ups: the same products of 1 to 4 bits and few rows by t-mac's kernel, with the error of its
8-bit tables. Tables: codebooks, as they are and transposed, signs with magnitudes of low rank, and ternary numbers,
whose codes are drawn and not fitted. Factors: two thin factors and sparse weights. Optimizer steps: one parameter,
float32 or bfloat16, with normal noise for gradients. Attention: one token's queries of a layer with 32 query heads of
128 numbers, to caches of bfloat16 numbers that are stored packed; the baseline is torch's fused attention to the same
numbers dense. Times are medians. ``plain torch`` is the same call without the library.

Peers: torch's dense product (the baseline) and its 4-bit and 8-bit products for CPUs (the latter is what torchao's
int8 weights use); llama.cpp's formats of as many bits, which round inputs to 8 bits; bitsandbytes' 4-bit product (NF4)
and its 8-bit AdamW; torchao's 8-bit and 4-bit AdamW; torch's fused AdamW (the baseline). They are measured where they
are installed: ``pip install --no-deps bitsandbytes``, ``pip install --no-deps --target out/peers torchao``, and an
optimised build of llama.cpp's libraries in ``out/ggml``.
"""

from __future__ import annotations

import argparse
import functools
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
from benchmarks.kernels_ggml import ggml
from benchmarks.rows import append_rows, stamp
from benchmarks.weights_ggml import packed_weight
from torch import Tensor, nn
from torch.nn import functional

from pintpot.cache._base import Call, LayerSizes, Place, Store
from pintpot.cache.fp8 import FP8
from pintpot.cache.kivi import KIVI
from pintpot.cache.rotary import Rotary
from pintpot.cache.rotatekv import RotateKV
from pintpot.cache.stream import attend_chunks
from pintpot.cache.tokens import Tokens
from pintpot.kernels import native
from pintpot.ledger.tracker import Tracker
from pintpot.optim import AdamW
from pintpot.weights.formats import (
    BitPlanes,
    Codebook,
    Dense,
    Format,
    Grid,
    LowRank,
    RowTiles,
    SignRank,
    Sparse,
    Ternary,
    Tiled,
    Transposed,
)

ELSEWHERE = Path(__file__).parent.parent / "out" / "peers"
SHAPES = ((4096, 4096), (11008, 4096))
WIDTHS = ((1, 128), (2, 128), (3, 128), (4, 128), (4, 32), (5, 128), (6, 128), (8, 128))
INPUT_ROWS = (1, 8)
BOOKS = ((8, 8, 0), (8, 12, 0), (8, 16, 0), (4, 8, 0), (6, 12, 12), (1, 3, 0), (1, 8, 0))
"""Vector length, bits of an index, bits of the residual's."""
DTYPES = (torch.float32, torch.bfloat16)
CACHE_BYTES = 64 << 20
"""More than the last cache of the processors that this is run on, or of the share of it that one process gets."""
NUMEL = 1 << 25
GGML_TYPES = {2: ("Q2_K",), 3: ("Q3_K",), 4: ("Q4_0", "Q4_K"), 5: ("Q5_K",), 6: ("Q6_K",), 8: ("Q8_0",)}
"""llama.cpp's formats of so many bits, beside our grids in groups of ``GGML_GROUP``."""
GGML_GROUP = 128

SEED = 0
BASE_PRODUCT, BASE_STEP, BASE_ATTENTION = "torch dense", "torch AdamW fused", "torch SDPA bfloat16"
QUERY_HEADS, HEAD_DIM = 32, 128
STORES: tuple[Store, ...] = (KIVI(bits=2), KIVI(bits=4), FP8(), RotateKV(bits=2), RotateKV(bits=4))
ROTARY = Rotary(10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
OURS, BASE_LOOKUP, LOOKUP = "pintpot", "pintpot, a grid beside t-mac", "t-mac"
LOOKUP_WIDTHS, LOOKUP_ROWS = ((1, 128), (2, 128), (3, 128), (4, 128), (4, 32)), (1, 8)
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
    return tracker.ledger().peak_bytes()


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


def torch_int8_product(weight: Tensor, x: Tensor) -> tuple[Run, int]:
    """Torch's own 8-bit product, with a scale a row."""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    turns = itertools.cycle([codes.clone() for _ in range(CACHE_BYTES // codes.nbytes + 2)])
    held = scale.to(x.dtype)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, next(turns), held), codes.nbytes + held.nbytes


def ggml_product(weight: Tensor, x: Tensor, kind: str) -> tuple[Run, int]:
    """llama.cpp's product, over copies of a weight in turn."""
    backend = ggml(torch.get_num_threads())
    if backend is None:
        raise ImportError("there is no build of llama.cpp")
    packed = packed_weight(weight, kind)
    copies = CACHE_BYTES // packed.nbytes + 2
    turns = itertools.cycle([backend.product(kind, packed, *weight.shape, x)[0] for _ in range(copies)])
    return lambda: next(turns)(), packed.nbytes


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
    for name, short in (("pintpot row-tiles", False), ("pintpot row-tiles, int8 inputs", True)):
        tiles = RowTiles(bits=bits, group_size=group, scale_dtype=scale, int8_inputs=short)
        ways[name] = lambda tiles=tiles: packed_product(tiles, weight, x)
    # It takes float32 inputs only.
    for kind in GGML_TYPES.get(bits, ()) if x.dtype == torch.float32 and group == GGML_GROUP else ():
        ways[f"llama.cpp {kind}"] = lambda kind=kind: ggml_product(weight, x, kind)
    if bits == 8:
        ways["torch int8"] = lambda: torch_int8_product(weight, x)
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


def lookups(
    shapes: tuple[tuple[int, int], ...], widths: tuple[tuple[int, int], ...], most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of products by look-up beside those of the grid with the same numbers."""
    rate = read_rate(most_seconds)
    for (rows, columns), dtype, (bits, group), count in itertools.product(shapes, DTYPES, widths, LOOKUP_ROWS):
        generator = torch.Generator().manual_seed(SEED)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        x = torch.randn(count, columns, generator=generator).to(dtype)
        grid = Grid(bits=bits, group_size=group, scale_dtype="bfloat16" if dtype == torch.bfloat16 else "float16")
        planes = BitPlanes.of(grid)
        error = _error(planes, grid, weight, x)
        about = {"model": f"linear {rows}x{columns}", "data": f"{count} rows, {_name(dtype)}"}
        about["config"] = f"{bits} bits, groups of {group}"
        ways = {
            name: partial(packed_product, held, weight, x) for name, held in ((BASE_LOOKUP, grid), (LOOKUP, planes))
        }
        for row in _rows(ways, BASE_LOOKUP, about, rate, most_seconds):
            note = f"; error {error:.2%} of the product's size" if row["technique"] == LOOKUP else ""
            yield {**row, "status": row["status"] + note}


def _error(planes: BitPlanes, grid: Grid, weight: Tensor, x: Tensor) -> float:
    """What tables of 8 bits change, relative to the product with the same numbers in float64."""
    exact = x.double() @ grid.decode(grid.encode(weight), weight.shape[1], torch.float64).T
    return float((planes.matmul(x, planes.encode(weight)).double() - exact).norm() / exact.norm())


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


def table_formats(out_features: int) -> Iterator[tuple[str, Format]]:
    """Formats whose numbers are looked up, and what they are called in the rows."""
    for vector, bits, residual in BOOKS:
        book = Codebook(vector_length=vector, index_bits=bits, residual_bits=residual)
        name = f"codebook, {bits}{f'+{residual}' if residual else ''} bits, vectors of {vector}"
        yield name, book
        yield f"{name}, transposed", Transposed(inner=book, out_features_held=out_features)
    for rank in (1, 16):
        yield f"signs, rank {rank}", SignRank(rank=rank)
    for per_byte in (5, 4):
        yield f"ternary, {per_byte} in a byte", Ternary(per_byte=per_byte)


def drawn(layout: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Stored tensors of a format with random bytes and normal numbers."""
    generator = torch.Generator().manual_seed(SEED)
    stored = {}
    for name, (size, dtype) in layout.storage(*shape).items():
        if dtype == torch.uint8:
            stored[name] = torch.randint(0, 243, size, dtype=dtype, generator=generator)
        else:
            stored[name] = torch.randn(size, generator=generator).to(dtype)
    return stored


def table_product(layout: Format, shape: tuple[int, int], x: Tensor) -> tuple[Run, int]:
    """Ours, over copies of a weight in turn, and the bytes of one."""
    stored, size = drawn(layout, shape), layout.nbytes(*shape)
    copies = [{name: t.clone() for name, t in stored.items()} for _ in range(CACHE_BYTES // size + 2)]
    turns = itertools.cycle(copies)
    return lambda: layout.matmul(x, next(turns)), size


def tables(shapes: tuple[tuple[int, int], ...], most_seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of products with weights that are looked up."""
    rate = read_rate(most_seconds)
    for shape, dtype, count in itertools.product(shapes, DTYPES, INPUT_ROWS):
        generator = torch.Generator().manual_seed(SEED)
        weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        x = torch.randn(count, shape[1], generator=generator).to(dtype)
        about = {"model": f"linear {shape[0]}x{shape[1]}", "data": f"{count} rows, {_name(dtype)}"}
        for config, layout in table_formats(shape[0]):
            ours = functools.partial(table_product, layout, shape, x)
            base = functools.partial(dense_product, weight, x)
            ways = {BASE_PRODUCT: base, "pintpot": ours, "pintpot, plain torch": ours}
            yield from _rows(ways, BASE_PRODUCT, {**about, "config": config}, rate, most_seconds)


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


def dense_attention(keys: Tensor, values: Tensor, query: Tensor) -> tuple[Run, int]:
    """Torch's fused attention, over copies of keys and values in turn."""
    size = keys.nbytes + values.nbytes
    turns = itertools.cycle([(keys.clone(), values.clone()) for _ in range(CACHE_BYTES // size + 2)])
    grouped = query.shape[1] != keys.shape[1]
    return lambda: functional.scaled_dot_product_attention(query, *next(turns), enable_gqa=grouped), size


def packed_attention(store: Store, keys: Tensor, values: Tensor, query: Tensor) -> tuple[Run, int]:
    """Ours, over several stored layers in turn."""
    call = Call(module=nn.Module(), query=query, scaling=HEAD_DIM**-0.5)
    heads = keys.shape[1]

    def filled() -> Any:
        state = store.open(Place(LayerSizes(heads, HEAD_DIM, HEAD_DIM, QUERY_HEADS), rotary=ROTARY))
        # The input of the attention, where a store asks for it, decides which tokens are held exactly, and no more.
        state.append(Tokens.consecutive(keys, values, inputs=keys[:, :1]))
        return state

    states = [filled()]
    size = states[0].nbytes()
    states += [filled() for _ in range(CACHE_BYTES // size + 1)]
    turns = itertools.cycle(states)
    return lambda: attend_chunks(call, list(next(turns).chunks(call)), heads), size


def attentions(contexts: tuple[int, ...], most_seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of attention to stored tokens, with a key-value head for each query head and for each four."""
    rate = read_rate(most_seconds)
    for tokens, heads, store in itertools.product(contexts, (QUERY_HEADS, QUERY_HEADS // 4), STORES):
        generator = torch.Generator().manual_seed(SEED)
        keys, values = (torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).bfloat16() for _ in range(2))
        query = torch.randn(1, QUERY_HEADS, 1, HEAD_DIM, generator=generator).bfloat16()
        ways = {BASE_ATTENTION: functools.partial(dense_attention, keys, values, query)}
        ways["pintpot"] = functools.partial(packed_attention, store, keys, values, query)
        ways["pintpot, plain torch"] = ways["pintpot"]
        about = {"model": f"{QUERY_HEADS} heads on {heads} of {HEAD_DIM}", "data": "1 token, bfloat16"}
        about |= {"config": str(store), "context_tokens": tokens}
        yield from _rows(ways, BASE_ATTENTION, about, rate, most_seconds)


def _rows(
    ways: dict[str, Callable[[], tuple[Run, int]]], base: str, about: dict, rate: float, most_seconds: float
) -> Iterator[dict[str, Any]]:
    """Time and share of the read rate of every way; what cannot run keeps its row, with the reason."""
    base_seconds = None
    for name, make in ways.items():
        row = {"context_tokens": "", **about, "technique": name, "seed": SEED, "metric": "time", "unit": "ms"}
        path = native.path() if name in (OURS, BASE_LOOKUP, LOOKUP) else ""
        row["config"] = f"{about['config']}{', ' + path if path else ''}"
        try:
            with plain_torch() if name.endswith("plain torch") else _as_it_is():
                run, size = make()
                seconds = median_seconds(run, most_seconds)
                # Under the tracker a peer may not be compiled, and what it compiles has tensors that are not seen.
                workspace = workspace_of(run) if name.startswith(("pintpot", LOOKUP)) else ""
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
    parser.add_argument("--only", choices=("products", "lookups", "tables", "factors", "steps", "attention"))
    options = parser.parse_args()
    seconds = 0.01 if options.quick else 0.25
    shapes, widths = (((512, 1024),), WIDTHS[3:4]) if options.quick else (SHAPES, WIDTHS)
    parts = {
        "products": lambda: products(shapes, widths, seconds),
        "lookups": lambda: lookups(shapes, LOOKUP_WIDTHS, seconds),
        "factors": lambda: factors(512 if options.quick else 4096, seconds),
        "tables": lambda: tables(shapes[:1], seconds),
        "steps": lambda: steps(1 << 18 if options.quick else NUMEL, seconds),
        "attention": lambda: attentions((512,) if options.quick else (4096, 16384), seconds),
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
