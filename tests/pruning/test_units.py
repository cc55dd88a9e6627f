"""What of a network is prunable: by default, by name, and not at all, with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from oracles import assert_scores
from small_networks import built, draw, in_float64, prune_config, regression, scores_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import check_selectable
from gbp_ray.pruning.units import prunable_parameters, survey

STEPS, WIDTH, HIDDEN, HEADS = 5, 8, 6, 2


# -- networks, and the same ones written out -------------------------------------------------------


class Layered(nn.Module):
    """A layer of its own kind, and a head over what it gives last."""

    def __init__(self, layer: nn.Module, width: int = HIDDEN) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return self.head((outputs[0] if isinstance(outputs, tuple) else outputs)[:, -1])


class Attending(Layered):
    def forward(self, inputs: Tensor) -> Tensor:
        mixed, _ = self.layer(inputs, inputs, inputs, need_weights=False)
        return self.head(mixed[:, -1])


class Stepping(Layered):
    """Walks through time with a cell."""

    def forward(self, inputs: Tensor) -> Tensor:
        state = inputs.new_zeros(len(inputs), HIDDEN), inputs.new_zeros(len(inputs), HIDDEN)
        for step in inputs.unbind(dim=1):
            state = self.layer(step, state)
        return self.head(state[0])


class Reading(Layered):
    """Looks up the words that its inputs stand for."""

    def forward(self, inputs: Tensor) -> Tensor:
        words = (inputs * 7).abs().long().remainder(9)
        return self.head(torch.tanh(self.layer(words)).mean(dim=(1, 2)))


class Convolving(Layered):
    """Passes its inputs as one channel of one, two or three axes."""

    def forward(self, inputs: Tensor) -> Tensor:
        num_axes = self.layer.weight.ndim - 2
        shaped = inputs.reshape(len(inputs), 4, *((10,), (5, 2), (5, 2, 1))[num_axes - 1])
        return self.head(torch.tanh(self.layer(shaped)).flatten(2).mean(dim=2))


def step_lstm(w: Mapping[str, Tensor], suffix: str, x: Tensor, h: Tensor, c: Tensor) -> Any:
    ih, hh, b_ih, b_hh = (
        w[f"layer.{n}{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    i, f, g, o = (x @ ih.T + b_ih + h @ hh.T + b_hh).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm(w: Mapping[str, Tensor], inputs: Tensor, suffix: str = "_l0") -> Tensor:
    h = c = inputs.new_zeros(len(inputs), HIDDEN)
    for x in inputs.unbind(dim=1):
        h, c = step_lstm(w, suffix, x, h, c)
    return h


def gru(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    h = inputs.new_zeros(len(inputs), HIDDEN)
    for x in inputs.unbind(dim=1):
        of_x = (x @ w["layer.weight_ih_l0"].T + w["layer.bias_ih_l0"]).chunk(3, dim=1)
        of_h = (h @ w["layer.weight_hh_l0"].T + w["layer.bias_hh_l0"]).chunk(3, dim=1)
        r, z = (torch.sigmoid(a + b) for a, b in zip(of_x[:2], of_h[:2], strict=True))
        h = (1 - z) * torch.tanh(of_x[2] + r * of_h[2]) + z * h
    return h


def rnn(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    h = inputs.new_zeros(len(inputs), HIDDEN)
    for x in inputs.unbind(dim=1):
        own = x @ w["layer.weight_ih_l0"].T + w["layer.bias_ih_l0"]
        h = torch.tanh(own + h @ w["layer.weight_hh_l0"].T + w["layer.bias_hh_l0"])
    return h


def attention(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    q, k, v = (inputs @ w["layer.in_proj_weight"].T + w["layer.in_proj_bias"]).chunk(3, dim=2)
    heads = []
    for of_head in range(HEADS):
        own = slice(of_head * WIDTH // HEADS, (of_head + 1) * WIDTH // HEADS)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / (WIDTH // HEADS) ** 0.5
        heads.append(scores.softmax(dim=2) @ v[..., own])
    mixed = torch.cat(heads, dim=2) @ w["layer.out_proj.weight"].T + w["layer.out_proj.bias"]
    return mixed[:, -1]


def embedding(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    words = functional.one_hot((inputs * 7).abs().long().remainder(9), 9).to(inputs)
    return torch.tanh(words @ w["layer.weight"]).mean(dim=(1, 2))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Any]] = {
    "lstm": (lambda: Layered(nn.LSTM(WIDTH, HIDDEN, batch_first=True)), ("layer.weight_*",), lstm),
    "gru": (lambda: Layered(nn.GRU(WIDTH, HIDDEN, batch_first=True)), ("layer.weight_*",), gru),
    "rnn": (lambda: Layered(nn.RNN(WIDTH, HIDDEN, batch_first=True)), ("layer.weight_*",), rnn),
    "cell": (
        lambda: Stepping(nn.LSTMCell(WIDTH, HIDDEN)),
        ("layer.weight_*",),
        lambda w, inputs: lstm(w, inputs, ""),
    ),
    "attention": (
        lambda: Attending(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), WIDTH),
        ("*.in_proj_weight",),
        attention,
    ),
    "embedding": (lambda: Reading(nn.Embedding(9, HIDDEN)), ("layer.weight",), embedding),
}


def named(kind: str) -> tuple[nn.Module, list[str], Any]:
    """A network in float64, the names of its prunable weights, and the network written out."""
    build, include, layer = KINDS[kind]
    model = in_float64(build)

    def written_out(w: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        return layer(w, inputs) @ w["head.weight"].T + w["head.bias"]

    return model, [unit.name for unit in prunable_parameters(model, (), include)], written_out


def sequences() -> Any:
    def build() -> nn.Module:
        raise AssertionError("made elsewhere")

    dtype = torch.float64
    return regression(build, draw(10, STEPS, WIDTH, dtype=dtype), draw(10, 3, seed=2, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_reach_the_pass_of_every_kind_of_layer(kind: str) -> None:
    model, names, written_out = named(kind)
    inputs = sequences().train[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(model(inputs), written_out(weights, inputs))
    masks = MaskSet({n: draw(*weights[n].shape, seed=len(n)) > 0 for n in names})
    masks.apply_(model)
    masked = weights | {name: weights[name] * mask for name, mask in masks.items()}
    expected = written_out(masked, inputs)
    torch.testing.assert_close(model(inputs), expected)
    assert not torch.allclose(expected, written_out(weights, inputs))
    torch.testing.assert_close(copy.deepcopy(model)(inputs), expected)
    fresh = in_float64(KINDS[kind][0], seed=1)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(inputs), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["taylor", "taylor_squared", "fisher", "grasp", "magnitude"])
def test_scores_of_every_kind_of_layer_are_those_of_the_network_written_out(
    kind: str, rule: str
) -> None:
    model, names, written_out = named(kind)
    workload = sequences()
    inputs, targets = workload.train
    others = {n: p.detach() for n, p in model.named_parameters() if n not in names}
    shapes = {name: model.get_parameter(name).shape for name in names}

    def loss_of(weights_N: Tensor, rows: slice = slice(None)) -> Tensor:
        pieces = weights_N.split([shape.numel() for shape in shapes.values()])
        own = {n: piece.view(shapes[n]) for n, piece in zip(names, pieces, strict=True)}
        return workload.loss(written_out(others | own, inputs[rows]), targets[rows])

    weights_N = torch.cat([model.get_parameter(n).detach().reshape(-1) for n in names])
    gradient_N = torch.autograd.functional.jacobian(loss_of, weights_N)
    if rule == "magnitude":
        expected_N = weights_N.abs()
    elif rule == "taylor":
        expected_N = (weights_N * gradient_N).abs()
    elif rule == "taylor_squared":
        expected_N = (weights_N * gradient_N).square()
    elif rule == "fisher":
        rows = [slice(i, i + 1) for i in range(len(inputs))]
        each = [
            torch.autograd.functional.jacobian(partial(loss_of, rows=row), weights_N)
            for row in rows
        ]
        expected_N = weights_N.square() * torch.stack(each).square().mean(dim=0)
    else:
        hessian_NN = torch.autograd.functional.hessian(loss_of, weights_N)
        expected_N = weights_N * (hessian_NN @ gradient_N)
    config = prune_config(rule, include=KINDS[kind][1], calibration_batch_size=10)
    assert_scores(scores_of(model, workload, config), expected_N, rtol=2e-5)


@pytest.mark.parametrize(
    ("layer", "channels"),
    [
        (lambda: nn.Conv1d(4, 6, 3), 6),
        (lambda: nn.Conv2d(4, 6, 2, groups=2), 6),
        (lambda: nn.Conv3d(4, 6, (2, 2, 1)), 6),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), 6),
        (lambda: nn.ConvTranspose2d(4, 6, 2), 6),
        (lambda: nn.ConvTranspose3d(4, 6, (2, 2, 1)), 6),
    ],
)
def test_convolutions_of_every_kind_are_scored_by_weight_and_gradient(
    layer: Any, channels: int
) -> None:
    model = in_float64(lambda: Convolving(layer(), channels))
    workload = sequences()
    inputs, targets = workload.train
    assert [unit.name for unit in prunable_parameters(model)] == ["head.weight", "layer.weight"]
    workload.loss(model(inputs), targets).backward()
    both = (model.head.weight, model.layer.weight)
    expected_N = torch.cat([(w.detach() * w.grad).abs().reshape(-1) for w in both])
    assert_scores(scores_of(model, workload, prune_config(calibration_batch_size=10)), expected_N)


# -- by name ---------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As transformers has it: a linear layer with its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight = 12, nn.Parameter(torch.ones(8, 12))


class Zoo(nn.Module):
    """One of everything that has matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.joined = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(8, 4, proj_size=2)
        self.cell = nn.GRUCell(8, 4)
        self.words = nn.Embedding(16, 8)
        self.bag = nn.EmbeddingBag(16, 8)
        self.both = nn.Bilinear(4, 4, 8)
        self.reversed = Conv1D()
        self.up = nn.ConvTranspose1d(8, 4, 2, groups=2)
        self.linear = nn.Linear(8, 4)
        self.tied = nn.Linear(8, 16)
        self.tied.weight = self.words.weight
        self.norm = nn.LayerNorm(8)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.counts = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)


