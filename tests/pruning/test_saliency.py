from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from small_networks import (
    ConvNet,
    SharedWeightNet,
    TanhNet,
    built,
    draw,
    float64_by_default,
    images,
    in_float64,
    prune_config,
    regression,
    scores_of,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbp_ray import config as config_module
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning import saliency
from gbp_ray.pruning.masks import prunable_parameters
from gbp_ray.pruning.saliency import Criterion, Probe, criterion, movement_statistic
from gbp_ray.workload import Workload

BATCH_SIZE = 4
NUM_EXAMPLES = 10  # Batches of 4, 4 and 2.
GRADIENT_CRITERIA = ["taylor", "snip", "taylor_squared", "fisher", "obd", "grasp"]
DATA_FREE_CRITERIA = ["magnitude", "random", "synflow"]


# -- oracles: the formulas, on the whole data at once or one example after another -----------------


def config_of(name: str, **fields: Any) -> Any:
    return prune_config(name, **{"calibration_batch_size": BATCH_SIZE, **fields})


def tiny(build: Callable[[], nn.Module] = TanhNet, num_outputs: int = 2) -> Workload:
    inputs = draw(NUM_EXAMPLES, 3, seed=1, dtype=torch.float64)
    targets = draw(NUM_EXAMPLES, num_outputs, seed=2, dtype=torch.float64)
    return regression(build, inputs, targets)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().reshape(-1) for name in sorted(tensors)]).double()


def weights_of(model: nn.Module) -> Tensor:
    return flat({unit.name: unit.parameter for unit in prunable_parameters(model)})


