from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from oracles import (
    DATA_FREE_CRITERIA,
    GRADIENT_CRITERIA,
    LAYER_CRITERIA,
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
    UNEVEN,
    ConvNet,
    SharedWeightNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    regression,
    scores_of,
    uneven,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gbp_ray.distributed.sharding import differentiating
from gbp_ray.errors import PruneError
from gbp_ray.pruning.criteria import CRITERIA, criterion
from gbp_ray.pruning.statistics import movement_statistic
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.losses import count_items

# -- the frame -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA, *DATA_FREE_CRITERIA])
def test_scores_are_float32_and_shaped_and_named_like_the_weights(name: str) -> None:
    model = in_float64(TanhNet)
    scores = scores_of(model, tiny(), config_of(name))
    assert {key: (s.shape, s.dtype) for key, s in scores.items()} == {
        "0.weight": ((4, 3), torch.float32),
        "2.weight": ((2, 4), torch.float32),
    }


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA, *DATA_FREE_CRITERIA])
def test_excluded_parameters_get_no_score(name: str) -> None:
    model = in_float64(TanhNet)
    assert list(scores_of(model, tiny(), config_of(name, exclude=("0.*",)))) == ["2.weight"]


@pytest.mark.parametrize("name", [n for n in CRITERIA if not criterion(n).spec.is_signed])
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
    told: list[Progress] = []
    scores_of(in_float64(TanhNet), tiny(), config_of(name), on_progress=told.append)
    total = 3 * num_passes
    assert told == [Progress("score", done, total) for done in range(1, total + 1)]


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
        monkeypatch.setattr("gbp_ray.pruning.statistics._PER_EXAMPLE_BYTES", room)
    counted = dataclasses.replace(workload, loss=counted_loss)
    assert_scores(scores_of(model, counted, config_of("fisher")), expected_N)
    # Batches of 4, 4 and 2 in chunks of all, of 3 and of 1.
    assert calls == {None: 3, 3: 5, 0: 10}[room_for_examples]


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("name", ["taylor", "fisher", "grasp"])
def test_scores_under_an_uneven_loss_are_those_of_the_whole_set(name: str, kind: str) -> None:
    """Against the loss over all examples in one batch; of each example for fisher."""
    workload, model = uneven(kind, NUM_EXAMPLES), in_float64(UNEVEN[kind].build)
    inputs, targets = workload.train
    scores = scores_of(model, workload, config_of(name))
    weights_N, gradient_N = weights_of(model), gradient_of(model, workload, inputs, targets)
    if name == "taylor":
        assert_scores(scores, (weights_N * gradient_N).abs())
    elif name == "grasp":
        hessian = hessian_of(model, workload, inputs, targets)
        assert_scores(scores, weights_N * (hessian @ gradient_N), rtol=2e-5)
    else:
        counts = count_items(workload, targets)
        expected_N = torch.zeros_like(weights_N)
        for i in counts.nonzero().flatten().tolist():
            own_N = gradient_of(model, workload, inputs[i : i + 1], targets[i : i + 1])
            expected_N += counts[i] * own_N.square()
        assert_scores(scores, weights_N.square() * expected_N / counts.sum())


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


def test_obd_under_an_uneven_loss_is_exact_where_the_hessian_is_diagonal() -> None:
    """The weight of an example is the last column of its targets."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        squares = (outputs - targets[:, :2]).square()
        return (squares * targets[:, 2:]).sum() / (2 * targets[:, 2].sum())

    model = in_float64(lambda: nn.Linear(3, 2, bias=False))
    inputs = torch.eye(3, dtype=torch.float64)[torch.arange(NUM_EXAMPLES) % 3]
    targets = draw(NUM_EXAMPLES, 3, dtype=torch.float64).abs()
    # A whole batch of weight 0, whichever it is.
    targets[[2, 5, 8], 2] = 0
    workload = dataclasses.replace(
        regression(TanhNet, inputs, targets), loss=loss, count=lambda targets: targets[:, 2].sum()
    )
    shares = (inputs * targets[:, 2:]).sum(dim=0) / targets[:, 2].sum()
    expected = model.weight.detach().square() * shares / 2
    config = config_of("obd", hutchinson_probes=1, calibration_batch_size=1)
    assert_scores(scores_of(model, workload, config), expected.reshape(-1))


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


class Attending(nn.Module):
    """Attention between linear layers, the first part under re-entrant checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.first, inputs.requires_grad_(), use_reentrant=True)
        return self.last(self.layer(self.frozen(hidden)).mean(dim=1))


def test_weights_that_are_not_scored_keep_no_gradient_and_matrices_among_them_require_one() -> None:
    model = built(Attending)
    names = {"first.weight", "layer.linear1.weight", "last.weight"}
    with differentiating(model, names):
        required = {name for name, p in model.named_parameters() if p.requires_grad}
        model(torch.randn(2, 5, 6)).square().sum().backward()
        kept = {name for name, p in model.named_parameters() if p.grad is not None}
    # Torch folds transposed inputs into one product only for weights that require a gradient.
    attention = {f"layer.{name}.weight" for name in ("self_attn.out_proj", "linear2")}
    assert required == names | attention | {"layer.self_attn.in_proj_weight"}
    assert kept == names
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"frozen.weight", "frozen.bias"}


@pytest.mark.parametrize("name", ["obd", "grasp"])
def test_without_curvature_second_order_scores_are_zero(name: str) -> None:
    model = in_float64(lambda: nn.Linear(3, 2))
    linear = dataclasses.replace(tiny(), loss=lambda outputs, targets: outputs.mean())
    assert not flat(scores_of(model, linear, config_of(name))).any()


@pytest.mark.parametrize("name", ["taylor", "snip", "fisher", "grasp", *LAYER_CRITERIA])
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
    gathered = {
        "0.weight": draw(4, 3, seed=8, dtype=torch.float64),
        "2.weight": draw(2, 4, seed=9, dtype=torch.float64),
    }
    workload, batches = recorded(tiny())
    scores = scores_of(model, workload, config_of("movement"), movement=gathered)
    assert torch.equal(scores["0.weight"], gathered["0.weight"].float())
    assert torch.equal(scores["2.weight"], gathered["2.weight"].float())
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


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA, "magnitude", "synflow"])
def test_every_criterion_that_reads_weights_refuses_nan(name: str) -> None:
    model = in_float64(TanhNet)
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(PruneError, match=rf"scores of '0\.weight'.*criterion = {name};"):
        scores_of(model, tiny(), config_of(name))


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
