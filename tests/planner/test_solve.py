import random
from itertools import product

import pytest

from pintpot.core import slots
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.expression import expression
from pintpot.core.ledger import Account
from pintpot.core.units import format_bytes, parse_bytes
from pintpot.core.workload import Budget, Compress, Finetune
from pintpot.planner import program
from pintpot.planner.options import candidates, choices, incomplete, undominated
from pintpot.planner.problem import excess, limits_of, ordered
from pintpot.planner.program import RISK_UNIT
from pintpot.planner.reject import rejections
from pintpot.planner.solve import flag_value, solve
from tests.planner.fakes import PLAIN, SHAPE, WORKLOAD, Level, make, problem

W, K, S, G = Account.WEIGHTS, Account.KV_CACHE, Account.WORKSPACE, Account.GRADIENTS


def every_composition(asked):
    """All sets of choices that can run together, by brute force."""
    by_slot = {}
    for choice in choices(asked.techniques):
        by_slot.setdefault(choice.slot, [()]).append(choice.techniques)
    for filling in product(*by_slot.values()):
        chosen = ordered(t for part in filling for t in part)
        clash = any(slots.conflict(a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :])
        if not clash and not incomplete(chosen, asked.workload):
            yield chosen


def cost(asked, composition):
    ticks = round((asked.seconds(composition) - asked.seconds(())) * 10_000)
    risks = sum(round(t.risk(SHAPE, WORKLOAD) / RISK_UNIT) for t in composition)
    return risks, ticks, len(composition)


def best_by_brute_force(asked):
    limits = limits_of(asked.budget)
    if not excess(asked.baseline, limits):
        return 0, 0, 0
    fitting = [c for c in every_composition(asked) if not excess(asked.predict(c), limits)]
    return min((cost(asked, c) for c in fitting), default=None)


