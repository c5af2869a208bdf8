"""WeLore: one threshold on the normalised singular values of all matrices says which are low-rank, and how low.

Source:    Jaiswal et al. 2024, "From GaLore to WeLore", arXiv:2407.11239, and the authors' code: each matrix's singular
           values are shifted and scaled to reach from 0 to 1, those under a threshold are cut off, and the threshold is
           one for the whole model.
Differs:   the size is given as bytes that are left, and the threshold follows from it; the last few ranks are set so
           that the bytes come out exactly. Experts of one stack share a rank, by the spectrum of them all together.
           Training the low-rank components is what any trainer or adapter does on top.
Saves:     weights, real: the share that is asked for of all matrices in the blocks. Finding the ranks needs the
           singular values of one matrix at a time, and so does applying them with the vectors.
Shapes:    weight (O, I); factors (O, R) and (R, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  no texts are at hand, and some matrices (queries and keys of large models) are far lower in rank than others.
Not when:  texts are at hand (lord then loses less for a matrix), or rounding to 8 or 4 bits will do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout
from pintpot.weights.factorised import FactorisedMethod, held
from pintpot.weights.formats import Dense
from pintpot.weights.ranks import Spectrum, parity_rank, ranks_for
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target


@technique(
    name="welore",
    wing="weights",
    source=Source(
        "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
        2024,
        arxiv="2407.11239",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "fine-tuning throughput, times",
            3.0,
            versus="full fine-tuning, which it outperforms",
            at="LLaMA-2-7B, half of the ranks, only low-rank components trained",
            where="abstract",
        )
    ],
    fidelity="the threshold follows from bytes; experts of a stack share a rank",
)
@dataclass(frozen=True, kw_only=True)
class WeLore(FactorisedMethod):
    """Low-rank components where the spectrum allows it, dense matrices elsewhere.

    Attributes:
        kept_fraction: of the bytes of all matrices that can be factorised.
    """

    examines: ClassVar[bool] = True
    rises: ClassVar[tuple[tuple[float, float], ...]] = (
        (14.2, 0.24),
        (12.6, 0.5),
        (11.1, 0.9),
        (9.5, 1.7),
        (7.9, 5.0),
        (6.3, 21.0),
    )
    kept_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction < 1:
            raise ShapeError(
                f"kept_fraction is a share of the matrices' bytes, not {self.kept_fraction}",
                hint="for instance welore(kept_fraction=0.5)",
            )

    def rank(self, out_features: int, in_features: int) -> int:
        """The rank of each matrix if all kept the same share."""
        parity = parity_rank(out_features, in_features)
        return max(1, int(self.kept_fraction * parity)) if parity else 0

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """The singular values between 0 and 1."""
        values = torch.linalg.svdvals(weight.float())
        return {"normalised": (values - values[-1]) / (values[0] - values[-1]).clamp(min=1e-12)}

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The ranks above one threshold, in as many bytes as the same share for every matrix takes."""
        uniform = super().layout(targets)
        if evidence is None:
            return uniform
        own = {t.parameter: t for t in targets if t.parameter in uniform}
        budget = sum(t.nbytes(uniform[name]) for name, t in own.items())
        values = {name: evidence[name]["normalised"] for name in own}
        spectra = {name: _spectrum(t, values[name]) for name, t in own.items()}
        dense = _dense_above(values, spectra, budget)
        while True:
            low = {name: spectrum for name, spectrum in spectra.items() if name not in dense}
            left = budget - sum(own[name].numel * own[name].dtype.itemsize for name in dense)
            ranks = ranks_for(low, left) if low and left >= sum(s.rank_bytes for s in low.values()) else {}
            if sum(ranks[name] * low[name].rank_bytes for name in ranks) == left:
                chosen = {name: (held(rank, own[name].dtype),) for name, rank in ranks.items()}
                return {name: chosen.get(name, (Dense(dtype=own[name].dtype),)) for name in own}
            if not dense:
                return uniform
            dense.pop()

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[WeLore]:
        """From the safest to the smallest."""
        for fraction in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            yield cls(kept_fraction=fraction)


def _spectrum(target: Target, normalised: Tensor) -> Spectrum:
    out_features, in_features = target.shape[-2:]
    rank_bytes = target.matrices * (out_features + in_features) * target.dtype.itemsize
    return Spectrum(normalised[: parity_rank(out_features, in_features)], rank_bytes)


def _dense_above(values: Mapping[str, Tensor], spectra: Mapping[str, Spectrum], budget_bytes: int) -> list[str]:
    """The weights that stay dense at the lowest threshold that fits, those furthest from low rank first.

    Args:
        values: all normalised singular values of each weight.
        spectra: those up to the rank at which the factors would be as large as the weight.
        budget_bytes: of all together.
    """

    def counts(threshold: Tensor) -> dict[str, int]:
        return {name: int((own >= threshold).sum()) for name, own in values.items()}

    def nbytes(found: Mapping[str, int]) -> int:
        return sum(min(max(1, n), len(spectra[name].gains) + 1) * spectra[name].rank_bytes for name, n in found.items())

    thresholds = torch.cat(list(values.values())).unique()
    fits = bisect_left(range(len(thresholds)), -budget_bytes, key=lambda i: -nbytes(counts(thresholds[i])))
    found = counts(thresholds[min(fits, len(thresholds) - 1)])
    excess = {name: n / len(spectra[name].gains) for name, n in found.items() if n > len(spectra[name].gains)}
    return sorted(excess, key=lambda name: -excess[name])