def loss_of_weights(
    model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor
) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of the flat prunable weights."""
    units = prunable_parameters(model)

    def loss(weights_N: Tensor) -> Tensor:
        pieces = weights_N.split([unit.parameter.numel() for unit in units])
        replaced = {
            unit.name: piece.view_as(unit.parameter)
            for unit, piece in zip(units, pieces, strict=True)
        }
        return workload.loss(functional_call(model, replaced, (inputs,)), targets)

    return loss


def gradient_of(model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor) -> Tensor:
    weights_N = weights_of(model).requires_grad_()
    loss = loss_of_weights(model, workload, inputs, targets)(weights_N)
    return torch.autograd.grad(loss, weights_N)[0]


def hessian_of(model: nn.Module, workload: Workload, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = loss_of_weights(model, workload, inputs, targets)
    return torch.autograd.functional.hessian(loss, weights_of(model))


def mean_square_of_example_gradients(model: nn.Module, workload: Workload) -> Tensor:
    inputs, targets = workload.train
    squares = [
        gradient_of(model, workload, inputs[i : i + 1], targets[i : i + 1]).square()
        for i in range(len(inputs))
    ]
    return torch.stack(squares).mean(dim=0)


def recorded(workload: Workload) -> tuple[Workload, list[Tensor]]:
    """The same workload, and a list that receives the inputs of each batch that is fetched."""
    batches: list[Tensor] = []

    def prepare(inputs: Tensor) -> Tensor:
        batches.append(inputs.clone())
        return inputs

    return dataclasses.replace(workload, prepare=prepare), batches


def positions_of(batch: Tensor, workload: Workload) -> Tensor:
    """Where the rows of a batch stand in the training data."""
    matches = (batch.flatten(1)[:, None] == workload.train[0].flatten(1)[None]).all(dim=2)
    assert bool((matches.sum(dim=1) == 1).all())
    return matches.int().argmax(dim=1)


def assert_scores(scores: Mapping[str, Tensor], expected_N: Tensor, rtol: float = 2e-6) -> None:
    """Scores are float32: equal up to their rounding."""
    assert expected_N.abs().max() > 0
    atol = 1e-7 * float(expected_N.abs().max())
    torch.testing.assert_close(flat(scores), expected_N.double(), rtol=rtol, atol=atol)


# -- the frame -------------------------------------------------------------------------------------


def test_the_job_and_the_registry_know_the_same_criteria() -> None:
    assert tuple(saliency.CRITERIA) == config_module.CRITERIA
    assert all(rule.name == name for name, rule in saliency.CRITERIA.items())


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *DATA_FREE_CRITERIA])
def test_scores_are_float32_and_shaped_and_named_like_the_weights(name: str) -> None:
    model = in_float64(TanhNet)
    scores = scores_of(model, tiny(), config_of(name))
    assert {key: (s.shape, s.dtype) for key, s in scores.items()} == {
        "0.weight": ((4, 3), torch.float32),
        "2.weight": ((2, 4), torch.float32),
    }


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *DATA_FREE_CRITERIA])
def test_excluded_parameters_get_no_score(name: str) -> None:
    model = in_float64(TanhNet)
    assert list(scores_of(model, tiny(), config_of(name, exclude=("0.*",)))) == ["2.weight"]


@pytest.mark.parametrize("name", [n for n in saliency.CRITERIA if not criterion(n).is_signed])
def test_criteria_that_are_not_signed_give_no_score_below_zero(name: str) -> None:
    scores = scores_of(in_float64(TanhNet), tiny(), config_of(name))
    assert flat(scores).min() >= 0


def test_calibration_takes_distinct_examples_and_repeats_none_to_fill_the_last_batch() -> None:
    workload, batches = recorded(tiny())
    scores_of(in_float64(TanhNet), workload, config_of("taylor", calibration_examples=7))
    assert [len(batch) for batch in batches] == [4, 3]
    assert len(set(positions_of(torch.cat(batches), workload).tolist())) == 7


def test_more_calibration_examples_than_there_are_take_each_once() -> None:
    workload, batches = recorded(tiny())
    scores_of(in_float64(TanhNet), workload, config_of("taylor", calibration_examples=999))
    taken = positions_of(torch.cat(batches), workload)
    assert sorted(taken.tolist()) == list(range(NUM_EXAMPLES))


def test_a_subset_is_chosen_by_the_seed() -> None:
    chosen = []
    for seed in (0, 0, 1):
        workload, batches = recorded(tiny())
        few = config_of("taylor", calibration_examples=5)
        scores_of(in_float64(TanhNet), workload, few, seed=seed)
        chosen.append(positions_of(torch.cat(batches), workload).tolist())
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(("name", "num_passes"), [("taylor", 1), ("grasp", 2)])
def test_progress_is_told_after_each_batch_of_each_pass(name: str, num_passes: int) -> None:
    told: list[tuple[int, int]] = []
    scores_of(
        in_float64(TanhNet), tiny(), config_of(name), tell=lambda *counts: told.append(counts)
    )
    total = 3 * num_passes
    assert told == [(done, total) for done in range(1, total + 1)]


# -- magnitude and random --------------------------------------------------------------------------


def test_magnitude_is_the_absolute_weight_and_reads_no_data() -> None:
    model = built(TanhNet)
    workload, batches = recorded(tiny())
    scores = scores_of(model, workload, config_of("magnitude"))
    for name, values in scores.items():
        assert torch.equal(values, model.get_parameter(name).detach().abs())
    assert batches == []


def test_random_scores_are_uniform() -> None:
    model = nn.Linear(100, 100)
    values = flat(scores_of(model, tiny(), config_of("random"))).sort().values
    steps = torch.arange(len(values), dtype=torch.float64) / len(values)
    # Kolmogorov-Smirnov: exceeded by chance in one of 10^6 cases.
    assert (values - steps).abs().max() < 2.7 / len(values) ** 0.5
    assert values[0] >= 0
    assert values[-1] < 1


def test_random_scores_depend_on_seed_and_round_alone() -> None:
    def drawn(build_seed: int, seed: int, round_number: int) -> tuple[float, ...]:
        model = built(TanhNet, build_seed)
        torch.manual_seed(build_seed)
        scores = scores_of(model, tiny(), config_of("random"), seed=seed, round_number=round_number)
        return tuple(flat(scores).tolist())

    assert drawn(0, 3, 1) == drawn(5, 3, 1)
    cases = itertools.product((3, 4), (1, 2))
    assert len({drawn(0, seed, round_number) for seed, round_number in cases}) == 4


# -- first order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["taylor", "snip"])
def test_taylor_and_snip_are_the_closed_form_of_linear_regression(name: str) -> None:
    model = in_float64(lambda: nn.Linear(3, 2))
    workload = tiny()
    inputs, targets = workload.train
    weight, bias = model.weight.detach(), model.bias.detach()
    residual = inputs @ weight.T + bias - targets
    gradient = 2 * residual.T @ inputs / residual.numel()
    scores = scores_of(model, workload, config_of(name))
    assert_scores(scores, (weight * gradient).abs().reshape(-1))


def test_taylor_squared_adds_up_batches_of_the_mean_loss() -> None:
    model = in_float64(TanhNet)
    workload, batches = recorded(tiny())
    scores = scores_of(model, workload, config_of("taylor_squared"))
    assert sorted(len(batch) for batch in batches) == [2, 4, 4]
    expected_N = torch.zeros(20, dtype=torch.float64)
    for batch in batches:
        targets = workload.train[1][positions_of(batch, workload)]
        expected_N += (weights_of(model) * gradient_of(model, workload, batch, targets)).square()
    assert_scores(scores, expected_N)


@pytest.mark.parametrize("room_for_examples", [None, 3, 0])
def test_fisher_is_the_mean_square_of_example_gradients(
    room_for_examples: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_float64(TanhNet)
    calls = 0

    def counted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return functional.mse_loss(outputs, targets)

    workload = tiny()
    expected_N = weights_of(model).square() * mean_square_of_example_gradients(model, workload)
    if room_for_examples is not None:
        room = room_for_examples * 4 * len(expected_N)
        monkeypatch.setattr("gbp_ray.pruning.saliency._PER_EXAMPLE_BYTES", room)
    counted = dataclasses.replace(workload, loss=counted_loss)
    assert_scores(scores_of(model, counted, config_of("fisher")), expected_N)
    # Batches of 4, 4 and 2 in chunks of all, of 3 and of 1.
    assert calls == {None: 3, 3: 5, 0: 10}[room_for_examples]


def float64_images() -> tuple[nn.Module, Workload]:
    """A classifier left in train mode, with statistics that are not those of its data."""
    model = in_float64(ConvNet)
    with torch.no_grad():
        for number, norm in enumerate((model.norm1, model.norm2)):
            norm.running_mean.copy_(draw(8, seed=number, dtype=torch.float64) / 4)
            norm.running_var.copy_(1 + draw(8, seed=number + 9, dtype=torch.float64).abs())
    plain = dataclasses.replace(images(num_train=NUM_EXAMPLES), augment=None)
    pixels, labels = plain.train
    return model.train(), dataclasses.replace(plain, train=(pixels.double(), labels))


@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_batchnorm_and_dropout_are_scored_in_eval_mode(name: str) -> None:
    model, workload = float64_images()
    scores = scores_of(model, workload, config_of(name))
    model.eval()
    weights_N = weights_of(model)
    if name == "taylor":
        expected_N = (weights_N * gradient_of(model, workload, *workload.train)).abs()
    else:
        expected_N = weights_N.square() * mean_square_of_example_gradients(model, workload)
    assert_scores(scores, expected_N)


# -- second order ----------------------------------------------------------------------------------


def test_obd_is_exact_where_the_hessian_is_diagonal() -> None:
    model = in_float64(lambda: nn.Linear(3, 2, bias=False))
    # Each example has one non-zero input, so no two weights of an output meet.
    sizes = 1 + draw(NUM_EXAMPLES, seed=5, dtype=torch.float64).abs()
    inputs = torch.zeros(NUM_EXAMPLES, 3, dtype=torch.float64)
    inputs[torch.arange(NUM_EXAMPLES), torch.arange(NUM_EXAMPLES) % 3] = sizes
    workload = regression(TanhNet, inputs, draw(NUM_EXAMPLES, 2, dtype=torch.float64))
    hessian_of_input = 2 * inputs.square().sum(dim=0) / (NUM_EXAMPLES * 2)
    expected = model.weight.detach().square() * hessian_of_input / 2
    scores = scores_of(model, workload, config_of("obd", hutchinson_probes=1))
    assert_scores(scores, expected.reshape(-1))


def test_obd_approaches_the_diagonal_of_a_dense_hessian() -> None:
    model = in_float64(TanhNet)
    workload, batches = recorded(tiny())
    num_probes = 1500
    scores = scores_of(model, workload, config_of("obd", hutchinson_probes=num_probes))
    diagonal_N = torch.zeros(20, dtype=torch.float64)
    variance_N = torch.zeros(20, dtype=torch.float64)
    for batch in batches:
        targets = workload.train[1][positions_of(batch, workload)]
        hessian = hessian_of(model, workload, batch, targets)
        share = len(batch) / NUM_EXAMPLES
        diagonal_N += share * hessian.diagonal()
        # Of a random sign's own term nothing varies; each other element of the row adds its square.
        off_diagonal = hessian - torch.diag(hessian.diagonal())
        variance_N += share**2 * off_diagonal.square().sum(dim=1) / num_probes
    whole = hessian_of(model, workload, *workload.train)
    torch.testing.assert_close(diagonal_N, whole.diagonal())
    factor_N = weights_of(model).square() / 2
    error_N = (flat(scores) - factor_N * diagonal_N).abs()
    assert bool((error_N <= 5 * factor_N * variance_N.sqrt() + 1e-9).all())
    # The bound says something: the scores as a whole are known to a tenth.
    assert (factor_N * variance_N.sqrt()).norm() < 0.1 * (factor_N * diagonal_N).norm()


def test_obd_draws_other_signs_for_another_seed() -> None:
    model = in_float64(TanhNet)
    first, again, other = (
        # One batch of all examples: the seed decides nothing else.
        flat(scores_of(model, tiny(), config_of("obd", calibration_batch_size=99), seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).norm() > 1e-3 * first.norm()


def test_grasp_is_weight_times_dense_hessian_times_gradient() -> None:
    model = in_float64(TanhNet)
    workload = tiny()
    hessian = hessian_of(model, workload, *workload.train)
    gradient_N = gradient_of(model, workload, *workload.train)
    expected_N = weights_of(model) * (hessian @ gradient_N)
    scores = scores_of(model, workload, config_of("grasp"))
    assert_scores(scores, expected_N, rtol=1e-5)
    assert flat(scores).min() < 0 < flat(scores).max()


def test_low_grasp_scores_are_weights_whose_shrinking_raises_the_gradient_norm() -> None:
    model = in_float64(TanhNet)
    workload = tiny()
    gradient_at = torch.func.grad(loss_of_weights(model, workload, *workload.train))
    weights_N = weights_of(model)
    share = 1e-5
    change_N = torch.empty_like(weights_N)
    for index in range(len(weights_N)):
        step_N = torch.zeros_like(weights_N)
        step_N[index] = share * weights_N[index]
        shrunk, grown = gradient_at(weights_N - step_N), gradient_at(weights_N + step_N)
        change_N[index] = (shrunk.square().sum() - grown.square().sum()) / (2 * share)
    assert_scores(scores_of(model, workload, config_of("grasp")), -change_N.detach() / 2, rtol=1e-4)


class AttentionNet(nn.Module):
    """Attention over the first axis of an example; fused kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.project(inputs).unsqueeze(1).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.head(mixed.mean(dim=(1, 2)))


