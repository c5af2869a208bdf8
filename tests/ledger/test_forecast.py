"""The time forecast: counted work against closed forms, and the roofline against arithmetic by hand."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from pintpot.core.shape import ModelShape
from pintpot.core.work import PhaseWork, Work
from pintpot.core.workload import Compress, Finetune, Generate
from pintpot.ledger import forecast as subject
from pintpot.ledger.forecast import baseline_work, forecast, phase_parts
from pintpot.ledger.work_counter import LARGE_ALLOCATION_BYTES, WorkCounter
from tests.architectures import TINY, tiny_config
from tests.ledger.test_machine import MADE_UP

ONE = Generate(batch=1, prompt_tokens=64, new_tokens=8)


def shape_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> ModelShape:
    return ModelShape.from_config(tiny_config(name), dtype)


def deep(layers: int) -> ModelShape:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=layers)
    return ModelShape.from_config(config, torch.float32)


def total(phase: PhaseWork) -> float:
    return sum(phase.flops.values())


def test_decoding_multiplies_each_weight_of_a_matrix_once():
    shape = shape_of()
    matrices = sum(p.numel for p in shape.linears()) + 64 * 256
    decode = baseline_work(shape, ONE).phases["decode"]
    # Half way through the answer: 64 tokens, 3 decoded ones and this one; two products in each of two layers.
    attention = 2 * 2 * 2 * 64 * (64 + 3 + 1)
    assert total(decode) == 2 * matrices + attention
    assert 4 * matrices < decode.product_bytes < 4.8 * matrices


def test_prefill_grows_by_the_square_of_the_prompt_beyond_the_matrices():
    shape = shape_of()
    flops = [total(baseline_work(shape, replace(ONE, prompt_tokens=n)).phases["prefill"]) for n in (128, 256, 512)]
    # Without attention's quadratic term the second difference would be that of a line: zero.
    bend = (flops[2] - flops[1]) - 2 * (flops[1] - flops[0])
    heads_times_width = 64
    causal = 2 * 2 * heads_times_width * 0.5
    assert bend == pytest.approx(2 * causal * (512**2 - 3 * 256**2 + 2 * 128**2), rel=0.01)


def test_a_long_context_makes_each_token_dearer():
    short, long = (baseline_work(shape_of(), replace(ONE, prompt_tokens=n)).phases["decode"] for n in (64, 448))
    cache_bytes = 2 * 2 * 2 * 16 * 4 * (448 - 64)
    # At the least the cache is read once.
    assert long.read_bytes - short.read_bytes >= cache_bytes


def test_half_the_bytes_in_half_the_dtype():
    wide, narrow = (baseline_work(shape_of(dtype=d), ONE).phases["decode"] for d in (torch.float32, torch.bfloat16))
    assert narrow.product_bytes == pytest.approx(wide.product_bytes / 2, rel=0.05)
    assert list(narrow.flops) == ["bfloat16"]


def test_a_step_is_three_passes_and_the_optimizer():
    shape = shape_of()
    step = baseline_work(shape, Finetune(batch=2, tokens=64)).phases["step"]
    matrices = sum(p.numel for p in shape.linears()) + 64 * 256
    assert total(step) == pytest.approx(6 * matrices * 2 * 64, rel=0.15)
    # AdamW reads and writes the weight, the gradient and two moments.
    assert step.read_bytes - step.product_bytes > 7 * 4 * shape.numel


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_has_work(name):
    generate = baseline_work(shape_of(name), replace(ONE, prompt_tokens=12, new_tokens=2)).phases
    assert set(generate) == {"prefill", "decode"}
    train = baseline_work(shape_of(name), Finetune(batch=1, tokens=8)).phases["step"]
    for phase in (*generate.values(), train):
        assert total(phase) > 0
        assert 0 < phase.product_bytes <= phase.read_bytes
        assert phase.operations > 20


def test_one_new_token_needs_no_decoding():
    assert set(baseline_work(shape_of(), replace(ONE, new_tokens=1)).phases) == {"prefill"}


def test_jobs_that_do_not_run_the_model_have_no_work():
    work = baseline_work(shape_of(), Compress())
    assert work == Work()
    assert forecast(work, Compress(), MADE_UP).bound_by == ()


def test_deep_models_continue_shallow_ones(monkeypatch):
    shape = deep(18)
    build = subject.plain(ONE)
    continued = subject.count_work(build, shape, ONE)
    monkeypatch.setattr(subject, "shallow_depths", lambda config: None)
    whole = subject.count_work(build, shape, ONE)
    for name, phase in whole.phases.items():
        assert continued.phases[name].operations == phase.operations
        assert total(continued.phases[name]) == pytest.approx(total(phase))
        assert continued.phases[name].read_bytes == pytest.approx(phase.read_bytes)


def test_products_take_the_longer_of_moving_and_arithmetic():
    # One row: 1e9 operations a second, 8e9 bytes a second.
    moving = PhaseWork(read_bytes=16 * 10**9, product_bytes=16 * 10**9, flops={"float32": 1e9})
    assert phase_parts(moving, 1, MADE_UP) == pytest.approx(
        {"memory": 2.0, "arithmetic": 0.0, "launches": 0.0, "disk": 0.0}
    )
    computing = replace(moving, flops={"float32": 5e9})
    assert phase_parts(computing, 1, MADE_UP)["arithmetic"] == pytest.approx(5.0)
    assert phase_parts(computing, 1, MADE_UP)["memory"] == 0.0
    many_short_rows = replace(moving, dots=10**7)
    assert phase_parts(many_short_rows, 1, MADE_UP)["memory"] == pytest.approx(3.0)


def test_everything_else_adds_up():
    phase = PhaseWork(
        read_bytes=3 * 10**10, product_bytes=10**10, flops={"float32": 64e9}, fresh_bytes=4 * 10**9,
        operations=1000, overhead_seconds=0.5, disk_bytes=10**8,
    )  # fmt: skip
    parts = phase_parts(phase, 512, MADE_UP)
    # 2e10 bytes at 1e10 a second, and 4e9 new ones at 2e9; the products' own bytes (1 s) hide behind 1 s of arithmetic.
    assert parts == pytest.approx({"memory": 4.0, "arithmetic": 1.0, "launches": 0.51, "disk": 1.0})
    result = forecast(Work({"step": phase}), Finetune(batch=1, tokens=512), MADE_UP)
    assert result.step_seconds == pytest.approx(6.51)
    assert result.bound_by == (("step", "memory"),)
    assert result.prefill_seconds is None


def test_a_gpu_hides_launches_behind_its_work():
    gpu = replace(MADE_UP, kind="cuda", fresh_bytes_per_second=0.0)
    busy = PhaseWork(read_bytes=10**10, operations=1000)
    assert phase_parts(busy, 1, gpu)["launches"] == 0.0
    idle = PhaseWork(operations=1000)
    assert phase_parts(idle, 1, gpu)["launches"] == pytest.approx(0.01)


def test_moving_less_is_faster_even_below_the_products_own_bytes():
    work = Work({"decode": PhaseWork(read_bytes=8 * 10**9, product_bytes=8 * 10**9, flops={"float32": 1.0})})
    packed = work.plus("decode", read_bytes=-6 * 10**9)
    seconds = [forecast(w, ONE, MADE_UP).decode_seconds for w in (work, packed)]
    assert seconds == pytest.approx([1.0, 0.25])


def test_rows_decide_the_rate():
    work = Work({"decode": PhaseWork(flops={"float32": 64e9})})
    alone, together = (forecast(work, replace(ONE, batch=b), MADE_UP).decode_seconds for b in (1, 512))
    assert (alone, together) == pytest.approx((64.0, 1.0))


def test_counting_on_real_tensors():
    left, right = torch.ones(4, 8), torch.ones(8, 16)
    with WorkCounter() as counter:
        product = left @ right
        product.view(-1).add_(1)
    assert counter.flops == {"float32": 2 * 4 * 8 * 16}
    assert counter.product_bytes == 4 * (4 * 8 + 8 * 16 + 2 * 4 * 16)
    assert counter.moved_bytes == counter.product_bytes + 4 * 2 * 4 * 16
    assert counter.operations == 3


def test_large_allocations_are_counted_as_new_memory():
    with WorkCounter() as counter:
        torch.zeros(LARGE_ALLOCATION_BYTES, dtype=torch.uint8)
        torch.zeros(LARGE_ALLOCATION_BYTES - 1, dtype=torch.uint8)
    assert counter.fresh_bytes == LARGE_ALLOCATION_BYTES


def test_causal_attention_does_half_the_products():
    query = torch.ones(1, 2, 32, 8)
    counts = []
    for causal in (False, True):
        with WorkCounter() as counter:
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)
        counts.append(counter.flops["float32"])
    assert counts == [2 * 2 * 2 * 32 * 32 * 8, 2 * 2 * 32 * 32 * 8]