DEFAULT = {
    "attention.out_proj.weight",
    "joined.out_proj.weight",
    "linear.weight",
    "up.weight",
    "words.weight",
}
AXES = {
    "attention.q_proj_weight": 1,
    "attention.k_proj_weight": 1,
    "attention.v_proj_weight": 1,
    "joined.in_proj_weight": 1,
    "recurrent.weight_ih_l0": 1,
    "recurrent.weight_hh_l0": 1,
    "recurrent.weight_hr_l0": 1,
    "cell.weight_ih": 1,
    "cell.weight_hh": 1,
    "bag.weight": 1,
    "reversed.weight": 0,
    "both.weight": None,
    "table": None,
    "joined.bias_k": None,
}


@pytest.mark.parametrize("name", AXES)
def test_what_is_included_by_name_is_pruned_beside_the_rest(name: str) -> None:
    model = Zoo()
    units = {unit.name: unit for unit in prunable_parameters(model, (), [name])}
    assert units.keys() == DEFAULT | {name}
    assert units[name].parameter is model.get_parameter(name)
    assert (units[name].input_dim, units[name].num_groups) == (AXES[name], 1)
    assert (units["up.weight"].input_dim, units["up.weight"].num_groups) == (0, 2)
    shapes = {name: tuple(units[name].parameter.shape)}
    config = prune_config(granularity="2:4")
    if AXES[name] is None:
        with pytest.raises(ConfigError, match=f"'{name}' these are is not known; leave it out of"):
            check_selectable(shapes, config, {name: None})
    elif name != "recurrent.weight_hr_l0" and "weight_hh" not in name:
        check_selectable(shapes, config, {name: AXES[name]})


