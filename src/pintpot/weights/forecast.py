"""Closed forms for what a weight method does to memory and time, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Compress, Generate, Train, Workload
from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS
from pintpot.weights._base import ROWS_AT_ONCE, Layout, WeightMethod
from pintpot.weights.formats.grid import ENCODE_ELEMENTS
from pintpot.weights.targets import Target, find_targets

MULTIPLYING = ("prefill", "decode", "forward", "backward")
"""Phases in which packed weights are multiplied."""

_KEPT: dict[tuple[str, torch.dtype], tuple[Target, ...]] = {}
_LAYOUTS: dict[tuple[str, torch.dtype, WeightMethod], Layout] = {}


def targets_of(shape: ModelShape) -> tuple[Target, ...]:
    """The parameters that a method may replace (built once for each architecture and dtype)."""
    key = (shape.fingerprint, shape.dtype)
    if key not in _KEPT:
        _KEPT[key] = find_targets(shape.build("meta"))[0]
    return _KEPT[key]


def layout_of(shape: ModelShape, method: WeightMethod) -> Layout:
    """The layout that shapes alone tell (built once)."""
    key = (shape.fingerprint, shape.dtype, method)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = method.layout(targets_of(shape))
    return _LAYOUTS[key]


def replaced_in(shape: ModelShape, layout: Layout) -> tuple[Target, ...]:
    """The parameters that a layout names."""
    return tuple(t for t in targets_of(shape) if t.parameter in layout)


def packed_change(shape: ModelShape, layout: Layout) -> int:
    """How many bytes of weights a layout adds (negative)."""
    return sum(t.nbytes(layout[t.parameter]) - t.numel * t.dtype.itemsize for t in replaced_in(shape, layout))


def product_workspace(shape: ModelShape, layout: Layout) -> int:
    """The most workspace that one product needs; the terms of a weight are multiplied one after the other."""
    return max(
        f.workspace(t.shape[-2], t.shape[-1], shape.dtype)
        for t in _kinds(replaced_in(shape, layout), layout)
        for f in layout[t.parameter]
    )


def stored_bits(method: WeightMethod, shape: ModelShape) -> float:
    """Stored bits for each number that a method replaces."""
    layout = layout_of(shape, method)
    replaced = replaced_in(shape, layout)
    return 8 * sum(t.nbytes(layout[t.parameter]) for t in replaced) / sum(t.numel for t in replaced)


def packed_ledger(method: WeightMethod, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
    """The ledger with packed weights; compressing a folder is one phase, ``apply``, with the output on disk."""
    layout = layout_of(shape, method)
    change, workspace = packed_change(shape, layout), product_workspace(shape, layout)
    loading = method.applying_bytes(shape, workload if isinstance(workload, Compress) else Compress())
    if workload.job == "compress":
        whole = shape.weight_bytes + change if method.converts else 0
        apply = Moment("apply", {}).with_bytes(Account.WORKSPACE, loading + whole)
        return Ledger("predicted", (apply.with_bytes(Account.CHECKPOINT, shape.weight_bytes + change, Tier.DISK),))
    extra = {"load": loading, "apply": loading} | dict.fromkeys(MULTIPLYING, workspace)
    if isinstance(workload, Generate) and multiplies_packed(layout, workload.batch):
        extra["decode"] = 0

    def edit(moment: Moment) -> Moment:
        more = moment.of(Account.WORKSPACE) + extra.get(moment.phase, 0)
        return moment.with_bytes(Account.WEIGHTS, moment.of(Account.WEIGHTS) + change).with_bytes(
            Account.WORKSPACE, more
        )

    return ledger.edit(edit)


def packed_work(method: WeightMethod, work: Work, shape: ModelShape, workload: Workload) -> Work:
    """The work with packed weights."""
    if isinstance(workload, Generate):
        prompt = extra_reads(shape, method, workload.batch * workload.prompt_tokens)
        token = extra_reads(shape, method, workload.batch)
        return work.plus("prefill", read_bytes=prompt).plus("decode", read_bytes=token)
    if isinstance(workload, Train):
        return work.plus("step", read_bytes=2 * extra_reads(shape, method, workload.batch * workload.tokens))
    return work


def compression_peak(method: WeightMethod, shape: ModelShape, workload: Compress) -> int:
    """Bytes of temporaries while compressing a folder or loading it compressed.

    Without calibration one dense parameter at a time; experts lie one by one in checkpoints, so that putting them
    together holds them twice. With it a block, dense and packed, the statistics of its inputs, the hidden states of
    the texts, and the temporaries of finding one matrix. A method that looks at the whole model has all of it in
    memory, and differentiates it.
    """
    layout = layout_of(shape, method)
    replaced = replaced_in(shape, layout)
    finding = max(method.finding_bytes(t.shape[-2], t.shape[-1], t.dtype) for t in _kinds(replaced, layout))
    if not method.works_on_blocks:
        largest = max(
            t.numel * t.dtype.itemsize * (2 if t.matrices > 1 else 1) + t.nbytes(layout[t.parameter])
            for t in _kinds(replaced, layout)
        )
        names = {t.parameter for t in replaced}
        others = max((p.nbytes for p in shape.parameters if p.name not in names), default=0)
        return max(largest, others) + finding
    peak = _block_peak(method, shape, workload, layout, replaced) + finding
    tokens = min(ROWS_AT_ONCE, workload.samples) * workload.tokens
    return max(peak, _whole_peak(shape, replaced, tokens)) if method.looks_at_whole else peak


def _block_peak(
    method: WeightMethod, shape: ModelShape, workload: Compress, layout: Layout, replaced: Sequence[Target]
) -> int:
    """What is held while the matrices of a block are found, one after the other."""
    blocks: dict[str, int] = {}
    statistics: dict[str, int] = {}
    for t in replaced:
        dense = t.numel * t.dtype.itemsize
        blocks[t.block] = blocks.get(t.block, 0) + dense + t.nbytes(layout[t.parameter])
        statistics[t.block] = statistics.get(t.block, 0) + 4 * t.matrices * t.shape[-1] ** 2
    outside = sum(p.nbytes for p in shape.parameters if not p.block)
    reads = method.calibrated or method.refines
    states = workload.samples * workload.tokens * (2 if method.refines else 1)
    hidden = states * _hidden_width(shape) * shape.dtype.itemsize if reads else 0
    return outside + max(blocks.values()) + (max(statistics.values()) if method.calibrated else 0) + hidden


def _hidden_width(shape: ModelShape) -> int:
    """Numbers of a hidden state; where stages differ, of the widest input of a matrix."""
    width = getattr(shape.config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else max(t.shape[-1] for t in targets_of(shape))


def _whole_peak(shape: ModelShape, replaced: Sequence[Target], tokens: int) -> int:
    """The dense model, four copies of a block's matrices in 32 bits, and what a backward pass keeps of its texts.

    That is taken to be the input and the output of each matrix, and the logits with two copies in 32 bits.
    """
    blocks: dict[str, int] = {}
    for t in replaced:
        blocks[t.block] = blocks.get(t.block, 0) + t.numel
    return shape.weight_bytes + 16 * max(blocks.values()) + kept_bytes(shape, replaced, tokens, shape.dtype)


def kept_bytes(shape: ModelShape, replaced: Sequence[Target], tokens: int, dtype: torch.dtype) -> int:
    """What a forward pass over so many tokens keeps for the backward pass: both sides of each matrix, and logits."""
    sides = sum(t.shape[-1] + t.shape[-2] for t in replaced)
    config = shape.config.get_text_config()
    classes: int = getattr(config, "vocab_size", None) or config.num_labels  # type: ignore[assignment]  # any kind has
    return tokens * (sides * dtype.itemsize + classes * (dtype.itemsize + 8))


def encoding_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Temporaries of rounding a weight to nearest, some rows at a time: float32 numbers, codes, groups' extremes.

    A weight of 16 bits is made float32 first, and packing without the compiled kernel has temporaries of its own.
    """
    each = 8 + (0 if dtype is torch.float32 else 4) + (0 if native.built() else 4)
    return each * min(ENCODE_ELEMENTS, out_features * in_features)


