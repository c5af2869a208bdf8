"""More bits for the blocks that need them: by the curvature of the loss (Q-BERT), by the entropy of outputs (LUQ)."""

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.weights.by_block import by_block
from pintpot.weights.luq import LUQ, entropy
from pintpot.weights.q_bert import QBERT, hessian_product, largest_eigenvalue
from pintpot.weights.targets import find_targets
from tests.architectures import tiny_model


def texts(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (2, 16), generator=generator) for _ in range(count)]


def bits_of(model) -> dict[str, int]:
    return {name: m.formats[0].bits for name, m in model.named_modules() if hasattr(m, "formats")}


def exact_hessian(model, name: str, text: torch.Tensor) -> torch.Tensor:
    """Of the loss over one small parameter, by double differentiation."""
    parameter = model.get_parameter(name)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parameters = {name: flat.view_as(parameter)}
        return torch.func.functional_call(model, parameters, kwargs={"input_ids": text, "labels": text}).loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, parameter.detach().flatten().clone())


def test_a_product_with_the_hessian_is_that_in_float64_and_the_model_is_left_as_it_was():
    model, exact = tiny_model("mamba"), tiny_model("mamba").double()
    name, text = "backbone.layers.1.mixer.x_proj.weight", texts()[0]
    before = model.get_parameter(name).detach().clone()
    direction = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    vector = {name: direction / direction.norm()}
    found = hessian_product(model, vector, text)[name]
    step, gradients = 1e-4 * float(before.norm()), []
    for sign in (1, -1):
        exact.get_parameter(name).data = before.double() + sign * step * vector[name].double()
        gradients.append(torch.autograd.grad(exact(text, labels=text).loss, exact.get_parameter(name))[0])
    expected = (gradients[0] - gradients[1]) / (2 * step)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(model.get_parameter(name), before)


def test_power_iteration_finds_the_top_of_the_spectrum():
    model = tiny_model("llama").eval()
    name, text = "model.layers.1.input_layernorm.weight", texts()[0]
    values = torch.linalg.eigvalsh(exact_hessian(model, name, text))
    top = float(values[values.abs().argmax()])
    assert largest_eigenvalue(model, [name], text, 20) == pytest.approx(top, rel=0.1)


def test_q_bert_gives_the_more_curved_block_more_bits():
    for curved in (0, 1):
        model = tiny_model("llama")
        for index, layer in enumerate(model.model.layers):
            # What a layer is given scales its gradients.
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data *= 5.0 if index == curved else 0.2
        method = QBERT(group_size=32, iterations=2, parts=1)
        targets, _ = find_targets(model)
        scores = method.scores(model, by_block(targets), texts())
        assert scores[f"model.layers.{curved}"] > 2 * scores[f"model.layers.{1 - curved}"]
        method.quantize_model_(model, texts())
        assert {bits for name, bits in bits_of(model).items() if f"layers.{curved}." in name} == {4}
        assert {bits for name, bits in bits_of(model).items() if f"layers.{1 - curved}." in name} == {2}


def test_entropy_of_few_and_of_many_places():
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(8, 16, generator=generator) * 10
    few = places[torch.randint(0, 8, (512,), generator=generator)] + 0.01 * torch.randn(512, 16, generator=generator)
    assert entropy(few, 8) == pytest.approx(2.08, abs=0.4)
    assert entropy(places[:1].expand(512, -1).contiguous(), 100) == pytest.approx(0.0, abs=1e-6)
    assert entropy(torch.randn(512, 16, generator=generator), 100) > 3.5


def test_luq_gives_the_block_of_more_entropy_more_bits():
    """The second block adds the same large vector to every token, the first one tells them apart."""
    model = tiny_model("opt")
    second = model.model.decoder.layers[1]
    second.final_layer_norm.weight.data.zero_()
    model.get_input_embeddings().weight.data *= 0.01
    model.model.decoder.embed_positions.weight.data *= 0.01
    method = LUQ(group_size=32, clusters=20)
    targets, _ = find_targets(model)
    scores = method.scores(model, by_block(targets), texts())
    wide = max(scores, key=scores.get)
    method.quantize_model_(model, texts())
    assert {bits for name, bits in bits_of(model).items() if f"{wide}." in name} == {4}
    assert {bits for name, bits in bits_of(model).items() if f"{wide}." not in name} == {2}


def test_blocks_compete_with_their_like_and_bytes_do_not_depend_on_who_wins():
    model = tiny_model("t5")
    targets, _ = find_targets(model)
    method, sizes = QBERT(group_size=32), set()
    for order in (1, -1):
        evidence = {t.parameter: {"score": torch.tensor(order * float(index // 8))} for index, t in enumerate(targets)}
        layout = method.layout(targets, evidence)
        sizes.add(sum(t.nbytes(layout[t.parameter]) for t in targets))
        for part in ("encoder", "decoder"):
            own = {layout[t.parameter][0].bits for t in targets if t.block.startswith(part)}
            assert own == {2, 4}
    layout = method.layout(targets)
    assert sizes == {sum(t.nbytes(layout[t.parameter]) for t in targets)}


def test_settings_are_checked():
    with pytest.raises(CompositionError, match="share of the blocks"):
        LUQ(large_fraction=-0.1)