def test_globs_include_by_any_name_and_exclude_wins() -> None:
    model = Zoo()

    def added(include: list[str], exclude: tuple[str, ...] = ()) -> set[str]:
        return {unit.name for unit in prunable_parameters(model, exclude, include)} - DEFAULT

    assert added(["recurrent.*"]) == {n for n in AXES if n.startswith("recurrent.")}
    assert added(["recurrent.*"], ("*_hh*",)) == {
        "recurrent.weight_ih_l0",
        "recurrent.weight_hr_l0",
    }
    assert added(["*_proj_weight"]) == {n for n in AXES if n.endswith("_proj_weight")}
    # What is prunable anyway, by one of its names.
    assert added(["tied.weight", "linear.*"]) == set()


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("recurent.*", (), r"include = 'recurent\.\*': matches no parameter, did you mean 'recurr"),
        (
            "*.bias",
            (),
            r"= '\*\.bias': matches only what has no two axes \(.*both\.bias and 4 more\).*such as",
        ),
        (
            "norm.*",
            (),
            r"matches only what has no two axes \(norm\.weight, norm\.bias\), and biases",
        ),
        (
            "cell.*",
            ("cell.weight_*",),
            r"'cell\.\*': prune\.exclude names all that it matches, and",
        ),
        ("tied.weight", ("words.*",), r"prune\.exclude names all that it matches"),
        ("counts", (), r"'counts': is of torch\.int32, and criteria rank real .* prune\.exclude"),
    ],
)
def test_what_cannot_be_included_is_refused_in_one_line(
    include: str, exclude: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ConfigError, PruneError), match=message) as caught:
        prunable_parameters(Zoo(), exclude, [include])
    assert "\n" not in str(caught.value)


