"""The engine of the optimizer wing: runs ``select x project x inner rule x residual`` over parameter groups.

Shapes: parameters of any shape. Those that are projected are matrices or stacks of matrices, seen by the parts
with the smaller side first (see ``_project``). All temporaries are of one batch of at most ``CHUNK_NUMEL`` elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError, ShapeError, TrainingError
from pintpot.core.heap import give_back
from pintpot.kernels import AdamRates
from pintpot.optim import _rounding as rounding
from pintpot.optim._groups import is_matrix, projected_groups
from pintpot.optim._inner import Adam, Inner
from pintpot.optim._project import Project, State, Whole
from pintpot.optim._residual import Drop, Residual, Small
from pintpot.optim._rules import rule_of
from pintpot.optim._select import Selection, blocks_of
from pintpot.optim._sharded import everywhere, is_sharded, keep_, local, whole
from pintpot.optim._states import STATE_BITS, states_of
from pintpot.optim._tensors import CHUNK_NUMEL, chunks, has_values, mix_seed, oriented, strips

if TYPE_CHECKING:
    from pintpot.optim._base import ProjectedMethod


@dataclass(frozen=True)
class Parts:
    """What the matrices of a group go through.

    Attributes:
        project: to the small matrix and back.
        inner: the rule for the small matrix.
        residual: the last part of the update.
        gap: steps between two choices of the subspace.
        seed: what the seeds of random choices start from.
    """

    project: Project
    inner: Inner
    residual: Residual | None
    gap: int = 1
    seed: int = 0


class ProjectedOptimizer(torch.optim.Optimizer):
    """AdamW whose matrices go through the parts of a method; base of GaLore, Apollo and the others.

    Args:
        params: a model (its linear layers inside blocks are projected, see ``projected_groups``), or parameters
            or parameter groups as for any torch optimizer. A group with ``projected=False`` follows plain AdamW;
            in other groups all matrices are projected, and what is not a matrix follows plain AdamW. A method that
            selects blocks needs the model.
        lr: learning rate.
        betas: the rule's decay rates, of which some use the first alone; Adam's (0.9, 0.999) or those of the paper of
            ``inner`` unless given.
        eps: Adam's epsilon.
        weight_decay: decoupled from the gradient, as in AdamW.
        nonfinite: on a NaN or Inf in any gradient, ``"raise"`` or ``"skip"`` the whole step. Either way
            nothing has been changed. (With released gradients, that parameter's update.)
        state_bits: how moments are kept: 8 or 4 bits in blocks, or 32 for the parameter's dtype; as the method says
            unless given.
        release_gradients: update each parameter as its gradient arrives in the backward pass, and free the gradient;
            ``step`` then only ends the step. Not for accumulated or clipped gradients: none is there to clip.
        inner: the rule that takes Adam's place for all parameters: ``"lion"``, ``"sgd-momentum"``, ``"signsgd"``,
            ``"soap"``, or one with its hyperparameters.
        stochastic_rounding: parameters of 16 bits are updated in float32, and each goes to one of its two neighbours at
            random, by how near they are, instead of to the nearest; those of 32 bits and more are updated as ever.
        exact_products: make large products with a basis in float32 too. Otherwise their factors are rounded to bfloat16
            where the processor is faster at it, which halves the time and changes an element by some 0.2 % at random.
        **hyperparameters: those of the method (the fields of ``method``), also settable in a group.

    Raises:
        CompositionError: for an unknown hyperparameter, a selection without a model, or another rule where the
            method's own is essential.
        ShapeError: for a value that makes no sense, or a sparse gradient.
        TrainingError: in ``step``, for a gradient that is not finite.
    """

    method: ClassVar[type[ProjectedMethod]]

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        nonfinite: Literal["raise", "skip"] = "raise",
        state_bits: int | None = None,
        release_gradients: bool = False,
        inner: Inner | str | None = None,
        stochastic_rounding: bool = False,
        exact_products: bool = False,
        **hyperparameters: float,
    ) -> None:
        bits = self.method.state_bits if state_bits is None else state_bits
        if bits not in STATE_BITS:
            raise ShapeError(f"state_bits must be one of {STATE_BITS}, not {bits}", hint="use 8")
        self.nonfinite = nonfinite
        self.states = states_of(bits)
        self.releases_gradients = release_gradients
        self.stochastic_rounding = stochastic_rounding
        self.exact_products = exact_products
        self._squares: list[Tensor] = []
        self._numbers: dict[Tensor, tuple[int, int]] = {}
        settings = asdict(self.method.build(hyperparameters))
        method = self._method(settings)
        self.inner = rule_of(inner, method.inner(Adam.betas, eps), method.project())
        betas = betas or (self.inner or Adam()).betas
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "projected": True, **settings}
        super().__init__(projected_groups(params) if isinstance(params, nn.Module) else params, defaults)
        if release_gradients:
            self._release()
        self.selection = self._selection_of(params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, now or later; they start at their own step 0."""
        known = {"params", "initial_lr", *self.defaults}
        unknown = sorted(key for key in set(param_group) - known if key != "param_names")
        if unknown:
            raise CompositionError(
                f"{type(self).__name__} has no setting {', '.join(unknown)}",
                hint=f"a parameter group takes: {', '.join(sorted(known))}",
            )
        self._method({**self.defaults, **param_group}).check()
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient (with released gradients, the end of one).

        Raises:
            TrainingError: when a gradient is not finite (unless ``nonfinite`` is ``"skip"``).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [
            (p, number, index)
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
            if p.grad is not None
        ]
        if self._finite([p for p, _, _ in present]):
            if self.selection is not None and self.selection.looking:
                self.selection.choose_(self.state)
                present = [entry for entry in present if entry[0].grad is not None]
            for number, group in enumerate(self.param_groups):
                self._update([(p, (n, i)) for p, n, i in present if n == number], group)
        if self.selection is not None:
            self.selection.advance_(self.state)
        self._squares.clear()
        return loss

    def gradient_norm(self) -> float:
        """The norm of the whole gradient whose parts were released since the last ``step``."""
        return float(torch.stack(self._squares).sum().sqrt()) if self._squares else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The state of a torch optimizer, and where the selection stands."""
        held = super().state_dict()
        return held if self.selection is None else {**held, "selection": self.selection.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly: tensors keep the dtype they were saved in."""
        if self.selection is not None:
            self.selection.load_state_dict(state_dict.get("selection", {}))
        super().load_state_dict(state_dict)
        saved_groups = state_dict["param_groups"]
        for saved, group in zip(saved_groups, self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.dtype != self.state[parameter][name].dtype:
                        self.state[parameter][name] = value.detach().clone().to(parameter.device)

    def _method(self, group: dict[str, Any]) -> ProjectedMethod:
        return self.method(**{field.name: group[field.name] for field in fields(self.method)})

    def _selection_of(self, params: nn.Module | Iterable[Any]) -> Selection | None:
        rule = self._method(self.defaults).select()
        if rule is None:
            return None
        if not isinstance(params, nn.Module):
            raise CompositionError(
                f"{type(self).__name__} selects blocks of a model", hint="give the model instead of its parameters"
            )
        return Selection(rule, blocks_of(params))

    def _release(self) -> None:
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if is_sharded(p):
                    raise CompositionError(
                        "gradients of parameters that FSDP2 shards cannot be released as they arrive",
                        hint="leave out gradient-release: FSDP2 keeps one shard of the gradients in each process",
                    )
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(self._arrived(number, index))

    def _arrived(self, number: int, index: int) -> Callable[[Tensor], None]:
        # The parameter outlives the optimizer: its hook must neither keep it alive nor act for one that is gone.
        weak = weakref.ref(self)

        def arrived(p: Tensor) -> None:
            optimizer = weak()
            if optimizer is not None:
                optimizer._update_now(p, (number, index))

        return arrived

    @torch.no_grad()
    def _update_now(self, p: Tensor, number: tuple[int, int]) -> None:
        if p.grad is not None and self._finite([p]):
            if has_values(p):
                self._squares.append(p.grad.float().square().sum())
            if self.selection is None or not self.selection.note_(p):
                self._update([(p, number)], self.param_groups[number[0]])
        p.grad = None
        give_back()

    def _finite(self, parameters: Sequence[Tensor]) -> bool:
        gradients = [(p, local(p.grad)) for p in parameters if p.grad is not None]
        sparse = [tuple(p.shape) for p, g in gradients if g.is_sparse]
        if sparse:
            raise ShapeError(f"sparse gradient of the parameter of shape {sparse[0]}", hint="set sparse=False")
        real = [(p, g) for p, g in gradients if has_values(g)]
        if not real:
            return True
        norms = torch._foreach_norm([g for _, g in real])
        # A norm may overflow where every element is finite, so only then are the elements looked at.
        fine = bool(torch.stack([n.to(norms[0].device, torch.float32) for n in norms]).isfinite().all())
        bad = [] if fine else [tuple(p.shape) for p, g in real if not g.isfinite().all()]
        fine = everywhere(not bad, (p for p, _ in real))
        if not fine and self.nonfinite == "raise":
            where = f"{len(bad)} parameters, the first of shape {bad[0]}" if bad else "another process"
            raise TrainingError(
                f"NaN or Inf in the gradients of {where}",
                hint='lower the learning rate, clip gradients, or pass nonfinite="skip"',
            )
        return fine

    def _update(self, parameters: Sequence[tuple[Tensor, tuple[int, int]]], group: dict[str, Any]) -> None:
        if self.stochastic_rounding:
            self._numbers.update(parameters)
        parts = self._parts(group)
        matrices = [(p, number) for p, number in parameters if parts is not None and is_matrix(p.shape)]
        self._step_plain([p for p, _ in parameters if parts is None or not is_matrix(p.shape)], group)
        if parts is not None:
            self._step_projected(matrices, parts, group)

    def _parts(self, group: dict[str, Any]) -> Parts | None:
        """What matrices go through; ``None`` where they follow the plain rule."""
        method, rule = self._method(group), self._rule(group)
        project = method.project() if group["projected"] else None
        if project is not None:
            inner = rule or method.inner(group["betas"], group["eps"])
            project = replace(project, exact=True) if self.exact_products else project
            return Parts(project, inner, method.residual(), method.refresh_steps, method.base_seed)
        return Parts(Whole(), rule, Drop(1.0)) if rule is not None and rule.by_matrix else None

    def _rule(self, group: dict[str, Any]) -> Inner | None:
        """The rule that was asked for in the place of Adam."""
        return None if self.inner is None else replace(self.inner, betas=group["betas"], eps=group["eps"])

    def _step_plain(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        rule = self._rule(group)
        inner = Adam(betas=group["betas"], eps=group["eps"]) if rule is None or rule.by_matrix else rule
        work: list[tuple[Tensor, slice | None]] = []
        for p in parameters:
            state, here = self.state[p], local(p.detach())
            if not state:
                state["step"] = 0
                for name in inner.moments:
                    self.states.start_(state, name, here, here.shape)
            state["step"] += 1
            if type(inner) is Adam and p.grad is not None and not self._rounds(here):
                gradient = local(p.grad)
                if self.states.has_adam(state, inner.moments, here, gradient):
                    rates = AdamRates(state["step"], group["lr"], inner.betas, inner.eps, group["weight_decay"])
                    self.states.adam_(state, inner.moments, here, gradient, rates)
                    continue
            flat = here.is_contiguous() and p.grad is not None and local(p.grad).is_contiguous()
            if flat and here.numel() > CHUNK_NUMEL:
                work += [(p, piece) for piece in strips(here.numel(), CHUNK_NUMEL, here)]
            elif here.numel():
                work.append((p, None))
        for batch in chunks(local(p).numel() if piece is None else piece.stop - piece.start for p, piece in work):
            self._plain_batch([work[i] for i in batch], inner, group)

    def _plain_batch(self, batch: Sequence[tuple[Tensor, slice | None]], inner: Inner, group: dict[str, Any]) -> None:
        states = [self.state[p] for p, _ in batch]
        targets = [_piece(local(p.detach()), piece) for p, piece in batch]
        gradients = [_piece(local(p.grad), piece) for p, piece in batch if p.grad is not None]
        moments = [
            [self.states.read(s, name, local(p).shape, piece) for s, (p, piece) in zip(states, batch, strict=True)]
            for name in inner.moments
        ]
        steps = [s["step"] for s in states]
        moved = [target.float() if self._rounds(target) else target for target in targets]
        inner.step_(moved, _matching(gradients, moments), moments, steps, group["lr"], group["weight_decay"])
        for (p, piece), target, value in zip(batch, targets, moved, strict=True):
            if value is not target:
                rounding.round_into_(target, value, self._rounding_seed(p, 0 if piece is None else piece.start))
        for name, values in zip(inner.moments, moments, strict=True):
            for s, (_, piece), value in zip(states, batch, values, strict=True):
                self.states.write_(s, name, value, piece)

    def _step_projected(
        self,
        parameters: Sequence[tuple[Tensor, tuple[int, int]]],
        parts: Parts,
        group: dict[str, Any],
    ) -> None:
        seen = [oriented(p.detach()) for p, _ in parameters]
        sizes = [parts.inner.largest(_small_shape(p, parts.project), p.shape[-2]) for p in seen]
        for batch in chunks(sizes):
            chosen = [parameters[i] for i in batch]
            gradients = [oriented(whole(p.grad)) for p, _ in chosen if p.grad is not None]
            for (p, number), gradient in zip(chosen, gradients, strict=True):
                self._prepare(self.state[p], gradient, number, parts)
            self._step_batch([p for p, _ in chosen], gradients, parts, group)

    def _prepare(
        self,
        state: State,
        gradient: Tensor,
        number: tuple[int, int],
        parts: Parts,
    ) -> None:
        """Make a fresh state, and choose the subspace when it is time."""
        project, inner, residual = parts.project, parts.inner, parts.residual
        side, shape = gradient.shape[-2], _small_shape(gradient, project)
        if not state:
            state["step"] = 0
            for name in inner.moments:
                self.states.start_(state, name, gradient, inner.shape_of(name, shape, side))
            inner.start_(state, gradient, shape)
            if residual is not None:
                residual.start_(state, gradient)
        if project.due(state, parts.gap):
            turn = state["step"] // parts.gap
            names = inner.moments if turn and project.carries else ()
            moments = {name: self.states.read(state, name, inner.shape_of(name, shape, side)) for name in names}
            project.refresh_(state, gradient, mix_seed(parts.seed, *number, turn), moments)
            for name, value in moments.items():
                self.states.write_(state, name, value)
        state["step"] += 1

    def _step_batch(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        parts: Parts,
        group: dict[str, Any],
    ) -> None:
        project, inner = parts.project, parts.inner
        states = [self.state[p] for p in parameters]
        smalls = [project.down(state, gradient) for state, gradient in zip(states, gradients, strict=True)]
        seen = [inner.enter(state, small) for state, small in zip(states, smalls, strict=True)]
        steps = [state["step"] - state.get("forgotten", 0) for state in states]
        directions = self._packed_directions(states, seen, steps, inner)
        moments: list[list[Tensor]] = []
        if directions is None:
            moments = [
                [
                    self.states.read(s, name, inner.shape_of(name, small.shape, gradient.shape[-2]))
                    for s, small, gradient in zip(states, smalls, gradients, strict=True)
                ]
                for name in inner.moments
            ]
            directions = inner.directions(_matching(seen, moments), moments, steps)
        self._decay_([local(p.detach()) for p in parameters if not self._rounds(p)], group)
        kept = [
            dict(zip(inner.moments, [values[i] for values in moments], strict=bool(moments)))
            for i in range(len(states))
        ]
        for p, gradient, state, small, direction, own in zip(
            parameters, gradients, states, smalls, directions, kept, strict=True
        ):
            made = Small(small, inner.leave(state, direction.to(small.dtype)), own)
            self._apply_(p, gradient, made, parts, group)
            inner.learn_(state, small, own)
            for name, value in own.items():
                self.states.write_(state, name, value)

    def _packed_directions(
        self, states: Sequence[State], seen: Sequence[Tensor], steps: Sequence[int], inner: Inner
    ) -> list[Tensor] | None:
        """Adam's directions, made on moments that stay packed; None where that cannot be."""
        if type(inner) is not Adam:
            return None
        if not all(self.states.has_adam(s, inner.moments, g) for s, g in zip(states, seen, strict=True)):
            return None
        found = [torch.zeros_like(gradient, dtype=torch.float32) for gradient in seen]
        # A parameter of zeros that is moved at a rate of -1 without decay is the direction.
        for state, direction, gradient, step in zip(states, found, seen, steps, strict=True):
            rates = AdamRates(step, -1.0, inner.betas, inner.eps)
            self.states.adam_(state, inner.moments, direction, gradient, rates)
        return found

    def _apply_(self, p: Tensor, gradient: Tensor, made: Small, parts: Parts, group: dict[str, Any]) -> None:
        """Move a matrix; where it is rounded at random, by way of its update, which is made apart."""
        if parts.residual is None:
            return
        rounds = self._rounds(p)
        value = whole(p.detach())
        target = torch.zeros_like(value) if rounds else value
        parts.residual.apply_(oriented(target), gradient, made, self.state[p], parts.project, group["lr"])
        if rounds:
            kept = 1 - group["lr"] * group["weight_decay"]
            rounding.move_(value, target, kept, self._rounding_seed(p, 0))
        keep_(p.detach(), value)

    def _rounds(self, p: Tensor) -> bool:
        return self.stochastic_rounding and rounding.is_narrow(p)

    def _rounding_seed(self, p: Tensor, place: int) -> int:
        return mix_seed(0, *self._numbers[p], self.state[p]["step"], place)

    def _decay_(self, targets: list[Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"] and targets:
            torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])


def _small_shape(gradient: Tensor, project: Project) -> torch.Size:
    return torch.Size((*gradient.shape[:-2], project.rank_of(gradient.shape[-2]), gradient.shape[-1]))


def _matching(gradients: Sequence[Tensor], moments: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The gradients in the dtype of their moments: packed ones are read in float32 whatever the parameter's."""
    likes = moments[0] if moments else gradients
    return [gradient.to(like.dtype) for gradient, like in zip(gradients, likes, strict=True)]


def _piece(tensor: Tensor, piece: slice | None) -> Tensor:
    return tensor if piece is None else tensor.view(-1)[piece]