@pytest.mark.parametrize("name", ["grasp", "fisher"])
def test_attention_can_be_scored(name: str) -> None:
    model = in_float64(AttentionNet)
    workload = regression(
        AttentionNet,
        draw(NUM_EXAMPLES, 5, 4, dtype=torch.float64),
        draw(NUM_EXAMPLES, 2, seed=1, dtype=torch.float64),
    )
    weights_N = weights_of(model)
    with sdpa_kernel(SDPBackend.MATH):
        if name == "grasp":
            gradient_N = gradient_of(model, workload, *workload.train)
            hessian = hessian_of(model, workload, *workload.train)
            expected_N = weights_N * (hessian @ gradient_N)
        else:
            expected_N = weights_N.square() * mean_square_of_example_gradients(model, workload)
    assert_scores(scores_of(model, workload, config_of(name)), expected_N, rtol=1e-5)


@pytest.mark.parametrize("name", ["obd", "grasp"])
def test_without_curvature_second_order_scores_are_zero(name: str) -> None:
    model = in_float64(lambda: nn.Linear(3, 2))
    linear = dataclasses.replace(tiny(), loss=lambda outputs, targets: outputs.mean())
    assert not flat(scores_of(model, linear, config_of(name))).any()


@pytest.mark.parametrize("name", ["taylor", "snip", "fisher", "grasp"])
def test_the_cut_into_batches_does_not_matter(name: str) -> None:
    model = in_float64(TanhNet)
    whole = scores_of(model, tiny(), config_of(name, calibration_batch_size=NUM_EXAMPLES))
    for size in (1, 3):
        cut = scores_of(model, tiny(), config_of(name, calibration_batch_size=size))
        assert_scores(cut, flat(whole), rtol=1e-5)