def test_a_network_without_layers_of_the_default_kinds_is_pruned_by_name() -> None:
    model = nn.GRU(8, 4)
    with pytest.raises(ConfigError, match=r"nothing to prune.*name matrices .* in prune\.include"):
        prunable_parameters(model)
    names = [unit.name for unit in prunable_parameters(model, (), ["weight_*"])]
    assert names == ["weight_hh_l0", "weight_ih_l0"]


def test_matrices_that_are_not_pruned_are_listed_with_size_and_reason() -> None:
    found = survey(Zoo(), ["linear.*"], ["recurrent.*"], ["attention.out_proj.weight"])
    outside = "not in prune.include"
    assert found.unpruned == {
        "attention.q_proj_weight": (64, f"MultiheadAttention, {outside}"),
        "attention.k_proj_weight": (32, f"MultiheadAttention, {outside}"),
        "attention.v_proj_weight": (32, f"MultiheadAttention, {outside}"),
        "attention.out_proj.weight": (64, "no pass reaches it"),
        "joined.in_proj_weight": (192, f"MultiheadAttention, {outside}"),
        "joined.bias_k": (8, f"MultiheadAttention, {outside}"),
        "joined.bias_v": (8, f"MultiheadAttention, {outside}"),
        "cell.weight_ih": (96, f"GRUCell, {outside}"),
        "cell.weight_hh": (48, f"GRUCell, {outside}"),
        "bag.weight": (128, f"EmbeddingBag, {outside}"),
        "both.weight": (128, f"Bilinear, {outside}"),
        "reversed.weight": (96, f"Conv1D, {outside}"),
        "linear.weight": (32, "prune.exclude"),
        "table": (16, f"Zoo, {outside}"),
        "counts": (16, "Zoo, is of torch.int32, and criteria rank real numbers of 16 bits or more"),
    }
    named = {unit.name for unit in found.units}
    assert named.isdisjoint(found.unpruned)
    every = {n for n, p in Zoo().named_parameters() if p.ndim > 1}
    assert named | found.unpruned.keys() == every


