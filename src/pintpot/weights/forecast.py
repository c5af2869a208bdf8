"""Closed forms for what a weight method does to memory and time, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Train, Workload
from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS
from pintpot.weights._base import Layout, WeightMethod
from pintpot.weights.formats.grid import ENCODE_ELEMENTS
from pintpot.weights.targets import Target, find_targets

MULTIPLYING = ("prefill", "decode", "forward", "backward")
"""Phases in which packed weights are multiplied."""

CALIBRATION_TOKENS = 128 * 512
"""Tokens of texts whose hidden states are held while a model is calibrated block by block: the job's default."""

WHOLE_TOKENS = 2048
"""Tokens of the batch that a whole model is taken to be differentiated on."""

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
    loading = compression_peak(shape, method)
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


def compression_peak(shape: ModelShape, method: WeightMethod) -> int:
    """Bytes of temporaries while compressing a folder or loading it compressed.

    Without calibration one dense parameter at a time; experts lie one by one in checkpoints, so that putting them
    together holds them twice. With it a block, dense and packed, the statistics of its inputs with two copies of the
    largest (a factorisation), and the hidden states of the texts. A method that looks at the whole model has all of it
    in memory, and differentiates it.
    """
    layout = layout_of(shape, method)
    replaced = replaced_in(shape, layout)
    largest = max(
        t.numel * t.dtype.itemsize * (2 if t.matrices > 1 else 1) + t.nbytes(layout[t.parameter])
        for t in _kinds(replaced, layout)
    )
    names = {t.parameter for t in replaced}
    others = max((p.nbytes for p in shape.parameters if p.name not in names), default=0)
    together = min(ENCODE_ELEMENTS, max(t.numel // t.matrices for t in _kinds(replaced, layout)))
    encoding = _encode_temporaries(shape.dtype) * together
    if not method.calibrated:
        return max(largest, others) + encoding
    peak = _calibrated_peak(shape, layout, replaced)
    if method.looks_at_whole:
        peak = max(peak, _whole_peak(shape, replaced))
    # What is remembered is taken to be a number of 32 bits for each weight.
    return peak + encoding + (4 * sum(t.numel for t in replaced) if method.remembers else 0)


def _calibrated_peak(shape: ModelShape, layout: Layout, replaced: Sequence[Target]) -> int:
    blocks: dict[str, int] = {}
    statistics: dict[str, int] = {}
    for t in replaced:
        blocks[t.block] = blocks.get(t.block, 0) + t.numel * t.dtype.itemsize + t.nbytes(layout[t.parameter])
        statistics[t.block] = statistics.get(t.block, 0) + 4 * t.matrices * t.shape[-1] ** 2
    factors = 2 * 4 * max(t.shape[-1] ** 2 + t.shape[-2] * t.shape[-1] for t in replaced)
    outside = sum(p.nbytes for p in shape.parameters if not p.block)
    hidden = CALIBRATION_TOKENS * shape.config.get_text_config().hidden_size * shape.dtype.itemsize
    return outside + max(blocks.values()) + max(statistics.values()) + factors + 2 * hidden


def _whole_peak(shape: ModelShape, replaced: Sequence[Target]) -> int:
    """The dense model, four copies of a block's matrices in 32 bits, and what a backward pass keeps of its texts.

    That is taken to be the input and the output of each matrix, and the logits with two copies in 32 bits.
    """
    blocks: dict[str, int] = {}
    for t in replaced:
        blocks[t.block] = blocks.get(t.block, 0) + t.numel
    sides = sum(t.shape[-1] + t.shape[-2] for t in replaced)
    logits = shape.config.get_text_config().vocab_size * (shape.dtype.itemsize + 8)
    kept = WHOLE_TOKENS * (sides * shape.dtype.itemsize + logits)
    return shape.weight_bytes + 16 * max(blocks.values()) + kept


def _encode_temporaries(dtype: torch.dtype) -> int:
    """Bytes for each number of the rows that are encoded together: the float32 block, codes, groups' extremes.

    A weight of 16 bits is made float32 first, and packing without the compiled kernel has temporaries of its own.
    """
    return 8 + (0 if dtype is torch.float32 else 4) + (0 if native.library() is not None else 4)


def multiplies_packed(layout: Layout, rows: int) -> bool:
    """Whether products with so many rows of input are made by compiled kernels, without workspace."""
    served = all(f.multiplies_packed() for formats in set(layout.values()) for f in formats)
    return served and rows <= FEW_ROWS and native.library() is not None


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
    if multiplies_packed(layout, rows):
        each = 1 - itemsize
    else:
        each = 2 * itemsize if native.library() is not None else 2 + 5 * itemsize
    return sum(t.nbytes(layout[t.parameter]) + t.numel * each for t in replaced_in(shape, layout))


def _kinds(targets: Sequence[Target], layout: Layout) -> tuple[Target, ...]:
    """One target for each shape and formats."""
    return tuple({(t.shape, t.dtype, layout[t.parameter]): t for t in targets}.values())