# -- synflow ---------------------------------------------------------------------------------------


def relu_net(*sizes: int, bias: bool = False) -> nn.Module:
    layers = [
        layer
        for i in range(len(sizes) - 1)
        for layer in (nn.Linear(sizes[i], sizes[i + 1], bias=bias), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1])


def assert_flow_is_conserved(scores: Mapping[str, Tensor]) -> None:
    sums = torch.stack([values.double().sum() for values in scores.values()])
    assert sums.min() > 0
    torch.testing.assert_close(sums, sums[0].expand_as(sums), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_synflow_is_the_flow_over_all_paths_through_a_weight(bias: bool) -> None:
    model = built(lambda: relu_net(3, 5, 4, 2, bias=bias))
    scores = scores_of(model, tiny(), config_of("synflow"))
    matrices = [layer.weight.detach().double().abs() for layer in (model[0], model[2], model[4])]
    into = [torch.ones(3, dtype=torch.float64)]
    out_of = [torch.ones(2, dtype=torch.float64)]
    for matrix in matrices:
        into.append(matrix @ into[-1])
    for matrix in reversed(matrices):
        out_of.insert(0, matrix.T @ out_of[0])
    flows = [
        out_of[i + 1][:, None] * matrix * into[i][None, :] for i, matrix in enumerate(matrices)
    ]
    expected_N = torch.cat([flow.reshape(-1) for flow in flows])
    assert_scores(scores, expected_N / expected_N.max() * flat(scores).max())
    assert_flow_is_conserved(scores)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_synflow_is_conserved_with_biases_and_batchnorm(is_fresh: bool) -> None:
    model = built(ConvNet)
    if not is_fresh:
        with torch.no_grad():
            for number, norm in enumerate((model.norm1, model.norm2)):
                norm.weight.copy_(draw(8, seed=number))
                norm.bias.copy_(draw(8, seed=number + 2))
                norm.running_mean.copy_(draw(8, seed=number + 4))
                norm.running_var.copy_(draw(8, seed=number + 6).square())
    scores = scores_of(model, images(), config_of("synflow"))
    assert list(scores) == ["conv1.weight", "conv2.weight", "head.weight"]
    assert_flow_is_conserved(scores)


def test_synflow_does_not_depend_on_the_data() -> None:
    model = built(ConvNet)
    one, other = images(num_train=46), images(num_train=5)
    pixels, labels = other.train
    other = dataclasses.replace(other, train=(pixels * torch.nan, labels))
    first = scores_of(model, one, config_of("synflow"), seed=0)
    second = scores_of(model, other, config_of("synflow", calibration_examples=1), seed=1)
    assert torch.equal(flat(first), flat(second))


@pytest.mark.parametrize("factor", [1.0, 1e3, 1e-3])
def test_synflow_stays_finite_through_sixty_layers(factor: float) -> None:
    model = built(lambda: relu_net(3, *[16] * 59, 2))
    unscaled = scores_of(model, tiny(), config_of("synflow"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    scores = scores_of(model, tiny(), config_of("synflow"))
    assert len(scores) == 60
    assert bool(torch.isfinite(flat(scores)).all())
    assert_flow_is_conserved(scores)
    # A factor common to all weights changes the order of none.
    share, unscaled_share = (flat(s) / flat(s).max() for s in (scores, unscaled))
    torch.testing.assert_close(share, unscaled_share, rtol=1e-3, atol=1e-9)


def test_synflow_of_a_network_without_any_path_is_zero() -> None:
    model = built(lambda: relu_net(3, 4, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    assert not flat(scores_of(model, tiny(), config_of("synflow"))).any()


# -- movement --------------------------------------------------------------------------------------


def test_a_step_moves_by_minus_weight_times_gradient() -> None:
    found_N = movement_statistic(torch.tensor([2.0, -3.0, 0.0]), torch.tensor([0.5, 0.25, 7.0]))
    assert found_N.tolist() == [-1.0, 0.75, 0.0]
    assert found_N.dtype == torch.float64


def test_movement_scores_are_what_was_gathered() -> None:
    model = built(TanhNet)
    gathered_N = draw(20, seed=8, dtype=torch.float64)
    workload, batches = recorded(tiny())
    scores = scores_of(model, workload, config_of("movement"), movement_N=gathered_N)
    assert torch.equal(scores["0.weight"], gathered_N[:12].view(4, 3).float())
    assert torch.equal(scores["2.weight"], gathered_N[12:].view(2, 4).float())
    assert batches == []


def test_movement_without_history_says_what_to_set() -> None:
    with pytest.raises(PruneError, match=r"movement.*finetune\.epochs"):
        scores_of(built(TanhNet), tiny(), config_of("movement"))


# -- a user's own ----------------------------------------------------------------------------------


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
    name="own",
    formula="w n^2",
    summed="the number of examples, then n times that",
    cost="0",
    source="here",
    passes=(count_examples, count_again),
    finish=lambda weights_N, statistic_N, total: weights_N * statistic_N / total**2 * 8,
    is_signed=True,
)
OWN_DATA_FREE_RULE = dataclasses.replace(
    OWN_RULE,
    name="own-data-free",
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
    return dataclasses.replace(workload, train=(inputs.float(), targets.float()))


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


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("parameter", ["0.weight", "2.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(parameter: str, value: float) -> None:
    model = built(TanhNet)
    with torch.no_grad():
        model.get_parameter(parameter)[0, 0] = value
    with pytest.raises(PruneError, match=rf"scores of '{parameter}': NaN or infinite"):
        scores_of(model, tiny(), config_of("magnitude"))


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, "magnitude", "synflow"])
def test_every_criterion_that_reads_weights_refuses_nan(name: str) -> None:
    model = in_float64(TanhNet)
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(PruneError, match=rf"scores of '0\.weight'.*criterion = {name};"):
        scores_of(model, tiny(), config_of(name))


# -- the model is left as it was found -------------------------------------------------------------


def assert_mixed_modes(model: nn.Module) -> None:
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"", "conv1", "conv2", "norm2", "dropout", "head"}


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *DATA_FREE_CRITERIA])
def test_scoring_leaves_modes_weights_gradients_and_random_state_alone(name: str) -> None:
    model = built(ConvNet).train()
    model.norm1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes_inside: set[bool] = set()
    hook = model.dropout.register_forward_hook(
        lambda module, args, output: modes_inside.add(module.training)
    )
    random_state = torch.get_rng_state()
    scores_of(model, images(), config_of(name, calibration_examples=NUM_EXAMPLES))
    hook.remove()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes_inside <= {False}
    assert bool(modes_inside) == (name not in ("magnitude", "random"))
    assert_mixed_modes(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modes_come_back_after_a_refusal() -> None:
    model = built(ConvNet).train()
    model.norm1.eval()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(PruneError):
        scores_of(model, images(), config_of("taylor"))
    assert_mixed_modes(model)


class CountingNet(nn.Module):
    """Writes its buffers in eval mode too, and computes with one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs) * self.level.clone()
        self.calls.add_(1)
        self.level.add_(0.5)
        return outputs


@pytest.mark.parametrize(
    # A functional gradient refuses to write a buffer, so fisher is no such model's criterion.
    "name",
    [n for n in [*GRADIENT_CRITERIA, *DATA_FREE_CRITERIA] if n != "fisher"],
)
def test_buffers_are_put_back(name: str) -> None:
    model = in_float64(CountingNet)
    calls, level = model.calls, model.level
    scores_of(model, tiny(), config_of(name))
    assert model.calls is calls
    assert model.level is level
    assert (int(calls), float(level)) == (0, 1.0)


def test_each_batch_sees_the_buffers_as_they_were_at_first() -> None:
    model = in_float64(CountingNet)
    workload = tiny()
    scores = scores_of(model, workload, config_of("taylor"))
    plain = in_float64(lambda: nn.Linear(3, 2))
    plain.load_state_dict(model.layer.state_dict())
    assert_scores(scores, flat(scores_of(plain, workload, config_of("taylor"))))


# -- tied weights ----------------------------------------------------------------------------------


def shared_loss(weight: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    outputs = torch.tanh(inputs @ weight.T) @ weight.T
    return (outputs - targets).square().mean()


@pytest.mark.parametrize("name", ["taylor", "snip", "taylor_squared", "fisher", "grasp"])
def test_a_tied_weight_is_differentiated_through_all_its_uses(name: str) -> None:
    model = in_float64(SharedWeightNet)
    workload = tiny(SharedWeightNet, num_outputs=3)
    inputs, targets = workload.train
    weight = model.first.weight.detach().clone()
    gradient = torch.func.grad(shared_loss)
    if name in ("taylor", "snip"):
        expected = (weight * gradient(weight, inputs, targets)).abs()
    elif name == "taylor_squared":
        expected = (weight * gradient(weight, inputs, targets)).square()
    elif name == "fisher":
        rows = [gradient(weight, x[None], y[None]) for x, y in zip(inputs, targets, strict=True)]
        expected = weight.square() * torch.stack(rows).square().mean(dim=0)
    else:
        hessian = torch.func.hessian(shared_loss)(weight, inputs, targets).view(9, 9)
        product = hessian @ gradient(weight, inputs, targets).view(9)
        expected = weight * product.view(3, 3)
    one_batch = config_of(name, calibration_batch_size=NUM_EXAMPLES)
    scores = scores_of(model, workload, one_batch)
    assert list(scores) == ["first.weight"]
    assert_scores(scores, expected.reshape(-1), rtol=1e-5)


def test_synflow_of_a_tied_weight_flows_through_all_its_uses() -> None:
    model = in_float64(SharedWeightNet)
    weight = model.first.weight.detach().abs().requires_grad_()
    with float64_by_default():
        flow = (torch.tanh(torch.ones(1, 3) @ weight.T) @ weight.T).sum()
    (gradient,) = torch.autograd.grad(flow, weight)
    expected_N = (weight * gradient).detach().reshape(-1)
    scores = scores_of(model, tiny(num_outputs=3), config_of("synflow"))
    assert_scores(scores, expected_N / expected_N.max() * flat(scores).max())


# -- augmentation ----------------------------------------------------------------------------------


def triple(inputs: Tensor) -> Tensor:
    return inputs * 3


@pytest.mark.parametrize("name", GRADIENT_CRITERIA)
@pytest.mark.parametrize("is_augmented", [True, False])
def test_calibration_augment_decides_whether_examples_are_augmented(
    name: str, is_augmented: bool
) -> None:
    model = in_float64(TanhNet)
    plain = tiny()
    inputs, targets = plain.train
    seen = dataclasses.replace(plain, train=(triple(inputs) if is_augmented else inputs, targets))
    rule = config_of(name, calibration_augment=is_augmented)
    scores = scores_of(model, dataclasses.replace(plain, augment=triple), rule)
    assert torch.equal(flat(scores), flat(scores_of(model, seen, rule)))


def test_random_augmentation_repeats_with_the_seed_and_differs_between_batches() -> None:
    model = built(ConvNet)
    zeros = torch.zeros(NUM_EXAMPLES, 2, 6, 6)
    labels = torch.zeros(NUM_EXAMPLES, dtype=torch.long)

    def noise_of(seed: int, disturbance: int) -> Tensor:
        blank = dataclasses.replace(images(), train=(zeros, labels))
        workload, batches = recorded(blank)
        torch.manual_seed(disturbance)
        scores_of(model, workload, config_of("taylor"), seed=seed)
        return torch.cat(batches)

    noise = noise_of(0, 1)
    assert len({tuple(example.flatten().tolist()) for example in noise}) == NUM_EXAMPLES
    assert torch.equal(noise, noise_of(0, 2))
    assert not torch.equal(noise, noise_of(1, 1))


def test_both_passes_of_grasp_see_the_same_augmented_examples() -> None:
    workload, batches = recorded(images(num_train=NUM_EXAMPLES))
    scores_of(built(ConvNet), workload, config_of("grasp"))
    assert len(batches) == 6
    for first, second in zip(batches[:3], batches[3:], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", ["taylor", "fisher", "obd", "grasp", "synflow"])
def test_frozen_weights_are_scored_like_others_and_stay_frozen(rule: str) -> None:
    workload, config = images(), prune_config(rule, calibration_examples=16)
    model = built(ConvNet)
    expected = scores_of(model, workload, config)
    model.conv1.weight.requires_grad_(False)
    found = scores_of(model, workload, config)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.conv1.weight.requires_grad
