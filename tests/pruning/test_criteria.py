"""A user's own criterion: what it may be, and what is said when it fails."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest
import torch
from oracles import NUM_EXAMPLES, assert_scores, config_of, flat, recorded, tiny, weights_of
from small_networks import TanhNet, built, in_float64, job_config, scores_of
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.errors import ConfigError, PruneError, WorkloadError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.criteria import Criterion, criterion
from gbp_ray.pruning.scoring import check_criterion
from gbp_ray.pruning.statistics import Probe
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.workloads.contract import Workload


def own_taylor_squared(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Returns the biases' scores too, which are not asked for."""
    assert loss.ndim == 0
    assert loss.requires_grad
    assert not model.training
    torch.testing.assert_close(loss, functional.mse_loss(model(inputs), targets))
    weights = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {
        name: (weight * gradient).square()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def own_gradient_flow(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """w * (H g) of one batch, by the loss's own graph."""
    weights = {name: w for name, w in model.named_parameters() if w.ndim == 2}
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    half_norm = sum((g.square().sum() for g in gradients), torch.zeros(())) / 2
    products = torch.autograd.grad(half_norm, list(weights.values()))
    return {name: w * p for (name, w), p in zip(weights.items(), products, strict=True)}


def own_flattened(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    weights = {name: w.detach() for name, w in model.named_parameters()}
    return {**weights, "2.weight": weights["2.weight"].reshape(-1)}


def own_incomplete(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    return {"0.weight": model.get_parameter("0.weight")}


def count_examples(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    assert probe.previous_N is None
    return torch.full((20,), float(len(targets)))


def count_again(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    assert probe.previous_N is not None
    return probe.previous_N * len(targets)


OWN_RULE = Criterion(
    passes=(count_examples, count_again),
    finish=lambda weights_N, statistic_N, total: weights_N * statistic_N / total**2 * 8,
)
OWN_DATA_FREE_RULE = dataclasses.replace(
    OWN_RULE,
    passes=(),
    finish=lambda weights_N, statistic_N, total: weights_N + statistic_N,
)
NOT_A_RULE = 7


def test_an_own_function_equals_the_built_in_that_computes_the_same() -> None:
    model = in_float64(TanhNet)
    built_in = scores_of(model, tiny(), config_of("taylor_squared"))
    own = scores_of(model, tiny(), config_of(f"{__name__}:own_taylor_squared"))
    assert list(own) == list(built_in)
    assert_scores(own, flat(built_in))


def test_an_own_function_may_differentiate_twice() -> None:
    model = in_float64(TanhNet)
    one_batch = {"calibration_batch_size": NUM_EXAMPLES}
    built_in = scores_of(model, tiny(), config_of("grasp", **one_batch))
    own = scores_of(model, tiny(), config_of(f"{__name__}:own_gradient_flow", **one_batch))
    assert_scores(own, flat(built_in), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "found"), [("own_flattened", r"\(8,\)"), ("own_incomplete", "nothing")]
)
def test_an_own_function_that_returns_a_wrong_shape_names_the_parameter(
    function: str, found: str
) -> None:
    with pytest.raises(PruneError, match=rf"{function}.*\(2, 4\) for '2\.weight', not {found}"):
        scores_of(built(TanhNet), tiny_float32(), config_of(f"{__name__}:{function}"))


def tiny_float32() -> Workload:
    workload = tiny()
    inputs, targets = workload.train
    data = inputs.float(), targets.float()
    return dataclasses.replace(workload, train=data, test=data)


def test_an_own_rule_sums_over_batches_in_passes() -> None:
    model = built(TanhNet)
    scores = scores_of(model, tiny(), config_of(f"{__name__}:OWN_RULE"))
    assert torch.equal(flat(scores), weights_of(model) * 8)


def test_an_own_rule_without_passes_reads_no_data() -> None:
    model = built(TanhNet)
    workload, batches = recorded(tiny())
    scores = scores_of(model, workload, config_of(f"{__name__}:OWN_DATA_FREE_RULE"))
    assert torch.equal(flat(scores), weights_of(model))
    assert batches == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing_like_it", "is not a criterion"),
        (f"{__name__}:NOT_A_RULE", "not int"),
        (f"{__name__}:own_taylor_sqared", "did you mean 'own_taylor_squared'"),
        ("no_such_module_here:rule", "no module named 'no_such_module_here'"),
    ],
)
def test_a_criterion_that_cannot_be_found_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        criterion(name)


# -- what fails, and when --------------------------------------------------------------------------


def raising(*args: object) -> Tensor:
    raise KeyError("no\nsuch")


def weights_by(rename: Callable[[str], str]) -> Callable[..., dict[str, Tensor]]:
    return lambda model, *batch: {rename(n): w for n, w in model.named_parameters()}


def zeroing(model: nn.Module, *batch: object) -> dict[str, Tensor]:
    """Prunes by itself, past torch's count of versions."""
    for weight in model.parameters():
        weight.data.mul_(weight.abs() > weight.abs().median())
    return dict(model.named_parameters())


def zeroing_what_it_is_given(gradient_L: Tensor, weight_L: Tensor, factor: float) -> Tensor:
    weight_L.zero_()
    return gradient_L


def weights_as(change: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda model, *batch: {n: change(w.detach()) for n, w in model.named_parameters()}


FAULTY: dict[str, tuple[object, str]] = {
    "raises": (raising, r"raised KeyError: 'no\\nsuch'$"),
    "no result": (lambda *batch: None, r"must return \{parameter name: tensor\}, not NoneType$"),
    "a list": (lambda model, *batch: list(model.parameters()), r"must return .*, not list$"),
    "numbers": (lambda *batch: {"0.weight": 1.0, "2.weight": 2.0}, r"for '0\.weight', not float$"),
    "other names": (
        weights_by(lambda name: name.replace("weight", "wieght")),
        r"for '0\.weight', not nothing, did you mean '0\.wieght'\?$",
    ),
    "names that are no text": (lambda *batch: {0: 1}, r"for '0\.weight', not nothing$"),
    "a pass raises": (
        dataclasses.replace(OWN_RULE, passes=(raising,)),
        r"raised KeyError: 'no\\nsuch'$",
    ),
    "a pass of another size": (
        dataclasses.replace(OWN_RULE, passes=(lambda *batch: torch.zeros(3),)),
        r"its of_gradients, passes and finish must return a tensor of shape \(20,\), not \(3,\)$",
    ),
    "complex scores": (
        weights_as(lambda w: w.cfloat()),
        r"must return real numbers .*, not a complex",
    ),
    "meta scores": (weights_as(lambda w: w.to("meta")), r"must return real numbers .*, not a meta"),
    "sparse scores": (weights_as(Tensor.to_sparse), r"must return real .*, not a sparse tensor$"),
    "a complex pass": (
        dataclasses.replace(OWN_RULE, passes=(lambda *batch: torch.zeros(20).cfloat(),)),
        r"must return real numbers that are in memory, not a complex tensor$",
    ),
    "it prunes": (zeroing, r"changed the weights '0\.weight' of the network; a criterion only"),
    "it zeroes what it is given": (
        dataclasses.replace(OWN_RULE, passes=(), of_gradients=zeroing_what_it_is_given),
        r"changed the weights 'it was given'",
    ),
    "a finish raises": (
        dataclasses.replace(OWN_DATA_FREE_RULE, finish=raising),
        r"raised KeyError: 'no\\nsuch'$",
    ),
    "a finish of another kind": (
        dataclasses.replace(OWN_DATA_FREE_RULE, finish=lambda *sums: None),
        r"must return a tensor of shape \(12,\), not NoneType$",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_an_own_criterion_that_fails_is_named_before_anything_is_trained(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, reason = FAULTY[case]
    monkeypatch.setattr(sys.modules[__name__], "FAULTY_RULE", rule, raising=False)
    name = f"{__name__}:FAULTY_RULE"
    wanted = rf"^prune\.criterion = '{name}'.*{reason}"
    with pytest.raises(PruneError, match=wanted):
        scores_of(built(TanhNet), tiny_float32(), config_of(name))
    with pytest.raises(PruneError, match=wanted):
        check_job(job_config(prune={"criterion": name}), tiny_float32())


def test_what_the_package_refuses_inside_an_own_criterion_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*batch: object) -> dict[str, Tensor]:
        raise WorkloadError("workload.train: holds no labels")

    monkeypatch.setattr(sys.modules[__name__], "FAULTY_RULE", refuse, raising=False)
    with pytest.raises(WorkloadError, match=r"^workload\.train: holds no labels$"):
        scores_of(built(TanhNet), tiny_float32(), config_of(f"{__name__}:FAULTY_RULE"))


@pytest.mark.parametrize("name", [*CRITERIA, f"{__name__}:own_taylor_squared"])
def test_a_trial_of_a_criterion_takes_one_small_batch_and_leaves_no_trace(name: str) -> None:
    model = built(TanhNet).train()
    workload, batches = recorded(tiny_float32())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    check_criterion(
        model, prunable_parameters(model), workload, config_of(name, calibration_batch_size=9)
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert {len(batch) for batch in batches} <= {1 if name == "synflow" else 8}
    assert bool(batches) == (name not in ("magnitude", "random", "movement"))