def random_kinds(dice, serial, *, crossing=False):
    """Techniques in four slots; cells are shared only by the parts of the cache, unless ``crossing``."""

    def levels(count, account, **more):
        rows = []
        for _ in range(count):
            scale = {account: dice.choice([0.1, 0.25, 0.5, 0.75])}
            if crossing:
                scale[dice.choice([W, K, S])] = dice.choice([0.5, 0.9])
            rows.append(Level(scale=scale, risk=dice.choice([0, 0.01, 0.02, 0.05]), ticks=dice.randint(-50, 50)))
        return rows

    return [
        make(f"w{serial}", levels(4, W), slot="weights", removes=dice.choice([(), ("f",)])),
        make(f"v{serial}", levels(2, W), slot="weights"),
        make(f"k{serial}", levels(2, K), slot="cache", part="keep"),
        make(f"s{serial}", levels(3, K), slot="cache", part="store"),
        make(f"o{serial}", levels(3, S), slot="offload", needs=dice.choice([(), ("f",)])),
        make(f"d{serial}", [Level(applying=dice.randint(200, 1600), add={S: -60}, risk=0.01)], slot="decoding"),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_the_answer_is_that_of_brute_force(seed):
    dice = random.Random(seed)
    kinds = random_kinds(dice, seed)
    asked = problem(kinds, Budget(device=dice.choice([300, 500, 700, 900, 1100, 1300, 1700])))
    best = best_by_brute_force(asked)
    if best is None:
        smallest = min(asked.predict(c).peak_bytes() for c in every_composition(asked))
        with pytest.raises(BudgetError) as caught:
            solve(asked)
        assert f"the smallest that would fit is {format_bytes(smallest)} on device" in str(caught.value)
        again = problem(kinds, Budget(device=smallest))
        assert cost(again, solve(again).techniques) == best_by_brute_force(again)
    else:
        found = solve(asked)
        assert not excess(found.ledger, limits_of(asked.budget))
        assert cost(asked, found.techniques) == best


@pytest.mark.parametrize("seed", range(20))
def test_where_three_slots_share_bytes_the_answer_still_fits(seed):
    dice = random.Random(1000 + seed)
    kinds = random_kinds(dice, f"x{seed}", crossing=True)
    asked = problem(kinds, Budget(device=dice.choice([500, 700, 900])))
    best = best_by_brute_force(asked)
    if best is None:
        with pytest.raises(BudgetError):
            solve(asked)
    else:
        found = solve(asked)
        assert not excess(asked.predict(found.techniques), limits_of(asked.budget))
        assert cost(asked, found.techniques)[0] <= best[0] + 2000


def test_without_need_nothing_is_chosen():
    kinds = [make("squeeze", [Level(scale={W: 0.5}, ticks=-500)], slot="weights")]
    assert solve(problem(kinds, Budget(device=1600))).techniques == ()
    assert solve(problem(kinds, Budget())).techniques == ()


def test_a_lossless_and_faster_technique_is_taken_where_something_is_needed():
    kinds = [
        make("free", [Level(add={S: -1}, ticks=-500)], slot="attention"),
        make("lean", [Level(scale={K: 0.5}, risk=0.1)], slot="cache"),
    ]
    assert expression(solve(problem(kinds, Budget(device=1400))).techniques) == "lean*free"


def test_risk_goes_before_time_and_time_before_count():
    kinds = [
        make("risky", [Level(scale={W: 0.5}, risk=0.02, ticks=-900)], slot="weights"),
        make("slow", [Level(scale={K: 0.1}, ticks=300)], slot="cache"),
        make("quick", [Level(scale={K: 0.5}, ticks=100), Level(scale={K: 0.6}, ticks=200)], slot="cache"),
        make("side", [Level(add={S: -100}, ticks=50)], slot="offload"),
    ]
    assert expression(solve(problem(kinds, Budget(device=1500))).techniques) == "side"
    assert expression(solve(problem(kinds, Budget(device=1450))).techniques) == "quick"
    assert expression(solve(problem(kinds, Budget(device=1240))).techniques) == "slow"
    assert expression(solve(problem(kinds, Budget(device=1150))).techniques) == "slow*side"
    assert expression(solve(problem(kinds, Budget(device=1000))).techniques) == "risky*side"


def test_what_conflicts_is_never_combined():
    kinds = [
        make("pack", [Level(scale={W: 0.5})], slot="weights", removes=("dense",)),
        make("page", [Level(scale={K: 0.1})], slot="cache", needs=("dense",)),
        make("fold", [Level(scale={K: 0.5}, risk=0.3)], slot="cache"),
    ]
    assert expression(solve(problem(kinds, Budget(device=1240))).techniques) in ("page", "pack")
    found = {t.name for t in solve(problem(kinds, Budget(device=950))).techniques}
    assert found == {"pack", "fold"}


def test_a_composition_that_misses_is_cut_and_another_is_found():
    """Three slots that each halve the same account look better together than they are."""
    kinds = [
        make(f"half-{slot}", [Level(scale={W: 0.5}, risk=0.001)], slot=slot)
        for slot in ("weights", "offload", "experts")
    ]
    kinds.append(make("sure", [Level(put={W: 50}, risk=0.5)], slot="layers"))
    asked = problem(kinds, Budget(device=690))
    found = solve(asked)
    assert "sure" in {t.name for t in found.techniques}
    assert not excess(found.ledger, limits_of(asked.budget))


def test_pairs_beyond_the_limit_are_learned_when_they_are_found(monkeypatch):
    kinds = [
        make("shrink", [Level(scale={W: 0.1}, risk=0.01)], slot="weights"),
        make("also", [Level(scale={W: 0.2}, risk=0.01)], slot="offload"),
        make("sure", [Level(put={W: 0}, risk=0.5)], slot="layers"),
    ]
    monkeypatch.setattr(program, "EAGER_PAIRS", 0)
    asked = problem(kinds, Budget(device=605))
    assert "sure" in {t.name for t in solve(asked).techniques}


def test_the_order_of_registration_changes_nothing():
    rows = [Level(scale={K: 0.5}), Level(scale={K: 0.5}), Level(scale={K: 0.4})]
    kinds = [make(n, rows, slot="cache") for n in ("beta", "alpha", "gamma")]
    kinds += [make("pack", [Level(scale={W: 0.5}), Level(scale={W: 0.5}, risk=0.1)], slot="weights")]
    answers = {solve(problem(order, Budget(device=1000))).techniques for order in (kinds, kinds[::-1]) for _ in "ab"}
    assert [expression(a) for a in answers] == ["pack*alpha"]


def test_every_limited_tier_is_obeyed():
    kinds = [
        make("spill", [Level(scale={W: 0.1}, disk=5000), Level(scale={W: 0.3}, disk=900, risk=0.1)], slot="offload"),
        make("pack", [Level(scale={W: 0.25}, risk=0.4)], slot="weights"),
    ]
    assert expression(solve(problem(kinds, Budget(device=1000))).techniques) == "spill"
    assert expression(solve(problem(kinds, Budget(device=1000, disk=1000))).techniques) == "spill(level=1)"
    assert expression(solve(problem(kinds, Budget(device=1000, disk=10))).techniques) == "pack"
    only = kinds[:1]
    with pytest.raises(BudgetError, match=r"1.56 KiB on device, with the plain job; or 900 B on disk") as caught:
        solve(problem(only, Budget(device=1000, disk=10)))
    assert "give --device-memory 1.57KiB or --disk 900, or" in caught.value.hint
    with pytest.raises(BudgetError, match=r"on device, .*on disk, with pit"):
        pit = make("pit", [Level(add={W: 10}, disk=9)], slot="weights")
        solve(problem([pit], Budget(device=1, disk=1), workload=Compress()))


def test_the_stated_smallest_budget_is_enough_and_one_byte_less_is_not():
    kinds = [
        make("pack", [Level(scale={W: 0.333}, applying=900), Level(scale={W: 0.2}, risk=0.1)], slot="weights"),
        make("fold", [Level(scale={K: 0.37}, risk=0.1)], slot="cache"),
        make("useless", [Level(add={G: 5})], slot="offload"),
    ]
    with pytest.raises(BudgetError) as caught:
        solve(problem(kinds, Budget(device=100)))
    assert "548 B on device, with pack(level=1)*fold" in caught.value.message
    assert "--device-memory 548" in caught.value.hint
    assert expression(solve(problem(kinds, Budget(device=548))).techniques) == "pack(level=1)*fold"
    with pytest.raises(BudgetError):
        solve(problem(kinds, Budget(device=547)))


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 123_456_789, 7 * 2**30, 7 * 2**30 + 1, 2**41 + 12345])
def test_the_flag_in_the_hint_holds_the_bytes(size):
    assert size <= parse_bytes(flag_value(size)) <= size * 1.01 + 1


