"""Criteria that read activations, against their formulas by plain loops in numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracles import LAYER_CRITERIA, NUM_EXAMPLES, assert_scores, config_of, flat
from small_networks import (
    SharedWeightNet,
    TanhNet,
    draw,
    in_float64,
    regression,
    scores_of,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from gbp_ray.errors import PruneError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload

DAMPING = 0.03


class Grouped(nn.Module):
    """A convolution, a grouped one with strides, and layers over tokens, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 2, stride=2, groups=2)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = functional.relu_(self.conv(inputs))
        hidden = self.grouped(hidden).flatten(2).transpose(1, 2).contiguous()
        return self.head(functional.leaky_relu_(self.tokens(hidden), 0.1).mean(dim=1))


class Twice(nn.Module):
    """A layer that is called twice, the second time given its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.again(input=torch.tanh(self.again(torch.tanh(self.first(inputs)))))


class Recomputing(TanhNet):
    """Passes through its first layer once more when it is differentiated."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self[0], inputs, use_reentrant=False)
        return self[2](self[1](hidden))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "layers": (TanhNet, (3,), 2),
    "groups and tokens": (Grouped, (2, 4, 4), 2),
    "called twice": (Twice, (3,), 3),
    "a shared weight": (SharedWeightNet, (3,), 3),
    "checkpointed": (Recomputing, (3,), 2),
}


def workload_of(name: str, num_examples: int = NUM_EXAMPLES) -> Workload:
    build, shape, num_outputs = NETWORKS[name]
    inputs = draw(num_examples, *shape, seed=1, dtype=torch.float64)
    # An input that never differs from 0.
    inputs[:, 0].mul_(0 if name == "layers" else 1)
    return regression(build, inputs, draw(num_examples, num_outputs, seed=2, dtype=torch.float64))


@contextmanager
def watched(model: nn.Module, calls: list[tuple[nn.Module, Tensor, Tensor]]) -> Iterator[None]:
    """Lists each layer's calls: its inputs, and a zero that was added to its outputs."""

    def watch(module: nn.Module, args: tuple[Tensor, ...], named: dict, outputs: Tensor) -> Tensor:
        zero = torch.zeros_like(outputs).requires_grad_()
        calls.append((module, [*args, *named.values()][0].detach().clone(), zero))
        return outputs + zero

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(watch, with_kwargs=True) for m in layers]
    yield
    for hook in hooks:
        hook.remove()


