"""The kernels for GPUs beside cuBLAS and fused attention: products with packed weights, attention to packed caches.

Run with ``python -m benchmarks.kernels_gpu`` on a machine with an NVIDIA GPU and Triton; without one it says so and
writes nothing. ``--quick`` tries it at small sizes and writes nothing. Before each part the rate of reading memory is
measured on the same GPU, and every row says which share of it the bytes that must be read come to.

Products: weights of several widths in groups of 128, inputs of 1 to 16 rows in bfloat16, as grids and in tiles
(``tilus``), beside torch's dense product in bfloat16. One weight after the other is used out of so many copies that
none is still in the GPU's cache when its turn comes again. Attention: one token of each sequence to packed blocks of
256 tokens, at 2 and 4 bits, beside torch's fused attention to keys and values in bfloat16; sizes for which the GPU has
no room are left out. Times are medians over CUDA events.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.rows import append_rows, stamp
from torch import Tensor
from torch.nn import functional

from pintpot.cache.packed import BLOCK_TOKENS, Block, Layout
from pintpot.kernels import attend_packed, gpu
from pintpot.weights.formats import Format, Grid
from pintpot.weights.tilus import Tilus

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
BITS = (2, 3, 4, 8)
BATCHES = (1, 2, 4, 8, 16)
CACHES = ((32, 32), (32, 8))
"""Query heads and key-value heads."""
TOKENS = (4096, 16384)
HEAD_DIM, GROUP = 128, 32
COPIES_BYTES = 512 << 20
"""More than the last cache of the GPUs of today, several times."""
SEED = 0
DEVICE = "cuda"
DENSE, FUSED = "torch dense", "torch SDPA"
Run = Callable[[], object]


def median_seconds(run: Run, times: int) -> float:
    """The median of so many runs, each between two events, after some that are not counted."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(taken)


def read_rate(times: int) -> float:
    """Bytes per second of reading the GPU's memory."""
    data = torch.ones(COPIES_BYTES, device=DEVICE)
    return data.nbytes / median_seconds(data.sum, times)