def test_the_simulated_bytes_decide():
    kinds = [
        make("lean", [Level(scale={K: 0.5})], slot="cache"),
        make("pack", [Level(scale={W: 0.5}, risk=0.2), Level(scale={W: 0.55}, risk=0.1)], slot="weights"),
    ]
    asked = problem(kinds, Budget(device=1400))
    assert expression(solve(asked).techniques) == "lean"
    seen = []

    def simulate(composition):
        seen.append(expression(composition))
        return asked.predict(composition).add(Account.ACTIVATIONS, 30)

    found = solve(asked, simulate)
    assert seen == ["lean", "pack(level=1)"]
    assert expression(found.techniques) == "pack(level=1)"
    assert found.ledger.phase("decode").of(Account.ACTIVATIONS) == 30


def test_a_simulation_below_the_closed_form_rescues_the_smallest():
    kinds = [make("lean", [Level(scale={K: 0.5})], slot="cache")]
    asked = problem(kinds, Budget(device=1350))
    with pytest.raises(BudgetError):
        solve(asked)
    assert expression(solve(asked, lambda c: asked.predict(c).add(S, -100)).techniques) == "lean"


def test_frozen_weights_need_something_to_train():
    rows = {"slot": "weights", "jobs": ("finetune",), "removes": ("dense_weights",)}
    kinds = [
        make("freeze", [Level(scale={W: 0.2})], **rows),
        make("extra", [Level(add={W: 10}, risk=0.01)], slot="adapters", jobs=("finetune",)),
    ]
    tuning = Finetune(tokens=8)
    found = solve(problem(kinds, Budget(device=900), workload=tuning))
    assert expression(found.techniques) == "freeze*extra"
    with pytest.raises(BudgetError):
        solve(problem(kinds[:1], Budget(device=900), workload=tuning))