def rows_seen(
    model: nn.Module, workload: Workload
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Passes single examples; lists by weight and group rows of inputs, and of gradients."""
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, list[tuple[list, list]]] = {}
    for inputs, targets in zip(*workload.train, strict=True):
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        with watched(model, calls):
            loss = workload.loss(model(inputs[None]), targets[None])
        gradients = torch.autograd.grad(loss, [zero for *_, zero in calls])
        for (layer, given, _), gradient in zip(calls, gradients, strict=True):
            groups = 1 if isinstance(layer, nn.Linear) else layer.groups
            if isinstance(layer, nn.Conv2d):
                shape = {"stride": layer.stride, "padding": layer.padding}
                given = functional.unfold(given, layer.kernel_size, **shape).transpose(1, 2)
                gradient = gradient.flatten(2).transpose(1, 2)
            x, g = (t.reshape(-1, t.shape[-1]).numpy() for t in (given, gradient))
            of_layer = found.setdefault(names[layer.weight], [([], []) for _ in range(groups)])
            for group, (xs, gs) in enumerate(of_layer):
                xs.extend(np.split(x, groups, axis=1)[group])
                gs.extend(np.split(g, groups, axis=1)[group])
    return {
        name: [(np.array(xs), np.array(gs)) for xs, gs in of_layer]
        for name, of_layer in found.items()
    }


def inverse_diagonal(rows: np.ndarray, scale: float) -> np.ndarray:
    """Inverts the damped moments of rows."""
    moments = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        moments += np.outer(row, row) * scale
    damped = moments + DAMPING * np.mean(np.diag(moments)) * np.eye(len(moments))
    return np.diag(np.linalg.inv(damped))


def expected_scores(name: str, model: nn.Module, workload: Workload) -> dict[str, Tensor]:
    num_examples, found = len(workload.train[0]), {}
    for key, of_layer in rows_seen(model, workload).items():
        weight = model.get_parameter(key).detach().flatten(1).numpy()
        scores = np.zeros_like(weight)
        per_group = len(weight) // len(of_layer)
        groups = [weight[k * per_group : (k + 1) * per_group] for k in range(len(of_layer))]
        energy = sum(
            float((w @ x) ** 2)
            for (xs, _), own in zip(of_layer, groups, strict=True)
            for w in own
            for x in xs
        )
        for i, w in enumerate(weight):
            xs, gs = of_layer[i // per_group]
            own = groups[i // per_group]
            if name == "wanda":
                scores[i] = [abs(w[j]) * np.sqrt(np.mean(xs[:, j] ** 2)) for j in range(len(w))]
            elif name == "obs":
                kept = np.flatnonzero(w)
                inverse = inverse_diagonal(xs[:, kept], 1.0)
                scores[i, kept] = w[kept] ** 2 / (2 * inverse) / energy
            else:
                columns = np.flatnonzero(own.any(axis=0))
                outputs = list(np.flatnonzero(own.any(axis=1)))
                of_inputs = inverse_diagonal(xs[:, columns], 1 / len(xs))
                of_output = inverse_diagonal(gs[:, outputs], 1 / num_examples)
                at = outputs.index(i % per_group)
                scores[i, columns] = w[columns] ** 2 / (2 * of_inputs * of_output[at])
        found[key] = torch.from_numpy(scores).view_as(model.get_parameter(key))
    return found


def layer_config(name: str, **fields: object) -> object:
    return config_of(name, **{"reconstruct_damping": DAMPING, "reconstruct_positions": 0, **fields})


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", LAYER_CRITERIA)
def test_scores_are_those_of_loops_over_rows(name: str, network: str) -> None:
    model, workload = in_float64(NETWORKS[network][0]), workload_of(network)
    scores = scores_of(model, workload, layer_config(name))
    expected = expected_scores(name, model, workload)
    assert sorted(scores) == sorted(expected)
    assert_scores(scores, flat(expected), rtol=1e-5)


@pytest.mark.parametrize("name", LAYER_CRITERIA)
def test_removed_weights_take_no_part(name: str) -> None:
    model, workload = in_float64(Grouped), workload_of("groups and tokens")
    masks = {
        unit.name: draw(*unit.parameter.shape, seed=number) > -0.5
        for number, unit in enumerate(prunable_parameters(model))
    }
    # All that one input gives, and nothing that an output reads.
    masks["tokens.weight"][:, 2] = False
    MaskSet(masks).apply_(model)
    scores = scores_of(model, workload, layer_config(name))
    assert all(not scores[key][~mask].any() for key, mask in masks.items())
    assert_scores(scores, flat(expected_scores(name, model, workload)), rtol=1e-5)


@pytest.mark.parametrize("name", ["obs", "kfac"])
def test_the_seed_draws_the_positions_whose_inputs_are_multiplied(name: str) -> None:
    model, workload = in_float64(Grouped), workload_of("groups and tokens")

    def found(seed: int, positions: int) -> Tensor:
        # One batch of all examples: the seed decides nothing else.
        config = layer_config(name, reconstruct_positions=positions, calibration_batch_size=99)
        return flat(scores_of(model, workload, config, seed=seed))

    first, again, other = (found(seed, 3) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).norm() > 1e-3 * first.norm()
    torch.testing.assert_close(found(0, 0), found(1, 16), rtol=1e-5, atol=0)


def test_scores_of_obs_are_relative_to_the_outputs_of_a_layer() -> None:
    """Larger inputs of all layers, as of weights in front of a norm, change nothing."""
    model, workload = in_float64(lambda: nn.Linear(3, 2, bias=False)), workload_of("layers")
    inputs, targets = workload.train
    larger = dataclasses.replace(workload, train=(50 * inputs, targets))
    found = flat(scores_of(model, workload, layer_config("obs")))
    assert_scores(scores_of(model, larger, layer_config("obs")), found)
    with torch.no_grad():
        model.weight.mul_(7)
    assert_scores(scores_of(model, workload, layer_config("obs")), found)


def fail(*given: object) -> Tensor:
    raise AssertionError("reads the loss")


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_no_label_is_read(name: str) -> None:
    model, workload = in_float64(TanhNet), workload_of("layers")
    expected = scores_of(model, workload, layer_config(name))
    found = scores_of(model, dataclasses.replace(workload, loss=fail), layer_config(name))
    assert all(torch.equal(found[key], values) for key, values in expected.items())


@pytest.mark.parametrize("name", LAYER_CRITERIA)
def test_where_nothing_comes_in_nothing_is_lost(name: str) -> None:
    model, workload = in_float64(TanhNet), workload_of("layers")
    blank = dataclasses.replace(
        workload, train=(torch.zeros_like(workload.train[0]), workload.train[1])
    )
    scores = scores_of(model, blank, layer_config(name))
    assert not scores["0.weight"].any()
    assert scores["2.weight"].all()


@pytest.mark.parametrize("name", ["obs", "kfac"])
def test_what_cannot_be_inverted_without_damping_is_refused(name: str) -> None:
    model, workload = in_float64(TanhNet), workload_of("layers")
    with pytest.raises(PruneError, match=r"^prune\.reconstruct_damping = 0: .* dependent"):
        scores_of(model, workload, layer_config(name, reconstruct_damping=0.0))


# -- layers that cannot be scored ------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight / self.weight.norm(), self.bias)


class Bypassed(TanhNet):
    """Uses the weight of a layer that it does not call."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](functional.linear(inputs, self[0].weight)))


class Embedded(TanhNet):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.table.weight = self[0].weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](self[0](inputs + self.table.weight[0])))


class Recurrent(TanhNet):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self[2](self[1](self[0](self.rnn(inputs[None])[0][0])))


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.ConvTranspose1d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)
    )


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "transposed": (transposed, (), r"'1\.weight', which '1', a ConvTranspose1d uses"),
    "changed": (lambda: Scaled(3, 2), (), r"'weight', which Scaled uses"),
    "bypassed": (Bypassed, (), r"no calibration example .* '0\.weight', or its weight is used"),
    "shared": (Embedded, (), r"'0\.weight', which 'table', a Embedding uses"),
    "recurrent": (Recurrent, ("rnn.weight_ih_l0",), r"'rnn\.weight_ih_l0', which 'rnn', a RNN"),
    "computed": (normed, ("*original1",), r"original1', which '.*', a ParametrizationList"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", LAYER_CRITERIA)
def test_a_weight_of_another_kind_of_layer_is_refused_by_name(name: str, case: str) -> None:
    build, include, words = REFUSED[case]
    workload = dataclasses.replace(workload_of("layers"), build_model=build)
    config = layer_config(name, include=include)
    with pytest.raises(PruneError, match=rf"^prune\.criterion = {name}: .*{words}") as caught:
        scores_of(in_float64(build), workload, config)
    assert "prune.exclude" in str(caught.value)
    assert "\n" not in str(caught.value)
