from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from oracles import (
    NUM_EXAMPLES,
    assert_scores,
    config_of,
    flat,
    gradient_of,
    hessian_of,
    loss_of_weights,
    mean_square_of_example_gradients,
    positions_of,
    recorded,
    tiny,
    weights_of,
)
from small_networks import (
    ConvNet,
    SharedWeightNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    prune_config,
    regression,
    scores_of,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbp_ray import config as config_module
from gbp_ray.errors import PruneError
from gbp_ray.pruning import saliency
from gbp_ray.pruning.saliency import criterion, movement_statistic
from gbp_ray.workload import Workload

GRADIENT_CRITERIA = ["taylor", "snip", "taylor_squared", "fisher", "obd", "grasp"]
DATA_FREE_CRITERIA = ["magnitude", "random", "synflow"]


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


class FailingByExample(nn.Module):
    """Decides by a value, which a pass over many single examples at once cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("spread", torch.full((2,), torch.nan))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        return outputs if outputs.sum() > 0 else -outputs


class BindingNet(nn.Module):
    """Binds a buffer anew and then writes another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CountingNet()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = self.mean + inputs.detach().mean(dim=0)
        return self.inner(inputs - self.mean)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (CountingNet, "it writes buffers 'calls', 'level' in eval mode; write such only while"),
        (BindingNet, "it writes buffers 'mean', 'inner.calls', 'inner.level' in eval mode;"),
        (FailingByExample, "torch says RuntimeError: .*; mend the model"),
    ],
    ids=["writes buffers", "binds a buffer", "decides by a value"],
)
def test_fisher_says_why_single_examples_cannot_be_differentiated(
    build: Callable[[], nn.Module], reason: str
) -> None:
    model = in_float64(build)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    wanted = rf"^prune\.criterion = fisher: single examples .*{reason}.*, or choose taylor_squared$"
    with pytest.raises(PruneError, match=wanted) as caught:
        scores_of(model, tiny(), config_of("fisher"))
    assert len(str(caught.value)) < 400
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        torch.testing.assert_close(buffer, before[name][1], equal_nan=True, rtol=0, atol=0)


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