def in_turn(make: Callable[[], Any], size: int, use: Callable[[Any], object]) -> Run:
    """A run that uses one copy after the other of something of this size."""
    turns = itertools.cycle([make() for _ in range(COPIES_BYTES // size + 2)])
    return lambda: use(next(turns))


def product_ways(weight: Tensor, x: Tensor, bits: int) -> Iterator[tuple[str, Run, int]]:
    """What multiplies by a weight of this width, and the bytes that it reads of it."""
    size = weight.nbytes
    yield DENSE, in_turn(weight.clone, size, lambda dense: functional.linear(x, dense)), size
    grid = Grid(bits=bits, group_size=128, scale_dtype="bfloat16")
    stored = grid.encode(weight)
    tiles = Tilus().of_grid(grid)
    ways: list[tuple[str, Format, dict[str, Tensor]]] = [("pintpot", grid, stored)]
    if tiles is not None:
        ways.append(("tilus", tiles, tiles.relaid(stored, weight.shape[1])))
    for name, layout, held in ways:
        size = layout.nbytes(*weight.shape)
        yield name, in_turn(lambda held=held: {k: t.clone() for k, t in held.items()}, size, _times(layout, x)), size


def _times(layout: Format, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda held: layout.matmul(x, held)


def products(shapes: tuple[tuple[int, int], ...], times: int) -> Iterator[dict[str, Any]]:
    """Rows of all products."""
    rate = read_rate(times)
    for (rows, columns), bits, count in itertools.product(shapes, BITS, BATCHES):
        generator = torch.Generator(DEVICE).manual_seed(SEED)
        weight = torch.randn(rows, columns, generator=generator, device=DEVICE, dtype=torch.bfloat16) / columns**0.5
        x = torch.randn(count, columns, generator=generator, device=DEVICE, dtype=torch.bfloat16)
        about = {"model": f"linear {rows}x{columns}", "data": f"{count} rows, bfloat16"}
        about["config"] = f"{bits} bits, groups of 128"
        yield from measured(product_ways(weight, x, bits), about, (rate, times))


def attention_ways(batch: int, heads: tuple[int, int], tokens: int, bits: int) -> Iterator[tuple[str, Run, int]]:
    """What attends to so many tokens, and the bytes that it reads of them."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, HEAD_DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    query, keys, values = random(batch, heads[0], 1), random(batch, heads[1], tokens), random(batch, heads[1], tokens)
    size = keys.nbytes + values.nbytes
    yield (
        FUSED,
        in_turn(
            lambda: (keys.clone(), values.clone()),
            size,
            lambda held: functional.scaled_dot_product_attention(query, *held, enable_gqa=heads[0] != heads[1]),
        ),
        size,
    )
    layout = Layout(bits, GROUP, GROUP)
    grouped = (query.float() * HEAD_DIM**-0.5).reshape(batch, heads[1], -1, HEAD_DIM)

    def pack() -> list[Any]:
        blocks = []
        for start in range(0, tokens, BLOCK_TOKENS):
            block = Block(keys, values, layout, BLOCK_TOKENS)
            block.write_keys(0, keys[:, :, start : start + BLOCK_TOKENS])
            block.write_values(0, values[:, :, start : start + BLOCK_TOKENS])
            blocks.append(block.first(BLOCK_TOKENS))
        return blocks

    size = sum(t.nbytes for block in pack() for t in block[:-1])
    sizes = {"bits": bits, "key_group": GROUP, "value_group": GROUP}
    yield "pintpot", in_turn(pack, size, lambda blocks: attend_packed(grouped, blocks, **sizes)), size


def attention(lengths: tuple[int, ...], times: int) -> Iterator[dict[str, Any]]:
    """Rows of all attention."""
    rate = read_rate(times)
    for heads, tokens, bits, batch in itertools.product(CACHES, lengths, (2, 4), BATCHES):
        dense = 4 * batch * heads[1] * tokens * HEAD_DIM
        if torch.cuda.mem_get_info()[0] < 2 * COPIES_BYTES + 4 * dense:
            continue
        about = {"model": f"attention of {heads[0]} heads to {heads[1]}", "data": f"{batch} sequences"}
        about |= {"config": f"{bits} bits, groups of {GROUP}", "context_tokens": tokens}
        yield from measured(attention_ways(batch, heads, tokens, bits), about, (rate, times))


def measured(
    ways: Iterator[tuple[str, Run, int]], about: dict[str, Any], limits: tuple[float, int]
) -> Iterator[dict[str, Any]]:
    """Time and share of the read rate of every way; the first is the baseline."""
    (rate, times), baseline = limits, ("", 0.0)
    for name, run, size in ways:
        seconds = median_seconds(run, times)
        baseline = baseline if baseline[0] else (name, seconds)
        yield {
            "context_tokens": "",
            **about,
            "technique": name,
            "seed": SEED,
            "metric": "time on a GPU",
            "unit": "ms",
            "value": round(seconds * 1e3, 4),
            "seconds": round(seconds, 7),
            "baseline": baseline[0],
            "baseline_value": round(baseline[1] * 1e3, 4),
            "status": f"{size} bytes at {size / seconds / rate:.2f} of the read rate of {rate / 1e9:.0f} GB/s",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--only", choices=("products", "attention"))
    options = parser.parse_args()
    if not gpu.ready():
        print("No NVIDIA GPU, or no Triton (pip install 'pintpot[gpu]'): nothing is measured, nothing is written.")
        return
    times = 5 if options.quick else 50
    parts = {
        "products": lambda: products(((512, 1024),) if options.quick else SHAPES, times),
        "attention": lambda: attention((512,) if options.quick else TOKENS, times),
    }
    for name, part in parts.items():
        if options.only not in (None, name):
            continue
        rows = []
        for row in part():
            what = f"{row['technique']:12} {row['model']:30} {row['data']:20} {row['config']:24}"
            print(f"{what} {row['context_tokens']:>6} {row['value']:>10} ms  {row['status']}", flush=True)
            rows.append(row)
        if not options.quick:
            stamps = {**stamp({}), "hardware": torch.cuda.get_device_name()}
            print(f"{append_rows('kernels', [{**row, **stamps} for row in rows])}: {len(rows)} rows")


if __name__ == "__main__":
    main()