# -- weights that are computed from others ---------------------------------------------------------


def wrapped(change: Callable[[nn.Module], Any], layer: nn.Module | None = None) -> nn.Module:
    layer = nn.Linear(6, 4) if layer is None else layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(layer)
    return nn.ModuleDict({"plain": nn.Linear(6, 6), "head": layer})


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (
        lambda: wrapped(parametrizations.weight_norm),
        "head.parametrizations.weight.original1",
    ),
    "weight norm of columns": (
        lambda: wrapped(lambda layer: parametrizations.weight_norm(layer, dim=1)),
        "head.parametrizations.weight.original1",
    ),
    "spectral norm": (
        lambda: wrapped(parametrizations.spectral_norm),
        "head.parametrizations.weight.original",
    ),
    "old weight norm": (lambda: wrapped(nn.utils.weight_norm), "head.weight_v"),
    "old spectral norm": (lambda: wrapped(nn.utils.spectral_norm), "head.weight_orig"),
    "torch.nn.utils.prune": (
        lambda: wrapped(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
        "head.weight_orig",
    ),
    "convolution": (
        lambda: wrapped(parametrizations.weight_norm, nn.Conv2d(6, 4, 3)),
        "head.parametrizations.weight.original1",
    ),
}


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("is_training", [True, False])
def test_a_parametrized_layer_is_pruned_by_its_original(kind: str, is_training: bool) -> None:
    build, original = COMPUTED[kind]
    model = built(build).train(is_training)
    given = vars(model["head"]).get("weight")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    units = {unit.name: unit for unit in prunable_parameters(model, (), [original])}
    # Trying leaves everything as it was.
    assert units.keys() == {"plain.weight", original}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vars(model["head"]).get("weight") is given
    assert {module.training for module in model.modules()} == {is_training}
    assert units[original].input_dim == 1
    mask = draw(*units[original].parameter.shape, seed=3) > -0.5
    MaskSet({original: mask}).apply_(model)
    inputs = draw(2, 6, *[3] * (mask.ndim - 2), seed=4)
    model["head"].eval()(inputs)
    weight = model["head"].weight
    assert not weight[~mask].any()
    assert weight[mask].any()


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        (
            lambda: wrapped(parametrizations.orthogonal),
            "head.parametrizations.weight.original",
            "a zero in it is no zero in 'weight', which Linear computes from it",
        ),
        (
            lambda: wrapped(parametrizations.weight_norm),
            "head.parametrizations.weight.original0",
            "a zero in it is no zero in 'weight'",
        ),
        (lambda: wrapped(nn.utils.weight_norm), "head.weight_g", "is no zero in 'weight', which"),
    ],
)
def test_an_original_whose_zeros_do_not_stay_is_refused(
    build: Callable[[], nn.Module], name: str, message: str
) -> None:
    with pytest.raises(PruneError, match=rf"'{name}': .*{message}.*prune\.exclude"):
        prunable_parameters(built(build), (), [name])


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_parametrized_layer_that_no_glob_names_is_refused_with_its_original(kind: str) -> None:
    build, original = COMPUTED[kind]
    with pytest.raises(PruneError, match=rf"'head\.weight': is computed .* name '{original}' in"):
        prunable_parameters(built(build))


def test_what_is_beside_a_pruned_original_is_listed() -> None:
    build, original = COMPUTED["weight norm"]
    found = survey(built(build), (), [original])
    scale = "head.parametrizations.weight.original0"
    assert found.unpruned == {scale: (4, "from which 'weight' of Linear is computed")}
