"""LoRAPrune: what importance is, what goes with what, and that the smaller model is an ordinary one."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, StableLmConfig

from pintpot.core.errors import CompositionError, DataError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.weights.by_training import follow_, observe_
from pintpot.weights.loraprune import AdaptedLinear, LoRAPrune, Units
from tests.architectures import tiny_config, tiny_model

IDS = torch.randint(3, 256, (4, 24), generator=torch.Generator().manual_seed(0))


def test_importance_comes_from_the_adapters_alone():
    generator = torch.Generator().manual_seed(1)
    layer = AdaptedLinear(nn.Linear(10, 6), rank=3, scale=2.0, generator=generator)
    with torch.no_grad():
        layer.second.normal_(generator=generator)
    layer(torch.randn(5, 10, generator=generator)).square().sum().backward()
    assert layer.base.weight.grad is None
    a, b = layer.first.detach().double(), layer.second.detach().double()
    da, db = layer.first.grad.double(), layer.second.grad.double()
    weight = layer.base.weight.detach().double() + 2 * b @ a
    expected = ((db @ a + b @ da - db @ da) * weight).abs()
    torch.testing.assert_close(layer.importance().double(), expected, rtol=1e-3, atol=1e-4)


def test_heads_and_channels_without_effect_go_first():
    model = tiny_model("llama")
    dead = [1, 5, 77, 100]
    with torch.no_grad():
        for layer in model.model.layers:
            # The second head of keys and values, with both its queries, changes nothing.
            layer.self_attn.v_proj.weight[16:] = 0
            layer.self_attn.o_proj.weight[:, 32:] = 0
            layer.mlp.down_proj.weight[:, dead] = 0
            layer.mlp.up_proj.weight[dead] = 0
    dense = copy.deepcopy(model)
    method = LoRAPrune(kept_fraction=0.5, learning_rate=0.0, every=1)
    units = list(method.prepare_(model).units.values())
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith(".second")):
            parameter -= 0.1 * parameter.grad
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for own in units:
        own.observe_()
        own.prune_(own.count // 2 if own.count == 2 else own.count - 4)
    assert [own.kept.nonzero()[:, 0].tolist() for own in units[::2]] == [[0], [0]]
    for own in units[1::2]:
        assert (~own.kept).nonzero()[:, 0].tolist() == dead
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            nn.init.zeros_(module.second)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_what_is_left_is_an_ordinary_smaller_model(architecture, tmp_path):
    model = tiny_model(architecture)
    shape = ModelShape.from_config(tiny_config(architecture))
    method = LoRAPrune(kept_fraction=0.5, every=1)
    method.prune_(model, [IDS] * 4)
    assert model.config.num_key_value_heads == 1
    assert model.config.intermediate_size == 64
    assert {type(m) for m in model.modules()} & {AdaptedLinear, Units} == set()
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        logits = model(IDS).logits
        model.save_pretrained(tmp_path / "pruned")
        again, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
        assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(IDS).logits, logits)
    ledger = Ledger("predicted", (Moment("decode", {}).with_bytes(Account.WEIGHTS, shape.weight_bytes),))
    predicted = method.predict(ledger, shape, Generate(batch=1, prompt_tokens=8, new_tokens=2))
    held = sum(p.nbytes for p in again.parameters())
    assert predicted.peak_of(Account.WEIGHTS) == held < shape.weight_bytes


def test_pruning_while_training_beats_pruning_in_one_go():
    def train(model, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = tiny_model("llama")
    train(model, 40)
    losses = {}
    for steps in (1, 40):
        pruned = copy.deepcopy(model)
        LoRAPrune(learning_rate=3e-3, every=2).prune_(pruned, [IDS] * steps)
        with torch.no_grad():
            losses[steps] = float(pruned(input_ids=IDS, labels=IDS).loss)
    assert losses[40] < 0.7 * losses[1]


def test_the_share_rises_with_the_cube_of_what_is_left():
    method = LoRAPrune(kept_fraction=0.5, warmup=0.1, cooldown=0.1)
    kept = [method.kept_at(step / 100, 128) for step in range(0, 101, 10)]
    assert kept[:2] == [128, 128]
    assert kept[5] == 128 - int(64 * (1 - 0.5**3))
    assert kept[9:] == [64, 64]


def test_all_is_gone_before_the_cooldown_however_few_the_steps():
    model = tiny_model("llama")
    units = list(LoRAPrune(every=1000, cooldown=0.5).prepare_(model).units.values())
    for progress, share in ((0.4, 1.0), (0.5, 0.5), (0.9, 0.5)):
        model(input_ids=IDS, labels=IDS).loss.backward()
        observe_(model)
        model.zero_grad()
        follow_(model, progress)
        assert [int(own.kept.sum()) for own in units] == [share * own.count for own in units]


def test_refusals():
    for name in ("gpt2", "phi", "mixtral"):
        with pytest.raises(UnsupportedModel, match=r"loraprune: .* has no linear layer"):
            LoRAPrune().prune_(tiny_model(name), [IDS])
    partial = StableLmConfig(**{**vars(tiny_config("llama")), "model_type": "stablelm"})
    with pytest.raises(UnsupportedModel, match=r"stablelm does not settle the size of model.layers.0.self_attn.q_proj"):
        LoRAPrune().prune_(ModelShape.from_config(partial).build("cpu"), [IDS])
    with pytest.raises(DataError, match="there is none"):
        LoRAPrune().prune_(tiny_model("llama"), [])
    with pytest.raises(CompositionError, match="cannot keep"):
        LoRAPrune(warmup=0.6, cooldown=0.5)
    with pytest.raises(CompositionError, match="rank"):
        LoRAPrune(rank=0)
