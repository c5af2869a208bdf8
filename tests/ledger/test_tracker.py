import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pintpot.core.ledger import Account, Tier
from pintpot.ledger.steps import choose, decode, prefill, train_step
from pintpot.ledger.timeline import INDEX, Correction, Timeline
from pintpot.ledger.tracker import Tracker
from tests.architectures import tiny_model

torch.set_num_threads(1)
IDS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def train(model, optimizer, steps, tracker):
    tracker.register(model, optimizer)
    for _ in range(steps):
        train_step(model, optimizer, IDS, IDS)


def test_views_are_counted_once_and_freed_tensors_no_more():
    with Tracker() as tracker:
        big = torch.zeros(1000)
        view = big[10:500].view(7, 70).t()
        assert tracker.current_bytes() == 4000
        del big
        assert tracker.current_bytes() == 4000
        del view
        assert tracker.current_bytes() == 0
        tensor = torch.zeros(10)
        tensor.resize_(100)
        assert tracker.current_bytes() == 400
    assert tracker.ledger().peak_bytes() == 4000


def test_inference_mode_sees_inside_composite_operations():
    layer = nn.Linear(64, 64, bias=False)
    inputs = torch.zeros(2, 3, 64)
    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Tracker() as tracker:
            torch.einsum("bti,oi->bto", inputs, layer.weight) * 2
        peaks.append(tracker.ledger().peak_bytes())
    assert peaks[0] == peaks[1]


def test_optimizer_gradients_and_weights_are_exact():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    count = sum(p.numel() for p in model.parameters())
    with Tracker() as tracker:
        train(model, optimizer, 2, tracker)
    ledger = tracker.ledger()
    buffers = sum(b.nbytes for b in model.buffers())
    assert ledger.phases()[-3:] == ("forward", "backward", "step")
    step = ledger.phase("step")
    assert step.of(Account.WEIGHTS) == 4 * count + buffers
    assert step.of(Account.GRADIENTS) == 4 * count
    # Two moments and a step counter for each parameter.
    assert step.of(Account.OPTIMIZER) == 8 * count + 4 * len(list(model.parameters()))
    assert ledger.peak_of(Account.ACTIVATIONS) > 0
    assert ledger.peak_of(Account.KV_CACHE) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_kv_cache_is_exact(name):
    model = tiny_model(name)
    with Tracker() as tracker:
        tracker.register(model)
        progress = prefill(model, IDS)
        for _ in range(5):
            progress = decode(model, choose(progress), progress)
    config = model.config
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", 4)
    # T5 caches the encoder's 40 tokens, and its own 1 + 5.
    tokens = 40 + 6 if name == "t5" else 40 + 5
    final = 2 * layers * heads * 16 * tokens * 2 * 4
    held = {s.cells[INDEX[Account.KV_CACHE, Tier.DEVICE]] for s in tracker.timeline.samples if s.phase == "decode"}
    one_layer_twice = 2 * heads * 16 * tokens * 2 * 4
    assert final <= max(held) <= final + one_layer_twice
    assert tracker._cells[INDEX[Account.KV_CACHE, Tier.DEVICE]] == final
    assert tracker.ledger().phases()[-2:] == ("prefill", "decode")


def test_recomputed_activations_are_activations():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)])
    peaks = {}
    for recompute in (False, True):
        with Tracker() as tracker:
            tracker.register(model)
            inputs = torch.zeros(32, 64, requires_grad=True)
            hidden = inputs
            with tracker.phase("forward"):
                for block in model:
                    hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
            hidden.sum().backward()
        ledger = tracker.ledger()
        peaks[recompute] = ledger.peak_of(Account.ACTIVATIONS)
        made = max(m.of(Account.ACTIVATIONS) for m in ledger.moments if m.phase == "backward")
        assert made >= 32 * 256 * 4
    assert peaks[True] < peaks[False] / 2


def test_many_steps_leave_nothing_behind():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracker(samples=256) as tracker:
        train(model, optimizer, 3, tracker)
        gc.collect()
        before = tracker.current_bytes(), len(tracker._entries), len(tracker._handles)
        peak = tracker.ledger().peak_bytes()
        train(model, optimizer, 40, tracker)
        gc.collect()
        assert (tracker.current_bytes(), len(tracker._entries), len(tracker._handles)) == before
        assert len(tracker.timeline.samples) <= 2 * 256
        assert tracker.ledger().peak_bytes() == peak


def test_hooks_are_gone_and_nothing_is_kept_alive():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    with Tracker() as tracker:
        train(model, optimizer, 1, tracker)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(
        not p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks is not None
    )
    reference = weakref.ref(next(model.parameters()))
    tracker.ledger()
    del model, optimizer, tracker
    gc.collect()
    assert reference() is None


def test_the_timeline_keeps_every_phase_peak_when_it_is_thinned():
    timeline = Timeline(limit=16)
    cells = [0] * len(INDEX)
    best = {}
    generator = torch.Generator().manual_seed(0)
    for sequence in range(5000):
        phase = ("forward", "backward", "step")[sequence // 10 % 3]
        cells[0] = int(torch.randint(1, 10**9, (1,), generator=generator))
        best[phase] = max(best.get(phase, 0), cells[0])
        timeline.add(sequence, phase, sequence // 10, cells)
    assert {s.phase: s.total() for s in timeline.peaks()} == best
    assert len(timeline.samples) <= 40
    assert [s.sequence for s in timeline.samples] == sorted(s.sequence for s in timeline.samples)


def test_corrections_reach_back_to_the_birth_only():
    timeline = Timeline(limit=None)
    cells = [0] * len(INDEX)
    for sequence in range(4):
        cells[0] = 100 * sequence
        timeline.add(sequence, "forward", 0, cells)
    timeline.correct([Correction(2, 50, 0, 1), Correction(3, 30, 0, 2)])
    assert [s.cells[:3] for s in timeline.samples] == [[0, 0, 0], [100, 0, 0], [150, 50, 0], [220, 50, 30]]


def test_a_pass_in_another_thread_is_not_that_of_the_run():
    model = tiny_model("llama")
    with Tracker() as tracker:
        tracker.register(model)
        before = tracker.current_bytes()
        kept = []

        def elsewhere():
            twin = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            kept.append((twin, torch.func.functional_call(model, twin, (), {"input_ids": IDS})))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert tracker.current_bytes() == before
    assert tracker.ledger().phases() == ("load",)