def test_compressing_takes_a_weights_technique_even_without_a_limit():
    kinds = [make("fine", [Level(risk=0.01), Level(risk=0.2)], slot="weights", jobs=("compress",))]
    assert expression(solve(problem(kinds, Budget(), workload=Compress())).techniques) == "fine"
    with pytest.raises(CompositionError, match="no registered technique"):
        solve(problem([], Budget(device=10), workload=Compress()))


def test_every_technique_that_was_not_chosen_has_a_reason():
    kinds = [
        make("good", [Level(scale={K: 0.5}, risk=0.01)], slot="cache"),
        make("worse", [Level(scale={K: 0.5}, risk=0.03)], slot="cache"),
        make("weak", [Level(scale={K: 0.99})], slot="cache"),
        make("tardy", [Level(scale={K: 0.5}, risk=0.01, ticks=9000)], slot="cache"),
        make("spare", [Level(scale={W: 0.5}, risk=0.5)], slot="weights"),
        make("other", [Level()], slot="optimizer", jobs=("finetune",)),
        make("banned", [Level(scale={W: 0.01})], slot="weights"),
    ]
    by_name = {kind.facts.name: kind for kind in kinds}
    usable, unfit = candidates(SHAPE, WORKLOAD, PLAIN, by_name, exclude=("banned",))
    asked = problem([k for k in kinds if k.facts.name not in ("other", "banned")], Budget(device=1450))
    assert asked.techniques == usable
    chosen = solve(asked).techniques
    assert expression(chosen) == "good"
    reasons = {r.technique: r.reason for r in (*unfit, *rejections(asked, chosen))}
    assert set(reasons) == set(by_name) - {"good"}
    assert "excluded" in reasons["banned"]
    assert "does not serve generate" in reasons["other"]
    assert "risk is higher (3.00% against 1.00%" in reasons["worse"]
    assert "146 B over on device" in reasons["weak"]
    assert "conflicts with good (both fill" in reasons["weak"]
    assert "slower (1.9 s against 1.0 s" in reasons["tardy"]
    assert "not needed" in reasons["spare"]
    plain = rejections(problem(kinds[:1], Budget(device=9999)), ())
    assert plain[0].reason == "not needed: the job fits without it"


def test_what_another_of_its_part_beats_whatever_the_budget_is_not_looked_at():
    kinds = [
        make("better", [Level(scale={K: 0.5}, risk=0.01), Level(scale={K: 0.2}, risk=0.1)], slot="cache", part="keep"),
        make("worse", [Level(scale={K: 0.5}, risk=0.03), Level(scale={K: 0.1}, risk=0.2)], slot="cache", part="keep"),
        make("alone", [Level(scale={K: 0.5}, risk=0.3)], slot="cache", part="store"),
        make("free", [Level(scale={K: 0.5}, risk=0.05)], slot="cache", part="keep"),
        make("bound", [Level(scale={K: 0.5}, risk=0.02)], slot="cache", part="keep", removes=("evenness",)),
    ]
    left = {str(option) for option in undominated(problem(kinds, Budget(device=1450)))}
    assert left == {"better", "better(level=1)", "worse(level=1)", "alone"}
    bound = problem(kinds[3:], Budget(device=1450))
    assert {str(option) for option in undominated(bound)} == {"free", "bound"}


def test_dominated_choices_are_left_out_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(program, "EAGER_PAIRS", 6)
    rows = [Level(scale={W: 0.5}, risk=0.1 * i, ticks=i) for i in range(5)] + [Level(scale={W: 0.2}, risk=0.6)]
    kinds = [make("pack", rows, slot="weights"), make("fold", [Level(scale={K: 0.5}, risk=0.1)] * 4, slot="cache")]
    asked = problem(kinds, Budget(device=1000))
    kept = [str(c) for c in program.Program(asked, choices(asked.techniques)).choices]
    assert kept == ["fold", "pack", "pack(level=5)"]
    assert expression(solve(asked).techniques) == "pack*fold"
