"""The loss without logits: what it equals, what it saves, and what it refuses."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pintpot.activations import ChunkedCrossEntropy
from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.workload import Finetune, Generate
from pintpot.ledger.measure import measure
from tests.architectures import tiny_model

WORK = Finetune(batch=2, tokens=64)


def model_of(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **sizes)).train()


def step(model: LlamaForCausalLM, **more: object) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    ids = torch.randint(0, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    loss = model(input_ids=ids, labels=labels, use_cache=False, **more).loss
    loss.backward()
    return float(loss.detach()), model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 37}])
def test_ignored_labels_and_counted_items_are_respected(more):
    model = model_of(500)
    plain = step(model, **more)
    with ChunkedCrossEntropy().scope(model, WORK):
        ours = step(model, **more)
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-6)


def test_the_logits_are_never_there_at_once():
    model = model_of(8000)
    peaks = []
    for chunked in (False, True):
        with measure(model=model) as run:
            if chunked:
                with ChunkedCrossEntropy().scope(model, WORK):
                    step(model)
            else:
                step(model)
        peaks.append(run.ledger.peak_bytes())
    logits = 2 * 64 * 8000 * 4
    assert peaks[1] < peaks[0] - logits


def test_generation_and_evaluation_inside_the_scope_have_logits():
    model = model_of(500)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids)
        with ChunkedCrossEntropy().scope(model, WORK):
            inside = model(input_ids=ids, labels=ids)
    assert torch.equal(plain.logits, inside.logits)
    assert torch.equal(plain.loss, inside.loss)


def test_models_whose_logits_are_changed_after_the_head_are_refused():
    for name, says in (("gemma2", "final_logit_softcapping"), ("t5", "head")):
        with pytest.raises(UnsupportedModel, match=says), ChunkedCrossEntropy().scope(tiny_model(name), WORK):
            pass
    with pytest.raises(CompositionError, match="nothing to do"):
        ChunkedCrossEntropy().scope(model_of(500), Generate(batch=1, prompt_tokens=8, new_tokens=8))


def test_a_loss_of_ones_own_outside_the_model_is_reported():
    model = model_of(500)
    with pytest.raises(UnsupportedModel, match="loss"), ChunkedCrossEntropy().scope(model, WORK):
        model(input_ids=torch.arange(10)[None])
    assert "forward" not in model.lm_head.__dict__
    assert "_loss_function" not in model.__dict__
