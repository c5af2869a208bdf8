"""The predicted ledger of a composition: the planned job itself, run on tensors without bytes.

What is needed once before the first step (temporaries of compressing or loading the weights) is not part of the
steps that are simulated; the techniques' closed forms give it, and it is taken from there. So are bytes on disk.
"""

from __future__ import annotations

from collections.abc import Iterable

from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check
from pintpot.core.technique import Technique
from pintpot.core.workload import Compress, Workload
from pintpot.jobs.assemble import fake_build
from pintpot.ledger import predict


def simulate(shape: ModelShape, workload: Workload, techniques: Iterable[Technique] = ()) -> Ledger:
    """The predicted ledger of a job with these techniques, from the model's shape alone.

    Raises:
        CompositionError: when they cannot be used together, or not for this job.
    """
    chosen = tuple(techniques)
    check(chosen, workload.job)
    before = _declared_load(shape, workload, chosen)
    if isinstance(workload, Compress):
        return before
    alike = all(technique.same_at_every_depth for technique in chosen)
    steps = predict.simulate(fake_build(chosen, workload), shape, workload, extrapolate=alike)
    temporaries = before.phase("load").of(Account.WORKSPACE)
    steps = steps.add(Account.WORKSPACE, temporaries, phases=["load"])
    for (account, tier), size in before.phase("load").cells.items():
        if tier is Tier.DISK:
            steps = steps.set(account, size, tier)
    applied = tuple(moment for moment in before.moments if moment.phase not in steps.phases())
    return Ledger(steps.kind, (*applied, *steps.moments), facts=steps.facts)


def _declared_load(shape: ModelShape, workload: Workload, techniques: tuple[Technique, ...]) -> Ledger:
    """The phases before the first step, by the techniques' closed forms."""
    cells = {(Account.WEIGHTS, Tier.DEVICE): shape.weight_bytes}
    ledger = Ledger("predicted", (Moment("load", cells),))
    for technique in techniques:
        ledger = technique.predict(ledger, shape, workload)
    return ledger
