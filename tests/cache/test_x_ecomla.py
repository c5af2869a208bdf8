"""X-EcoMLA: the best factors of the weights to begin with, and a distillation that brings the teacher back."""

import pytest
import torch

from pintpot.cache.conversions.directions import rotary_rows, truncated
from pintpot.cache.conversions.distillation import Distillation
from pintpot.cache.conversions.x_ecomla import XEcoMLA
from tests.cache.sources import source, tokens

torch.set_num_threads(1)


def weight(rows=24, columns=40):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_factors_are_the_best_of_their_rank():
    matrix = weight()
    up, down = truncated(matrix, 10)
    assert (up.shape, down.shape) == ((24, 10), (10, 40))
    torch.testing.assert_close((matrix - up @ down).square().sum(), torch.linalg.svdvals(matrix)[10:].square().sum())
    torch.testing.assert_close(up.T @ up, torch.eye(10, dtype=torch.float64))


def test_the_rank_follows_the_energy_rounded_up_to_eight():
    values = torch.tensor([8.0, 4.0, 2.0, *[1.0] * 17], dtype=torch.float64)
    matrix = torch.diag(values)
    total = float(values.square().sum())
    assert truncated(matrix, 1, energy=80 / total)[0].shape[1] == 8
    assert truncated(matrix, 1, energy=93.5 / total)[0].shape[1] == 16
    assert truncated(matrix, 1, energy=1.0)[0].shape[1] == 20


def test_rotary_rows_are_whole_pairs_of_evenly_spaced_frequencies():
    plain, rotary = rotary_rows(16, 4)
    assert rotary == [0, 4, 8, 12]
    assert sorted(plain + rotary) == list(range(16))


@torch.no_grad()
def test_a_layer_of_full_rank_has_the_sources_queries_values_and_plain_keys():
    model = source("qwen2")
    made = XEcoMLA(rank=64, rope_dim=8).convert(model, [])
    before, after = model.model.layers[0].self_attn, made.model.layers[0].self_attn
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain, rotary = rotary_rows(16, 8)
    down = after.kv_a_proj_with_mqa(hidden)
    rebuilt = after.kv_b_proj(down[:, :64]).view(5, 4, 8 + 16)
    keys = before.k_proj(hidden).view(5, 2, 16)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(rebuilt[..., :8], keys[..., plain].repeat_interleave(2, dim=1), **close)
    values = before.v_proj(hidden).view(5, 2, 16).repeat_interleave(2, dim=1)
    torch.testing.assert_close(rebuilt[..., 8:], values, **close)
    torch.testing.assert_close(down[:, 64:], keys[..., rotary].mean(1), **close)
    queries = before.q_proj(hidden).view(5, 4, 16)[..., [*plain, *rotary]]
    torch.testing.assert_close(after.q_proj(hidden).view(5, 4, 16), queries, **close)


def test_energy_and_hybrids_and_factored_queries():
    model = source("llama")
    made = XEcoMLA(energy=0.9, rope_dim=8, q_rank=24, every=2).convert(model, [])
    first, second = made.config.kv_lora_ranks
    assert first % 8 == 0 < first < 64
    assert second == 0
    assert made.config.q_lora_ranks == [24, 0]
    assert torch.equal(made.model.layers[1].self_attn.k_proj.weight, model.model.layers[1].self_attn.k_proj.weight)
    assert XEcoMLA(energy=0.9, rope_dim=8).cache_bytes(model.config, 10, 1, torch.float32) is None


def test_the_loss_is_the_divergence_of_the_next_tokens():
    student, teacher = source("llama"), source("qwen2")
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        found = Distillation(student, teacher, 2.0, 0.0)(ids, labels).loss
        taught, learnt = (m(ids).logits[:, :-1].double().softmax(-1) for m in (teacher, student))
        terms = [
            sum(p * torch.log(p / q) for p, q in zip(taught[row, place], learnt[row, place], strict=True))
            for row in range(2)
            for place in range(8)
            if labels[row, place + 1] != -100
        ]
        both = Distillation(student, teacher, 2.0, 0.5)(ids, labels).loss
        text = student(ids, labels=labels).loss
    torch.testing.assert_close(found.double(), 2 * sum(terms) / len(terms), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both, found + 0.5 * text)


@pytest.mark.parametrize("every", [1, 2])
def test_distillation_brings_the_student_to_the_teacher_and_leaves_the_teacher(every):
    method = XEcoMLA(rank=16, rope_dim=8, every=every)
    teacher, ids = source("llama"), tokens(4, 16)
    student = method.convert(source("llama"), [])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = method.objective(student, teacher)
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters())
