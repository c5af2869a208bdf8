"""Projections onto the subspace in which the gradient is largest: exact, by a sketch, by power steps, in 4 bits.

Shapes: as in ``_project``: S smaller side, L larger side, R rank; matrices oriented ``(..., S, L)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.kernels import pack, packed_size, unpack
from pintpot.optim import _sketch as sketch
from pintpot.optim._project import Project, State
from pintpot.optim._tensors import CHUNK_NUMEL, has_values, strips


@dataclass(frozen=True)
class LeadingSubspace(Project):
    """Onto the leading singular vectors of the gradient at the last refresh (GaLore, eq. 12-13).

    Only the vectors of the smaller side are needed, so they are taken from the eigenvectors of the S x S product
    ``G G^T``, summed in float64. That loses nothing against a float32 SVD (it is nearer to the float64 one) and
    needs neither the vectors of the larger side nor a copy of the gradient. Where the product would take far longer
    than the step, they come from a random sketch of the gradient instead (see ``_sketch``). Each vector's sign is
    fixed, so that moments kept across refreshes meet vectors of the same orientation.

    Attributes:
        exact_side: the smaller side up to which the product is made; a rank that leaves little to sketch has it too.
    """

    exact_side: int = field(default=1024, kw_only=True)

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the basis ``(..., S, R)``, in the gradient's dtype."""
        side = gradient.shape[-2]
        rank = self.rank_of(side)
        if self._sketches(side):
            vectors = sketch.leading_vectors(gradient, rank, seed)
        else:
            vectors = torch.linalg.eigh(self._gram(gradient))[1].flip(-1)[..., :rank]
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        state["basis"] = (vectors * largest.sign()).to(gradient.dtype).contiguous()

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The stored basis."""
        stored: Tensor = state["basis"]
        return stored

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """The basis, S x R."""
        return side * self.rank_of(side) * dtype.itemsize

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """At a refresh, in float64: the sum, an addend and a strip of the gradient; then the sum and eigenvectors."""
        if self._sketches(side):
            return 0, -(-sketch.workspace_numel(side, long, self.rank_of(side)) // 2)
        summing = 2 * side * side + side * self._gram_width(side, long)
        return 0, max(summing, 3 * side * side + 4 * side * self.rank_of(side))

    def refresh_flops(self, side: int, long: int) -> float:
        """The product ``G G^T`` and about ``9 S^3`` for its eigenvectors, or a sketch."""
        if self._sketches(side):
            return sketch.flops(side, long, self.rank_of(side))
        return 2.0 * side * side * long + 9.0 * side**3

    def _sketches(self, side: int) -> bool:
        return side > self.exact_side and side >= 2 * sketch.width_of(self.rank_of(side))

    def _gram(self, gradient: Tensor) -> Tensor:
        side, long = gradient.shape[-2:]
        gram = gradient.new_zeros((*gradient.shape[:-2], side, side), dtype=torch.float64)
        width = self._gram_width(gradient.numel() // long, long)
        for strip in strips(long, width, gradient):
            part = gradient[..., strip].double()
            gram += part @ part.mT
        return gram

    def _gram_width(self, side: int, long: int) -> int:
        return min(long, max(1, CHUNK_NUMEL // side))


@dataclass(frozen=True)
class PowerSubspace(LeadingSubspace):
    """Onto the leading eigenvectors of the average of ``G G^T``, followed by a power step each time (COSMOS).

    The average is kept in the subspace alone: ``U A U^T`` with A of R x R.

    Attributes:
        decay: of the average.
    """

    decay: float = 0.96

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Move the basis ``(..., S, R)`` and the average ``(..., R, R)`` on by a step; the first are of ``G G^T``."""
        if "average" not in state:
            super().refresh_(state, gradient, seed, moments)
            rank = state["basis"].shape[-1]
            wide = torch.promote_types(gradient.dtype, torch.float32)
            state["average"] = gradient.new_zeros((*gradient.shape[:-2], rank, rank), dtype=wide)
        else:
            self._turn_(state, gradient)
        small = self.down(state, gradient).to(state["average"].dtype)
        state["average"].add_(small @ small.mT, alpha=1 - self.decay)

    def _turn_(self, state: State, gradient: Tensor) -> None:
        average: Tensor = state["average"]
        last = state["basis"].to(average.dtype)
        new = (gradient @ (gradient.mT @ state["basis"])).to(average.dtype)
        basis = torch.linalg.qr(self.decay * (last @ average) + (1 - self.decay) * new)[0]
        turn = last.mT @ basis
        average.copy_(self.decay * (turn.mT @ average @ turn))
        state["basis"].copy_(basis)

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """The basis, and the average in float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        return super().state_bytes(side, long, dtype) + self.rank_of(side) ** 2 * wide.itemsize

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """At a power step the products, twice as wide as bfloat16; at the first what eigenvectors take."""
        rank = self.rank_of(side)
        return long * rank + 15 * side * rank + 8 * rank * rank, super().workspace_numel(side, long)[1]


@dataclass(frozen=True)
class PackedSubspace(LeadingSubspace):
    """The leading subspace in 4 bits, refreshed less often where it keeps still (Q-GaLore, arXiv:2407.08296).

    The basis is seen flat, row by row, in groups that share a scale and a zero: ``scale * (code - zero)``.

    Attributes:
        group: elements of the basis that share a scale.
        threshold: mean cosine between successive leading vectors from which the subspace counts as still.
        queue: refreshes over which the mean is taken.
        growth: the gap between refreshes is multiplied by this at every refresh that finds the subspace still.
    """

    group: int = 256
    threshold: float = 0.4
    queue: int = 5
    growth: int = 2

    def due(self, state: State, gap: int) -> bool:
        """Whether the parameter's own gap, which has grown since, divides the steps so far."""
        return super().due(state, gap * self.growth ** state.get("growths", 0))

    def refresh_(self, state: State, gradient: Tensor, seed: int, moments: Mapping[str, Tensor]) -> None:
        """Store the codes of the new basis, and how near its first vector is to that of the last one."""
        before = self.basis(state, gradient)[..., 0].clone() if "basis" in state else None
        super().refresh_(state, gradient, seed, moments)
        basis = state["basis"]
        if before is None:
            state["cosines"] = []
        else:
            cosine = functional.cosine_similarity(before.float(), basis[..., 0].float(), dim=-1).mean()
            state["cosines"] = [*state["cosines"], float(cosine) if has_values(cosine) else 0.0][-self.queue :]
            still = sum(state["cosines"]) >= self.threshold * self.queue
            state["growths"] = state.get("growths", 0) + (len(state["cosines"]) == self.queue and still)
        self._pack_(state, basis)

    def basis(self, state: State, gradient: Tensor) -> Tensor:
        """The numbers that the stored codes stand for."""
        side = gradient.shape[-2]
        count = side * self.rank_of(side)
        numbers = unpack(state["basis"], 4, count).to(gradient.dtype)
        groups = functional.pad(numbers, (0, -count % self.group)).unflatten(-1, (-1, self.group))
        groups = groups.sub_(state["basis_zero"][..., None]).mul_(state["basis_scale"][..., None])
        return groups.flatten(-2)[..., :count].unflatten(-1, (side, -1))

    def state_bytes(self, side: int, long: int, dtype: torch.dtype) -> int:
        """Codes of 4 bits, and a scale and a byte for each group."""
        count = side * self.rank_of(side)
        return packed_size(count, 4) + -(-count // self.group) * (dtype.itemsize + 1)

    def workspace_numel(self, side: int, long: int) -> tuple[int, int]:
        """The unpacked basis, with its codes and a padded copy; at a refresh as for any leading subspace."""
        return 3 * (side * self.rank_of(side) + self.group), super().workspace_numel(side, long)[1]

    def _pack_(self, state: State, basis: Tensor) -> None:
        flat = basis.flatten(-2).to(torch.promote_types(basis.dtype, torch.float32))
        groups = functional.pad(flat, (0, -flat.shape[-1] % self.group)).unflatten(-1, (-1, self.group))
        low, high = groups.aminmax(dim=-1)
        # The codes are made for the scale as it is stored: rounded to the parameter's dtype.
        scale = ((high - low) / 15).clamp_min(1e-5).to(basis.dtype)
        zero = (-low / scale).round_().clamp_(0, 15)
        codes = (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 15).to(torch.uint8)
        state["basis"] = pack(codes.flatten(-2)[..., : flat.shape[-1]], 4)
        state["basis_scale"], state["basis_zero"] = scale, zero.to(torch.uint8)
