"""Each weight parameterisation against a plain float64 twin, what its idea promises, and what it must refuse."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.expression import parse
from pintpot.core.slots import conflict
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import GradNormLoRP, Lost, ReLora, SLTrain, Sst
from pintpot.optim._parameterize import linear_names, sum_linears
from tests.architectures import tiny_model
from tests.optim.test_projected import adam

STEPS, LR, RANK = 20, 0.02, 8
METHODS = {
    "sltrain": SLTrain(rank=RANK, density=0.1),
    "low-rank": SLTrain(rank=RANK, density=0.0),
    "lost": Lost(rank=RANK, sparsity=0.2),
    "sst": Sst(rank=RANK, interval_steps=3),
    "relora": ReLora(rank=RANK, restart_gap=7),
    "lora": ReLora(rank=RANK, restart_gap=0),
    "gradnormlorp": GradNormLoRP(rank=RANK, projected_rank=3, update_gap=6, scale=0.5),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    made = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype)
    for p in made.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return made


def batch(step: int) -> torch.Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(made: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return (made - inputs.sin().flip(-1)).square().mean()


def prepared(name: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = network(dtype)
    METHODS[name].prepare_(model, 5)
    return model


def optimizer_for(name: str, model: nn.Module, **settings: float) -> torch.optim.Optimizer:
    rule = METHODS[name].rule()
    made = torch.optim.Adam(model.parameters(), lr=LR) if rule is None else rule.optimizer(model, lr=LR)
    METHODS[name].follow_(model, made)
    return made


def run(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        inputs = batch(step).to(next(model.parameters()).dtype)
        loss = loss_of(model(inputs), inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def galore(state: dict, key: object, g: torch.Tensor, step: int) -> torch.Tensor:
    """The direction of GaLore for a factor, the smaller side on the left."""
    wide = g if g.shape[0] <= g.shape[1] else g.T
    if (step - 1) % 6 == 0:
        vectors = torch.linalg.svd(wide)[0][:, :3]
        # Moments are kept, so each vector must keep its sign.
        state["basis", key] = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    basis = state["basis", key]
    moved = 0.5 * basis @ adam(state, key, basis.T @ wide, step)
    return moved if wide is g else moved.T


class Twin:
    """Dense weights made from terms by autograd, as the paper writes them; textbook Adam, or GaLore for matrices."""

    def __init__(self, name: str, model: nn.Sequential) -> None:
        self.name, self.state = name, {}
        self.layers = [dict(layer.named_parameters()) | dict(layer.named_buffers()) for layer in (model[0], model[2])]
        self.layers = [{key: value.detach().clone() for key, value in terms.items()} for terms in self.layers]
        self.ages = [dict.fromkeys(terms, 0) for terms in self.layers]
        self.trained = [[n for n, _ in layer.named_parameters()] for layer in (model[0], model[2])]

    def weight(self, t: dict) -> torch.Tensor:
        out, inside = t["left"].shape[0], t["right"].shape[1]
        product = t["left"] @ t["right"]
        if self.name in ("sltrain", "low-rank"):
            flat = torch.zeros(out * inside, dtype=product.dtype).index_put((t["places"].long(),), t["entries"])
            return 32 / RANK * product + flat.view(out, inside)
        if self.name == "lost":
            whole = torch.zeros(out, inside, dtype=product.dtype)
            return 0.7 * product + 0.3 * whole.index_copy(1, t["channels"].long(), t["columns"])
        if self.name in ("relora", "lora"):
            return t["base"] + 32 / RANK * product
        sum_ = t["base"] + 16 / RANK * product
        return t["norms"][:, None] * sum_ / sum_.norm(dim=1, keepdim=True)

    def step(self, number: int, model: nn.Sequential) -> float:
        live = [
            {key: value.requires_grad_(key in names) for key, value in t.items()}
            for t, names in zip(self.layers, self.trained, strict=True)
        ]
        first, last = live
        hidden = functional.linear(batch(number), self.weight(first), first["bias"]).tanh()
        loss = loss_of(functional.linear(hidden, self.weight(last), last["bias"]), batch(number))
        keys = [(i, key) for i, names in enumerate(self.trained) for key in names]
        grads = torch.autograd.grad(loss, [live[i][key] for i, key in keys])
        for (i, key), g in zip(keys, grads, strict=True):
            self.ages[i][key] += 1
            rule = galore if self.name == "gradnormlorp" and g.dim() == 2 else adam
            move = rule(self.state, (i, key), g, self.ages[i][key])
            live[i][key] = live[i][key].detach() - LR * move
        self.layers = [{key: value.detach() for key, value in t.items()} for t in live]
        if self.name == "relora" and (number + 1) % 7 == 0:
            for i, (t, layer) in enumerate(zip(self.layers, (model[0], model[2]), strict=True)):
                # The new draw is the method's own.
                t["base"], t["left"] = self.weight(t), torch.zeros_like(t["left"])
                t["right"] = layer.right.detach().clone()
                for key in ("left", "right"):
                    self.ages[i][key] = 0
                    self.state.pop((i, key))
        return loss.item()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sst"])
def test_agrees_with_its_twin(name):
    model = prepared(name)
    if name == "gradnormlorp":
        # A zero factor gives the other a zero gradient, whose subspace is anyone's guess.
        for layer in (model[0], model[2]):
            layer.left.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(9))
    twin, optimizer = Twin(name, model), optimizer_for(name, model)
    for step in range(STEPS):
        losses = run(name, model, optimizer, range(step, step + 1)), twin.step(step, model)
        assert losses[0][0] == pytest.approx(losses[1], rel=1e-9)
    for layer, terms in zip((model[0], model[2]), twin.layers, strict=True):
        torch.testing.assert_close(layer.dense().detach(), twin.weight(terms), rtol=1e-8, atol=1e-10)


class Spectral:
    """One layer of SST with whole U, s and V, and the update rules of the paper."""

    def __init__(self, linear: nn.Linear, layer: nn.Module) -> None:
        self.u, self.s, vt = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.v, self.bias = vt.T, layer.bias.detach().clone()
        self.restart(layer)
        self.of_s = {}

    def restart(self, layer: nn.Module) -> None:
        self.chosen, self.moments, self.age = layer.order[:RANK].long(), {}, 0

    def weight(self) -> torch.Tensor:
        return self.u @ torch.diag(self.s) @ self.v.T

    def step(self, of_weight: torch.Tensor, of_bias: torch.Tensor, number: int, since: int) -> None:
        self.age += 1
        of_s = torch.einsum("oi,ok,ik->k", of_weight, self.u, self.v)
        # Enhanced: without the singular values.
        of_u, of_v = of_weight @ self.v[:, self.chosen], of_weight.T @ self.u[:, self.chosen]
        self.s = (self.s - LR * adam(self.of_s, "s", of_s, since)).clamp_min(0)
        self.bias = self.bias - LR * adam(self.of_s, "bias", of_bias, number)
        for side, g in (("u", of_u), ("v", of_v)):
            whole = getattr(self, side).clone()
            moved = whole[:, self.chosen] - LR * adam(self.moments, side, g, self.age)
            whole[:, self.chosen] = moved / moved.norm(dim=0)
            setattr(self, side, whole)


def test_sst_agrees_with_its_twin():
    model = prepared("sst")
    optimizer = optimizer_for("sst", model)
    twins = [Spectral(network()[i], model[i]) for i in (0, 2)]
    since = 0
    for step in range(STEPS):
        loss = run("sst", model, optimizer, range(step, step + 1))[0]
        weights = [twin.weight().requires_grad_() for twin in twins]
        biases = [twin.bias.clone().requires_grad_() for twin in twins]
        hidden = functional.linear(batch(step), weights[0], biases[0]).tanh()
        expected = loss_of(functional.linear(hidden, weights[1], biases[1]), batch(step))
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        grads = torch.autograd.grad(expected, [*weights, *biases])
        since += 1
        for i, twin in enumerate(twins):
            twin.step(grads[i], grads[2 + i], step + 1, since)
        if (step + 1) % 3 == 0:
            for twin, layer in zip(twins, (model[0], model[2]), strict=True):
                if (step + 1) % 6 == 0:  # Two draws of 8 vectors are a round of 16.
                    twin.u, twin.s, vt = torch.linalg.svd(twin.weight(), full_matrices=False)
                    twin.v = vt.T
                    twin.of_s.pop("s")
                twin.restart(layer)
            since = 0 if (step + 1) % 6 == 0 else since
    for twin, layer in zip(twins, (model[0], model[2]), strict=True):
        torch.testing.assert_close(layer.dense().detach(), twin.weight(), rtol=1e-7, atol=1e-9)


def test_sltrain_keeps_no_dense_weight_for_the_backward_pass():
    model, seen = prepared("sltrain"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        model(batch(0))
    assert seen
    assert not any(tuple(shape) in ((24, 16), (16, 24)) for shape in seen)


def test_sltrain_trains_exactly_the_drawn_entries_beyond_its_rank():
    model = prepared("sltrain")
    layer = model[0]
    places = layer.places.tolist()
    assert places == sorted(set(places))
    assert len(places) == int(0.1 * 24 * 16)
    assert layer.places.dtype == torch.int32
    run("sltrain", model, optimizer_for("sltrain", model), range(5))
    rest = layer.dense() - 4 * layer.left @ layer.right
    assert torch.linalg.matrix_rank(layer.dense()) > RANK
    assert set(rest.flatten().abs().gt(1e-12).nonzero().flatten().tolist()) <= set(places)
    counts = torch.zeros(24 * 16)
    for seed in range(300):
        METHODS["sltrain"].prepare_(made := network(torch.float32), seed)
        counts[made[0].places.long()] += 1
    # Every place is as likely: 300 draws at 0.099 give 30 +- 5; seven deviations for the extremes of 384.
    assert counts.min() > 30 - 35
    assert counts.max() < 30 + 35
    assert abs(counts[:192].sum() - counts[192:].sum()) < 0.1 * counts.sum()


def test_lost_starts_from_the_leading_vectors_and_the_worst_columns():
    weight = network()[0].weight.detach()
    layer = prepared("lost")[0]
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    leading = u[:, :RANK] @ torch.diag(s[:RANK]) @ vt[:RANK]
    torch.testing.assert_close((layer.left @ layer.right).detach(), leading)
    torch.testing.assert_close(layer.left.norm(dim=0), layer.right.norm(dim=1))
    worst = (weight - leading).norm(dim=0).topk(3).indices.sort().values
    assert layer.channels.tolist() == worst.tolist()
    assert torch.equal(layer.columns, weight[:, worst])


def test_sst_moves_all_values_and_only_the_drawn_vectors():
    model = prepared("sst")
    layer, optimizer = model[0], optimizer_for("sst", model)
    torch.testing.assert_close(layer.dense(), network()[0].weight)
    before = {name: t.detach().clone() for name, t in layer.named_parameters()}
    still = layer.still_left.clone(), layer.still_right.clone()
    run("sst", model, optimizer, range(2))
    assert (layer.values != before["values"]).all()
    assert (layer.left != before["left"]).any(dim=1).all()
    assert torch.equal(layer.still_left, still[0])
    assert torch.equal(layer.still_right, still[1])
    torch.testing.assert_close(layer.left.norm(dim=1), torch.ones(RANK, dtype=torch.float64))
    drawn = set(layer.order[:RANK].tolist())
    run("sst", model, optimizer, range(2, 3))
    assert set(layer.order[:RANK].tolist()) != drawn
    assert layer.left not in optimizer.state
    assert optimizer.state[layer.values]["step"] == 3
    assert sorted(layer.order.tolist()) == list(range(16))


def test_sst_gives_vectors_of_small_values_a_whole_gradient():
    model = prepared("sst")
    with torch.no_grad():
        model[0].values.zero_()
    loss_of(model(batch(0)), batch(0)).backward()
    assert (model[0].left.grad.norm(dim=1) > 1e-6).all()


def test_relora_reaches_a_higher_rank_by_restarts():
    ranks = {}
    for name in ("relora", "lora"):
        model = prepared(name)
        run(name, model, optimizer_for(name, model), range(STEPS))
        ranks[name] = int(torch.linalg.matrix_rank(model[0].dense() - network()[0].weight, atol=1e-6))
    assert ranks["lora"] == RANK < ranks["relora"]


def test_relora_forgets_the_states_of_its_factors_at_a_restart():
    model = prepared("relora")
    optimizer = optimizer_for("relora", model)
    run("relora", model, optimizer, range(7))
    layer = model[0]
    assert not layer.left.any()
    assert layer.left not in optimizer.state
    assert layer.right not in optimizer.state
    assert optimizer.state[layer.bias]["step"] == 7


def test_gradnormlorp_trains_norms_apart_from_directions_under_projection():
    model = prepared("gradnormlorp")
    layer, optimizer = model[0], optimizer_for("gradnormlorp", model)
    torch.testing.assert_close(layer.dense(), network()[0].weight)
    run("gradnormlorp", model, optimizer, range(STEPS))
    torch.testing.assert_close(layer.dense().norm(dim=1), layer.norms)
    assert optimizer.state[layer.right]["exp_avg"].shape == (3, 16)
    assert optimizer.state[layer.left]["exp_avg"].shape == (3, 24)
    assert optimizer.state[layer.norms]["exp_avg"].shape == (24,)


@pytest.mark.parametrize("name", METHODS)
def test_zero_gradients_and_zero_weights_give_finite_numbers(name):
    model = network(torch.float32)
    with torch.no_grad():
        model[0].weight.zero_()
    METHODS[name].prepare_(model, 0)
    optimizer = optimizer_for(name, model)
    for _ in range(8):
        optimizer.zero_grad()
        (0 * model(batch(0).float()).sum()).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    run(name, model, optimizer, range(3))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_ranks_above_the_sides_and_bfloat16_work(name):
    model = network(torch.bfloat16)
    method = type(METHODS[name])(rank=64)
    method.prepare_(model, 0)
    assert all(layer.left.shape[0] in (24, 16) for _, layer in sum_linears(model))
    METHODS[name].finish_(model)
    model = prepared(name, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    losses = run(name, model, optimizer_for(name, model), range(STEPS))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_ordinary_layers_come_back(name):
    model, plain = prepared(name), network()
    model.eval()
    expected = model(batch(0))
    METHODS[name].finish_(model)
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    assert not model[0].training
    torch.testing.assert_close(model(batch(0)), expected)


def test_only_layers_of_their_own_inside_blocks_are_replaced():
    model = tiny_model("mixtral")
    names = linear_names(model)
    assert names
    assert all("self_attn" in name for name in names)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[1].self_attn.v_proj.weight
    left_alone = {f"model.layers.{n}" for n in ("0.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj")}
    assert set(names) - set(linear_names(model)) == left_alone
    twice = nn.Linear(16, 16)
    assert linear_names(nn.Sequential(twice, nn.Linear(16, 8), twice)) == ["1"]
    with pytest.raises(UnsupportedModel, match="no trainable linear layers"):
        METHODS["lost"].prepare_(nn.Sequential(nn.Embedding(8, 8)), 0)


@pytest.mark.parametrize(
    "method",
    [
        SLTrain(rank=0),
        SLTrain(rank=0, density=0.0),
        SLTrain(density=1.0),
        SLTrain(alpha=-1.0),
        Lost(sparsity=1.5),
        Lost(gamma=0.0),
        Sst(interval_steps=0),
        ReLora(restart_gap=-1),
        ReLora(alpha=0.0),
        GradNormLoRP(rank=4),
        GradNormLoRP(scale=0.0),
    ],
    ids=str,
)
def test_senseless_hyperparameters_are_refused(method):
    model = network()
    with pytest.raises(ShapeError):
        method.prepare_(model, 0)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("other", ["galore", "lisa", "mezo", "sst", "lora", "rtn"])
def test_what_has_no_meaning_beside_sparse_entries_is_refused(other):
    assert conflict(*parse(f"sltrain*{other}"))
    assert not conflict(*parse("lost*galore"))


@pytest.mark.parametrize("name", ["sst", "relora", "gradnormlorp"])
def test_position_and_states_resume_exactly(name):
    runs = []
    for resume in (False, True):
        model = prepared(name, torch.float32)
        optimizer = optimizer_for(name, model)
        losses = run(name, model, optimizer, range(8))
        if resume:
            weights = {key: t.clone() for key, t in model.state_dict().items()}
            tree, tensors = flatten_state(optimizer.state_dict())
            tensors = {key: t.clone() for key, t in tensors.items()}
            model = prepared(name, torch.float32)
            optimizer = optimizer_for(name, model)
            model.load_state_dict(weights)
            optimizer.load_state_dict(unflatten_state(json.loads(json.dumps(tree)), tensors))
        runs.append(losses + run(name, model, optimizer, range(8, STEPS)))
    assert runs[0] == runs[1]
