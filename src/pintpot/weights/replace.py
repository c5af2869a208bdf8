"""Putting packed terms in the place of a model's dense weights: parameter by parameter, or block by block on texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.shape import block_names
from pintpot.weights._base import CompressionReport, Evidence, Layout, Texts, WeightMethod
from pintpot.weights.examined import ExaminedLayout, Replaced
from pintpot.weights.modules import place_, rows_of
from pintpot.weights.paused import PausedPass, evaluating, hidden_of
from pintpot.weights.statistics import InputStatistics, InputWatch, Seen, watching
from pintpot.weights.targets import Target, find_targets

Prepare = Callable[[str], bool]
"""Makes a block's weights ready before it is run; says whether they are dense and still to be compressed."""

Step = Callable[[str], None]
"""Told the name of each block or parameter that is done."""


def _ready(block: str) -> bool:
    return True


def empty_(
    model: nn.Module, method: WeightMethod, layout: Layout | None = None, dtype: torch.dtype | None = None
) -> CompressionReport:
    """Replace the weights of a model by packed terms with nothing in them; see ``prepare_skeleton_``."""
    targets, dense = find_targets(model, dtype)
    layout = method.layout(targets) if layout is None else layout
    for target, weight in _weights(model, targets, layout):
        formats = layout[target.parameter]
        place_(model, target, formats, target.empty(formats, weight))
    if method.converts:
        for name in block_names(model):
            model.set_submodule(name, method.converted_block(model.get_submodule(name)))
    return report_of(layout, targets, dense)


def _weights(model: nn.Module, targets: Sequence[Target], layout: Layout) -> Iterator[tuple[Target, Tensor]]:
    """Each parameter that a layout names. All are looked up at first: replacing one may take away another's module."""
    found = {t.parameter: model.get_parameter(t.parameter).detach() for t in targets if t.parameter in layout}
    for target in targets:
        if target.parameter in found:
            yield target, found.pop(target.parameter)


@torch.no_grad()
def compress_(
    model: PreTrainedModel, method: WeightMethod, texts: Texts = (), step: Step | None = None
) -> tuple[CompressionReport, Layout]:
    """Replace the weights of a model in memory by packed terms; see ``quantize_model_``."""
    targets, dense = find_targets(model)
    layout = method.layout(targets, examine(model, method, targets, texts) if method.examines else None)
    if method.works_on_blocks:
        for name in compressed_blocks(model, method, layout, targets, texts):
            if step is not None:
                step(name)
    else:
        for target, weight in _weights(model, targets, layout):
            formats = layout[target.parameter]
            place_(model, target, formats, target.encode(method, formats, weight))
            del weight
            if step is not None:
                step(target.parameter)
    return report_of(layout, targets, dense), layout


@torch.no_grad()
def compressed_blocks(
    model: PreTrainedModel,
    method: WeightMethod,
    layout: Layout,
    targets: Sequence[Target],
    texts: Texts,
    prepare_: Prepare = _ready,
) -> Iterator[str]:
    """Compress a model's blocks in the order of its forward pass, each on what the compressed ones before it give.

    A method that needs no activations compresses them in the order of the model, and none is run.

    Args:
        model: its blocks may be empty until ``prepare_`` has seen them.
        method: how.
        layout: the formats.
        targets: what can be replaced.
        texts: what the model reads.
        prepare_: called before a block is run for the first time.

    Yields:
        the name of each block when it is packed and will not be run again.
    """
    by_block = _by_block(targets, layout)
    if not (method.calibrated or method.refines):
        for name in block_names(model):
            if prepare_(name):
                _compress_block_(model, name, method, layout, by_block[name])
            yield name
        return
    with PausedPass(model, texts) as paused:
        for name in paused:
            if prepare_(name):
                _compress_block_(model, name, method, layout, by_block[name], paused)
            paused.advance()
            yield name


def _by_block(targets: Sequence[Target], layout: Layout) -> dict[str, list[Target]]:
    found: dict[str, list[Target]] = defaultdict(list)
    for target in targets:
        if target.parameter in layout:
            found[target.block].append(target)
    return found


def _compress_block_(
    model: nn.Module,
    name: str,
    method: WeightMethod,
    layout: Layout,
    targets: Sequence[Target],
    paused: PausedPass | None = None,
) -> None:
    block = model.get_submodule(name)
    if method.rearranges:
        method.rearrange_block_(block, paused.calls if paused is not None else ())
    outputs: list[Tensor] = []
    seen: Seen = {}
    replaced: list[Replaced] = []
    if targets and paused is not None:
        seen, outputs = observe(model, name, targets, paused, keep_outputs=method.refines)
    for target, weight in _weights(model, targets, layout):
        formats = layout[target.parameter]
        place_(model, target, formats, target.encode(method, formats, weight, seen.get(target.parameter)))
        if method.corrects_bias and seen:
            _correct_bias_(model.get_submodule(target.holder), target.rows(weight), seen[target.parameter][0])
        if method.remembers:
            replaced.append(_replaced(model, target, weight, layout))
        del weight
    if method.refines and paused is not None:
        seen.clear()
        if method.remembers:
            method.retrain_block_(block, paused.calls, outputs, replaced)
        else:
            method.refine_block_(block, paused.calls, outputs)
    if method.converts:
        model.set_submodule(name, method.converted_block(block, paused.calls if paused is not None else ()))


