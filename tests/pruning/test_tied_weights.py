"""Kernels tied by name: every criterion, every figure, every file sees one weight."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from oracles import LAYER_CRITERIA, assert_scores, config_of
from safetensors.torch import load
from small_networks import draw, in_float64, job_config, prune_config, regression, scores_of
from techniques import rounds_of, tied_blank
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.training import FinetuneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.pruning.units import measure, prunable_parameters
from gbp_ray.training.network import load_weights
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.networks import RecurrentConvNet
from gbp_ray.workloads.tying import tie_weights, with_tied_weights

NUM_EXAMPLES = 10
SHAPE = (2, 2, 3, 3)


class TwoConvs(nn.Module):
    """Two smooth layers whose kernels may be one, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.second = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(images))).mean(dim=(2, 3))


def tied() -> nn.Module:
    model = TwoConvs()
    tie_weights(model, [["first", "second"]])
    return model


def workload() -> Workload:
    inputs = draw(NUM_EXAMPLES, 2, 4, 4, seed=1, dtype=torch.float64)
    return regression(tied, inputs, draw(NUM_EXAMPLES, 2, seed=2, dtype=torch.float64))


class DirectLoss:
    """The loss as a function of the one kernel, without any network."""

    def __init__(self, model: nn.Module) -> None:
        self.biases = [layer.bias.detach() for layer in (model.first, model.second)]

    def __call__(self, kernel: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(functional.conv2d(inputs, kernel, self.biases[0], padding=1))
        outputs = functional.conv2d(hidden, kernel, self.biases[1], padding=1).mean(dim=(2, 3))
        return (outputs - targets).square().mean()

    def gradient(self, kernel: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        kernel = kernel.detach().requires_grad_()
        (found,) = torch.autograd.grad(self(kernel, inputs, targets), kernel)
        return found

    def hessian(self, kernel: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        found = torch.autograd.functional.hessian(
            lambda values: self(values, inputs, targets), kernel
        )
        return found.view(36, 36)

    def flow(self, kernel: Tensor) -> Tensor:
        """|w dR/dw| of the linearised network on an all-one input."""
        kernel = kernel.detach().abs().requires_grad_()
        ones = torch.ones(1, 2, 4, 4, dtype=torch.float64)
        hidden = torch.tanh(functional.conv2d(ones, kernel, padding=1))
        total = functional.conv2d(hidden, kernel, padding=1).mean(dim=(2, 3)).sum()
        (found,) = torch.autograd.grad(total, kernel)
        return (kernel * found).detach()


def expected_scores(rule: str, direct: DirectLoss, kernel: Tensor) -> Tensor:
    inputs, targets = workload().train
    gradient = direct.gradient(kernel, inputs, targets)
    if rule == "magnitude":
        return kernel.abs()
    if rule in ("taylor", "snip"):
        return (kernel * gradient).abs()
    if rule == "taylor_squared":
        return (kernel * gradient).square()
    if rule == "fisher":
        rows = [
            direct.gradient(kernel, x[None], y[None]) for x, y in zip(inputs, targets, strict=True)
        ]
        # Squared after the uses are summed: a sum of squares would lack their products.
        return kernel.square() * torch.stack(rows).square().mean(dim=0)
    hessian = direct.hessian(kernel, inputs, targets)
    if rule == "obd":
        return kernel.square() * hessian.diagonal().view(SHAPE) / 2
    if rule == "grasp":
        return kernel * (hessian @ gradient.flatten()).view(SHAPE)
    flow = direct.flow(kernel)
    return flow / flow.max()


# Those of layers are in test_moments.
ORACLES = [r for r in CRITERIA if r not in ("random", "movement", "obd", *LAYER_CRITERIA)]


@pytest.mark.parametrize("rule", ORACLES)
def test_a_criterion_agrees_with_differentiating_the_one_kernel(rule: str) -> None:
    model = in_float64(tied)
    kernel = model.first.weight.detach().clone()
    config = config_of(rule, calibration_batch_size=NUM_EXAMPLES)
    scores = scores_of(model, workload(), config)
    assert list(scores) == ["first.weight"]
    expected = expected_scores(rule, DirectLoss(model), kernel)
    assert_scores(scores, expected.reshape(-1), rtol=1e-5)


def test_obd_approaches_the_diagonal_of_the_one_kernels_hessian() -> None:
    model = in_float64(tied)
    kernel = model.first.weight.detach().clone()
    num_probes = 500
    config = config_of("obd", hutchinson_probes=num_probes, calibration_batch_size=NUM_EXAMPLES)
    (found,) = scores_of(model, workload(), config).values()
    direct = DirectLoss(model)
    expected = expected_scores("obd", direct, kernel)
    # The variance of a probe is twice the squares beside the diagonal.
    hessian = direct.hessian(kernel, *workload().train)
    beside = hessian - hessian.diagonal().diag()
    deviation = (2 * beside.square().sum(dim=1) / num_probes).sqrt().view(SHAPE)
    bound = 5 * deviation * kernel.square() / 2
    assert ((found - expected).abs() < bound + 1e-7).all()
    assert (expected.abs() > bound).any()


def test_random_scores_are_drawn_once_for_the_one_kernel() -> None:
    (scores,) = scores_of(in_float64(tied), workload(), config_of("random")).values()
    assert scores.shape == SHAPE
    assert len(scores.unique()) == 36


def test_movement_gathers_what_the_one_kernel_moved_by() -> None:
    model, (inputs, targets) = in_float64(tied), workload().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    direct = DirectLoss(model)
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(3):
        kernel = model.first.weight.detach().clone()
        direct.biases = [layer.bias.detach() for layer in (model.first, model.second)]
        expected -= kernel * direct.gradient(kernel, inputs, targets)
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    recipe = FinetuneConfig(
        epochs=3,
        batch_size=NUM_EXAMPLES,
        microbatches=1,
        lr_schedule="constant",
        learning_rate=0.1,
        weight_decay=0.01,
    )
    job = job_config(finetune=recipe, prune={"criterion": "movement", "sparsity": 0.5})
    given = regression(lambda: in_float64(tied), inputs, targets)
    dense = next(run_rounds(job, given, Ranks()))
    state = torch.load(io.BytesIO(dense.to_files()["state.pt"]), weights_only=True)
    assert list(state["movement"]) == ["first.weight"]
    torch.testing.assert_close(state["movement"]["first.weight"], expected, rtol=1e-6, atol=1e-9)


# -- figures and files -----------------------------------------------------------------------------


def test_figures_of_a_recurrent_network_agree_with_a_count_by_hand() -> None:
    """Width 4 and 8, three steps, 8x8 pixels, then 4x4; the kernels' work counts three times."""
    shared = RecurrentConvNet(1, 10, 4, 3, True)
    apart = RecurrentConvNet(1, 10, 4, 3, False)
    joined = RecurrentConvNet(1, 10, 4, 3, False)
    tie_weights(joined, [["layer1.kernels.*"], ["layer2.kernels.*"]])
    drives, kernels = (4 * 9, 8 * 4 * 9), (4 * 4 * 9, 8 * 8 * 9)
    rest = 2 * 4 * (4 + 8) + 8 * 10 + 10
    macs_by_hand = 64 * (drives[0] + 3 * kernels[0]) + 16 * (drives[1] + 3 * kernels[1]) + 80
    for model, copies in ((shared, 1), (joined, 1), (apart, 3)):
        units = prunable_parameters(model)
        cost = measure(model, units, count_macs(model, torch.zeros(1, 1, 8, 8)))
        assert cost.num_parameters == sum(drives) + copies * sum(kernels) + rest
        assert cost.macs == cost.macs_nonzero == macs_by_hand
        assert len(units) == 3 + 2 * copies
    # A pruned weight spares its work in each step.
    masks = MaskSet({"layer1.kernels.0.weight": torch.arange(144).view(4, 4, 3, 3) % 2 == 0})
    masks.apply_(joined)
    assert torch.count_nonzero(joined.layer1.kernels[2].weight) == 72
    units = prunable_parameters(joined)
    cost = measure(joined, units, count_macs(joined, torch.zeros(1, 1, 8, 8)))
    # The shifts of fresh norms are zero, too.
    assert cost.num_nonzero == cost.num_parameters - 2 * 4 * (4 + 8) // 2 - 72
    assert cost.macs - cost.macs_nonzero == 64 * 3 * 72


def test_a_network_tied_by_name_is_the_one_that_is_built_so() -> None:
    """Scores, masks and weights of whole trials, whatever the layers are called."""
    found = []
    for is_shared in (True, False):
        torch.manual_seed(0)
        start = RecurrentConvNet(2, 3, 4, 2, True)
        values = dict(start.named_parameters())

        def build(is_shared: bool = is_shared, values: dict[str, Any] = values) -> nn.Module:
            model = RecurrentConvNet(2, 3, 4, 2, is_shared)
            if not is_shared:
                tie_weights(model, [["layer1.kernels.*"], ["layer2.kernels.*"]])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(values[name])
            return model

        reports = rounds_of("tied", Ranks(), build=build)
        weights = load(reports[-1]["files"]["weights.safetensors"])
        found.append(([r["mask"] for r in reports], weights, reports[-1]["record"]["accuracy"]))
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    assert found[0][1].keys() == found[1][1].keys()
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name])


def test_files_hold_the_one_kernel_and_load_into_a_tied_network() -> None:
    build = with_tied_weights(TwoConvs, [["first", "second"]])
    names = load(rounds_of("tied, blank", Ranks())[-1]["files"]["weights.safetensors"])
    assert {n for n in names if "kernels" in n} == {
        "layer1.kernels.0.weight",
        "layer2.kernels.0.weight",
    }
    inputs = draw(20, 2, 6, 6, seed=1)
    job = job_config(prune={"rounds": 1, "sparsity": 0.5})
    *_, state = run_rounds(job, regression(build, inputs, inputs[:, :, 0, 0]), Ranks())
    weights = state.to_files()["weights.safetensors"]
    assert set(load(weights)) == {"first.weight", "first.bias", "second.bias"}
    fresh = build()
    load_weights(fresh, weights, "weights")
    assert fresh.second.weight is fresh.first.weight
    assert torch.equal(fresh.first.weight, state.model.first.weight)
    assert torch.count_nonzero(fresh.first.weight) == 18


# -- starts and exclusions -------------------------------------------------------------------------


def test_a_network_tied_on_the_meta_device_stays_tied_and_starts_from_its_first_layer() -> None:
    from gbp_ray.training.network import build_start, network_of_seed

    given = regression(tied_blank, draw(4, 2, 6, 6), draw(4, 3))
    plain = regression(lambda: tied_blank(is_tied=False), draw(4, 2, 6, 6), draw(4, 3))
    start, *_ = build_start(given, 3, Ranks(), "replicated")
    again, is_blank = network_of_seed(given, 3)
    apart, _ = network_of_seed(plain, 3)
    assert is_blank
    for model in (start, again):
        first, second = (model.layer2.kernels[n].weight for n in (0, 1))
        assert first is second
        assert torch.equal(first, apart.layer2.kernels[0].weight)


def test_excluding_one_name_of_a_tied_kernel_excludes_it() -> None:
    model = RecurrentConvNet(2, 3, 4, 2, False)
    tie_weights(model, [["layer1.kernels.*"]])
    config = prune_config(exclude=("layer1.kernels.1.*",))
    names = [unit.name for unit in prunable_parameters(model, config.exclude)]
    assert "layer1.kernels.0.weight" not in names
    assert "layer2.kernels.1.weight" in names
