"""What holds for every registered adapter, on every architecture."""

import pytest
import torch
from peft import PeftModel

from pintpot.adapters import merge_adapter, save_adapter
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Finetune
from pintpot.weights.rtn import RTN
from tests.architectures import ATTENTION, tiny_config, tiny_model

NAMES = tuple(techniques("adapters"))
GRID = (*ATTENTION, "t5")
IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, labels=IDS, use_cache=False).logits


def trained(name: str, architecture: str) -> tuple[PeftModel, list[float]]:
    torch.manual_seed(0)
    model = techniques("adapters")[name]().attach(tiny_model(architecture)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize("architecture", GRID)
@pytest.mark.parametrize("name", NAMES)
def test_starts_as_the_plain_model_with_the_predicted_parameters(name, architecture):
    plain = logits(tiny_model(architecture))
    method = techniques("adapters")[name]()
    model = method.attach(tiny_model(architecture))
    assert torch.equal(logits(model), plain)
    shape = ModelShape.from_config(tiny_config(architecture), torch.float32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == method.adapter_numel(shape) > 0


@pytest.mark.parametrize("architecture", GRID)
@pytest.mark.parametrize("name", NAMES)
def test_trains_saves_loads_by_peft_and_merges(name, architecture, tmp_path):
    model, losses = trained(name, architecture)
    assert min(losses) < losses[0]
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(architecture), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), wanted)
    torch.testing.assert_close(logits(merge_adapter(loaded)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_adapter(name):
    first, losses = trained(name, "llama")
    second, again = trained(name, "llama")
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_works_with_the_activation_scopes(name):
    work = Finetune(batch=2, tokens=16)
    for kind in techniques("activations").values():
        found = []
        for scoped in (False, True):
            torch.manual_seed(0)
            model = techniques("adapters")[name]().attach(tiny_model("llama")).train()
            if scoped:
                with kind().scope(model, work, budget_bytes=None):
                    model(input_ids=IDS, labels=IDS).loss.backward()
            else:
                model(input_ids=IDS, labels=IDS).loss.backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        tolerance = {"rtol": 0, "atol": 0} if kind.exact else {"rtol": 1e-4, "atol": 1e-6}
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("name", NAMES)
def test_trains_and_merges_over_packed_weights(name, architecture):
    base = tiny_model(architecture)
    RTN().quantize_model_(base)
    plain = logits(base)
    torch.manual_seed(0)
    model = techniques("adapters")[name]().attach(base).train()
    assert torch.equal(logits(model), plain)
    packed = {n: b.clone() for n, b in model.named_buffers()}
    with techniques("activations")["sublinear-checkpointing"]().scope(model.train(), Finetune(batch=2, tokens=16)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert min(losses) < losses[0]
    assert all(torch.equal(b, packed[n]) for n, b in model.named_buffers())
    wanted = logits(model)
    # Merging rounds to the grid again, so it is near, not equal; the plain model is far.
    assert (logits(merge_adapter(model)) - wanted).norm() < 0.5 * (plain - wanted).norm()