def _replaced(model: nn.Module, target: Target, weight: Tensor, layout: Layout) -> Replaced:
    holder = model.get_submodule(target.holder)
    evidence = layout.evidence.get(target.parameter, {}) if isinstance(layout, ExaminedLayout) else {}
    return Replaced(holder, target.rows(weight), evidence)  # type: ignore[arg-type]  # placed a moment ago


def _correct_bias_(packed: nn.Module, dense: Tensor, inputs: InputStatistics | None) -> None:
    """Add the mean of what a layer's output (O,) lacks to its bias."""
    bias = getattr(packed, "bias", None)
    if isinstance(bias, Tensor) and inputs is not None:
        held: Tensor = packed.weight.detach()  # type: ignore[operator]  # a packed layer's, made anew
        difference = dense.float() - held.as_subclass(Tensor).reshape(dense.shape).float()
        bias.detach().add_((difference @ inputs.mean).to(bias.dtype))


@torch.no_grad()
def examine(
    model: PreTrainedModel,
    method: WeightMethod,
    targets: Sequence[Target],
    texts: Texts = (),
    prepare_: Prepare = _ready,
    done_: Step | None = None,
) -> Evidence:
    """What a method must know of every parameter before it lays them out, from one pass over the dense model.

    Args:
        model: its blocks may be empty until ``prepare_`` has seen them.
        method: whose ``examine`` is asked.
        targets: what can be replaced.
        texts: what the model reads, where the method is calibrated.
        prepare_: called before a block is looked at.
        done_: called when a block will not be needed again.
    """
    if method.looks_at_whole:
        for name in block_names(model):
            prepare_(name)
        with evaluating(model):
            evidence = method.examine_model(model, targets, texts)
        for name in block_names(model):
            if done_ is not None:
                done_(name)
        return evidence
    found: dict[str, dict[str, Tensor]] = {}

    def ask(target: Target, seen: Sequence[InputStatistics | None]) -> None:
        weight = model.get_parameter(target.parameter).detach()
        rows = (weight.t() if target.transposed else weight).reshape(-1, target.shape[-1])
        inputs = next((s for s in seen if s is not None), None)
        found[target.parameter] = method.examine(target.parameter, rows, inputs)

    by_block = _by_block(targets, {t.parameter: () for t in targets})
    if not method.calibrated:
        for name, own in by_block.items():
            prepare_(name)
            for target in own:
                ask(target, ())
            if done_ is not None:
                done_(name)
        return found
    with PausedPass(model, texts) as paused:
        for name in paused:
            prepare_(name)
            seen, _ = observe(model, name, by_block[name], paused)
            for target in by_block[name]:
                ask(target, seen[target.parameter])
            paused.advance()
            if done_ is not None:
                done_(name)
    return found


def observe(
    model: nn.Module, name: str, targets: Sequence[Target], paused: PausedPass, *, keep_outputs: bool = False
) -> tuple[Seen, list[Tensor]]:
    """Run a block on all calls that wait.

    Args:
        model: the model.
        name: the block's.
        targets: the parameters in it whose inputs are to be seen.
        paused: the passes that stand at it.
        keep_outputs: whether the hidden states that it gives are wanted.

    Returns:
        The statistics of each parameter's inputs, and the outputs.
    """
    block = model.get_submodule(name)
    layers: dict[str, Callable[[InputWatch], Callable[..., None]]] = {}
    for target in targets:
        layer = target.module.removeprefix(f"{name}.")
        layers[layer] = partial(_watch_linear if target.holder == target.module else _watch_experts, target)
    outputs: list[Tensor] = []
    with watching(block, layers) as watch:
        for call in paused.calls:
            output = hidden_of(block(*call.args, **call.kwargs))
            watch.forget()
            if keep_outputs:
                outputs.append(output)
        seen: Seen = {t.parameter: [watch.of(key) for key in _keys(t)] for t in targets}
    return seen, outputs


def _keys(target: Target) -> list[str]:
    return (
        [target.parameter] if len(target.shape) == 2 else [f"{target.parameter}[{e}]" for e in range(target.shape[0])]
    )


def _watch_linear(target: Target, watch: InputWatch) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        watch.take(target.parameter, rows_of(module, args[0]))

    return hook


def _watch_experts(target: Target, watch: InputWatch) -> Callable[..., None]:
    prefix = target.module

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, index = args[0], args[1]
        for expert in range(target.shape[0]):
            rows = hidden[(index == expert).any(-1)]
            if rows.shape[0]:
                inner = module._apply_gate(functional.linear(rows, module.gate_up_proj[expert]))  # type: ignore[index,operator]
                watch.take(f"{prefix}.gate_up_proj[{expert}]", rows)
                watch.take(f"{prefix}.down_proj[{expert}]", inner)

    return hook


def report_of(layout: Layout, targets: Sequence[Target], dense: Sequence[tuple[str, str]]) -> CompressionReport:
    """The report of replacing the targets that a layout names."""
    replaced = [t for t in targets if t.parameter in layout]
    left = [(t.parameter, "left dense by the layout") for t in targets if t.parameter not in layout]
    return CompressionReport(
        compressed=tuple(t.parameter for t in replaced),
        left_dense=(*dense, *left),
        dense_bytes=sum(t.numel * t.dtype.itemsize for t in replaced),
        packed_bytes=sum(t.nbytes(layout[t.parameter]) for t in replaced),
    )