def multiplies_packed(layout: Layout, rows: int) -> bool:
    """Whether products with so many rows of input are made by compiled kernels, without workspace."""
    served = all(f.multiplies_packed() for formats in set(layout.values()) for f in formats)
    return served and rows <= FEW_ROWS and native.built()


def extra_reads(shape: ModelShape, method: WeightMethod, rows: int) -> int:
    """Bytes moved more than with dense weights (or, if negative, less) in one pass over all matrices.

    The compiled products read what is packed, and make up to a byte of each number for a moment. The compiled
    dequantisation reads what is packed and writes the dense numbers, which the product then reads as it would have
    read the weight. Without it each number is unpacked (a byte written and read), converted, shifted and scaled (each
    written, and read again) first.

    Args:
        shape: the model.
        method: what packs its weights.
        rows: rows of input of each product.
    """
    layout, itemsize = layout_of(shape, method), shape.dtype.itemsize
    decoded = 2 * itemsize if native.built() else 2 + 5 * itemsize
    each = 1 - itemsize if multiplies_packed(layout, rows) else decoded
    return sum(t.nbytes(layout[t.parameter]) + t.numel * each for t in replaced_in(shape, layout))


def _kinds(targets: Sequence[Target], layout: Layout) -> tuple[Target, ...]:
    """One target for each shape and formats."""
    return tuple({(t.shape, t.dtype, layout[t.parameter]): t for t in targets}.values())
