"""The tracker: bytes of every tensor by account while code runs, on real and on fake tensors.

It sees the outputs of every operation (a `TorchDispatchMode`), counts each storage once however many views it has,
and forgets it when the storage is freed. What a kernel allocates and frees inside itself is not seen; the allocator's
rounding is ignored.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from pintpot.core.ledger import Account, Ledger, Tier
from pintpot.ledger.reach import base_model, caches_in, tensors_in
from pintpot.ledger.timeline import CELLS, INDEX, Correction, Timeline

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
PREFILL, DECODE = "prefill", "decode"
_TELLING_BYTES = 4096
_NAMED = frozenset({Account.WEIGHTS, Account.GRADIENTS, Account.OPTIMIZER, Account.KV_CACHE})


class _Entry(weakref.ref[torch.UntypedStorage]):
    """A live storage: its address, bytes, cell, and the allocation at which it was born."""

    __slots__ = ("born", "key", "place", "size")
    key: int
    size: int
    place: int
    born: int


class Tracker(TorchDispatchMode):
    """Bytes by account over time, while active as a context.

    Models and optimizers are registered to be recognised; their hooks also tell the phases (`prefill` and `decode`
    without gradients, else `forward`, `backward`, `step`), unless `phase` sets one. Caches are found in the models'
    arguments and outputs. All hooks are removed when the context ends. Like every dispatch mode it sees the operations
    of the thread that entered it, and it takes no notice of forward passes in others.

    Args:
        device: the kind of device whose bytes count as `Tier.DEVICE` (`"cuda"`, `"cpu"`); by default the one of the
            first registered model. CPU tensors of a run on another device are `Tier.HOST`.
        samples: the most moments kept (each phase's peak always is); None keeps all.
    """

    def __init__(self, *, device: str | None = None, samples: int | None = 2048) -> None:
        super().__init__()
        self.timeline = Timeline(samples)
        self._device = device
        self._entries: dict[int, _Entry] = {}
        self._cells = [0] * len(CELLS)
        self._sequence = 0
        self._phase = "load"
        self._run = 0
        self._forced = False
        self._thread = 0
        self._operation: object = None
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []
        self._watched: Any = WeakTensorKeyDictionary()

    # What is being tracked

    def register(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Recognise a model's weights, gradients and caches, and an optimizer's state, from now on."""
        if model is not None and not any(model is m for m in self._models):
            self._models.append(model)
            if self._device is None:
                kinds = {p.device.type for p in model.parameters()} - {"meta"}
                self._device = next(iter(kinds - {"cpu"}), "cpu")
            base = base_model(model)
            for module in dict.fromkeys((model, base)):
                self._handles += [
                    module.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                    module.register_forward_hook(self._after_forward, with_kwargs=True),
                ]
            if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
                self._handles.append(base.get_encoder().register_forward_pre_hook(self._before_encoder))
            self._scan_models()
        if optimizer is not None and not any(optimizer is o for o in self._optimizers):
            self._optimizers.append(optimizer)
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            self._assign(tensors_in(dict(optimizer.state)), Account.OPTIMIZER)

    def assign(self, value: Any, account: Account) -> None:
        """Say which account the tensors reachable from `value` belong to, since they were made."""
        self._assign(tensors_in(value), account)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of a block of code, whatever the hooks would say."""
        before = self._phase, self._forced
        self._enter(name)
        self._forced = True
        try:
            yield
        finally:
            self._forced = before[1]
            self._enter(before[0])

    @property
    def device(self) -> str:
        """The kind of device whose bytes count as `Tier.DEVICE`."""
        return self._device or "cpu"

    def current_bytes(self, tier: Tier = Tier.DEVICE) -> int:
        """Bytes held now on a tier."""
        return sum(size for cell, size in zip(CELLS, self._cells, strict=True) if cell[1] is tier)

    def forget(self) -> None:
        """Drop the moments so far, keeping what is held now."""
        self.timeline.forget()

    def note(self) -> None:
        """Add a moment for what is held now, without an allocation."""
        self._sequence += 1
        self.timeline.add(self._sequence, self._phase, self._run, self._cells)

    def ledger(self, kind: str = "measured") -> Ledger:
        """What was measured so far."""
        return Ledger(kind, tuple(sample.moment() for sample in self.timeline.samples))

    # The mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave out the wrapper that torch puts around a mode for `torch.compile`: it doubles the mode's cost."""
        return False

    def __enter__(self) -> Tracker:
        """Track the operations of this thread."""
        self._thread = threading.get_ident()
        super().__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        """Stop tracking: remove every hook."""
        super().__exit__(*details)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages it made."""
        if torch.is_inference_mode_enabled():
            # Inference tensors arrive here before composite operations are taken apart.
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        self._operation = func
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:
            return
        entry = self._entries.get(storage._cdata)
        if entry is None:
            self._count(tensor, storage, self._account())
        elif entry.size != storage.nbytes():
            # Resized in place.
            change = storage.nbytes() - entry.size
            entry.size += change
            self._cells[entry.place] += change
            self.note()

    def _account(self) -> Account:
        """The account of what is being made now, as far as it is known yet."""
        backward = torch._C._current_graph_task_id() != -1
        if backward and self._phase != BACKWARD and not self._forced:
            self._enter(BACKWARD)
        if self._phase == FORWARD and not backward:
            return Account.ACTIVATIONS
        # Gradients are off in the backward pass itself, and on where it recomputes activations.
        if backward and torch.is_grad_enabled():
            return Account.ACTIVATIONS
        return Account.WORKSPACE

    def _count(self, tensor: Tensor, storage: torch.UntypedStorage, account: Account) -> None:
        kind = tensor.device.type
        size = storage.nbytes()
        if kind == "meta" or not size:
            return
        tier = Tier.DEVICE if kind == self.device else Tier.HOST
        entry = _Entry(storage, self._freed)
        entry.key, entry.size, entry.place = storage._cdata, size, INDEX[account, tier]
        self._sequence += 1
        entry.born = self._sequence
        self._entries[entry.key] = entry
        self._cells[entry.place] += size
        # Small sizes may depend on the number of layers (a list of norms), and tell operations apart no better.
        operation = self._operation, size if size >= _TELLING_BYTES else 0
        self.timeline.add(self._sequence, self._phase, self._run, self._cells, operation)

    def _freed(self, entry: weakref.ref[torch.UntypedStorage]) -> None:
        if isinstance(entry, _Entry) and self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._cells[entry.place] -= entry.size

    # Accounts that become known later

    def _assign(self, tensors: Iterable[Tensor], account: Account, *, only_unnamed: bool = True) -> None:
        corrections = []
        for tensor in tensors:
            storage = _storage(tensor)
            if storage is None:
                continue
            entry = self._entries.get(storage._cdata)
            if entry is None:
                self._count(tensor, storage, account)
                continue
            old, tier = CELLS[entry.place]
            if old is account or (only_unnamed and old in _NAMED):
                continue
            place = INDEX[account, tier]
            corrections.append(Correction(entry.born, entry.size, entry.place, place))
            self._cells[entry.place] -= entry.size
            self._cells[place] += entry.size
            entry.place = place
        self.timeline.correct(corrections)

    def _scan_models(self) -> None:
        for model in self._models:
            self._assign([*model.parameters(), *model.buffers()], Account.WEIGHTS, only_unnamed=False)
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_leaf and parameter not in self._watched:
                    self._watched[parameter] = True
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_gradient))
        self._assign((p.grad for m in self._models for p in m.parameters() if p.grad is not None), Account.GRADIENTS)

    # Hooks

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._run += 1

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._forced or self._elsewhere():
            return
        before = self._phase
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self._enter(FORWARD)
        else:
            held = any(True for cache in caches_in(kwargs) for _ in tensors_in(cache))
            self._enter(DECODE if held and _query_tokens(args, kwargs) == 1 else PREFILL)
        if self._phase != before:
            self._scan_models()
        self._assign(tensors_in(caches_in(kwargs)), Account.KV_CACHE)

    def _before_encoder(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._forced and not self._elsewhere() and not torch.is_grad_enabled():
            self._enter(PREFILL)
            self._scan_models()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._elsewhere():
            self._assign(tensors_in((caches_in(kwargs), caches_in(output))), Account.KV_CACHE)

    def _elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _after_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._assign((parameter.grad,), Account.GRADIENTS)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._forced:
            self._enter(STEP)
        self._scan_models()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._assign(tensors_in(dict(optimizer.state)), Account.OPTIMIZER)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """A tensor's storage, or None for layouts that have none (sparse tensors)."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


def _query_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that go into this forward pass."""
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return value.shape[1]
    return next((a.shape[1] for a in args if isinstance(a, Tensor) and a.dim() > 1), 0)
