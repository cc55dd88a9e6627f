"""Scores of whole units against finite differences of their gates, and sums of weights' scores."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import LAYER_CRITERIA
from rank_program import reports_of_world
from small_networks import ONE_RANK, UNEVEN, draw, in_float64, jitter, prune_config, uneven
from torch import Tensor, nn
from torch.nn import functional
from unit_networks import (
    NUM_EXAMPLES,
    PAIRS,
    UNIT_CASES,
    Net,
    slices_of,
    structure_of,
    unit_program,
    unit_scores_of,
)

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.errors import PruneError
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.unit_scores import score_units
from gbp_ray.pruning.units import Prunable
from gbp_ray.workloads.batch import Batch
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import cut_batches, derive_seed, shuffled_indices
from gbp_ray.workloads.losses import count_items

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

BATCH = 3  # as many as steps
OF_NORM = ("weight", "bias")


def scores_of_units(case: str, name: str, **fields: Any) -> np.ndarray:
    model, structure = UNIT_CASES[case].made()
    config = prune_config(name, calibration_batch_size=BATCH, **fields)
    kept_U = np.ones(structure.num_units, dtype=bool)
    return score_units(model, structure, kept_U, UNIT_CASES[case].workload(), config, ONE_RANK)


def batches_of(workload: Workload) -> list[torch.Tensor]:
    order = shuffled_indices(NUM_EXAMPLES, derive_seed(0, "calibration"))
    return [order[cut.start : cut.stop] for cut in cut_batches(NUM_EXAMPLES, BATCH)]


@torch.no_grad()
def gate_slopes(
    model: nn.Module, structure: Structure, workload: Workload, rows: Tensor
) -> np.ndarray:
    """Differences of the mean loss as all weights that read a unit are scaled a little, (U,)."""
    inputs, targets = (column[rows] for column in workload.train)

    def loss_at(number: int, unit: int, factor: float) -> float:
        before = {name: p.clone() for name, p in model.named_parameters()}
        for part in structure.groups[number].slices:
            if part.role == "in":
                weight = model.get_parameter(part.name).movedim(part.dim, 0)
                weight[part.positions[unit]] *= factor
        loss = float(workload.loss(model(inputs), targets))
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
        return loss

    step = 1e-5
    with in_mode(model, is_training=False):
        return np.array(
            [
                (loss_at(n, unit, 1 + step) - loss_at(n, unit, 1 - step)) / (2 * step)
                for n, group in enumerate(structure.groups)
                for unit in range(group.num_units)
            ]
        )


def by_definition(
    model: nn.Module, structure: Structure, workload: Workload, name: str
) -> np.ndarray:
    """Adds up a criterion over batches or examples."""
    total, n = 0.0, 0.0
    for rows in batches_of(workload):
        counts = count_items(workload, workload.train[1][rows])
        counts = torch.ones(len(rows)) if counts is None else counts
        items = float(counts.sum())
        n += items
        if name == "fisher":
            for row, count in zip(rows, counts.tolist(), strict=True):
                if count:
                    slopes = gate_slopes(model, structure, workload, row[None])
                    total = total + count * slopes**2
        elif items:
            slopes = gate_slopes(model, structure, workload, rows)
            total = total + (slopes**2 if name == "taylor_squared" else items * slopes)
    return {"taylor": np.abs(total / n), "taylor_squared": total, "fisher": total / n}[name]


@pytest.mark.parametrize("name", ["taylor", "taylor_squared", "fisher"])
@pytest.mark.parametrize("case", UNIT_CASES)
def test_a_score_is_the_criterion_of_the_slope_in_the_gate(case: str, name: str) -> None:
    model, structure = UNIT_CASES[case].made()
    workload = UNIT_CASES[case].workload()
    expected_U = by_definition(model, structure, workload, name)
    assert np.abs(expected_U).max() > 1e-6
    found_U = scores_of_units(case, name)
    np.testing.assert_allclose(found_U, expected_U, rtol=1e-5, atol=1e-8 * expected_U.max())


@pytest.mark.parametrize("case", UNIT_CASES)
def test_all_examples_of_a_batch_pass_at_once_where_they_can_be_told_apart(case: str) -> None:
    model, structure = UNIT_CASES[case].made()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    kept_U = np.ones(structure.num_units, dtype=bool)
    config = prune_config("fisher", calibration_batch_size=BATCH)
    score_units(model, structure, kept_U, UNIT_CASES[case].workload(), config, ONE_RANK)
    batches = [3, 3, 3, 2]
    if UNIT_CASES[case].is_by_row:
        # A batch against its weights' gradients, twice, then against two of its examples.
        assert sizes == [3, 3, 3, 1, 1, *batches]
    else:
        assert sizes[-NUM_EXAMPLES:] == [1] * NUM_EXAMPLES


@pytest.mark.parametrize("case", ["residual", "attention", "turned", "encoder"])
def test_no_gradient_of_a_weight_is_taken_once_a_batch_was_checked(case: str) -> None:
    model, structure = UNIT_CASES[case].made()
    are_required: list[bool] = []
    model.register_forward_pre_hook(
        lambda *_: are_required.append(any(p.requires_grad for p in model.parameters()))
    )
    kept_U = np.ones(structure.num_units, dtype=bool)
    config = prune_config("taylor", calibration_batch_size=BATCH)
    score_units(model, structure, kept_U, UNIT_CASES[case].workload(), config, ONE_RANK)
    assert are_required == [True, False, False, False, False, False]


def test_scoring_leaves_the_network_as_it_was() -> None:
    model, structure = UNIT_CASES["multihead"].made()
    model.mix.weight.requires_grad_(False)
    for parameter in model.attention.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    kept_U = np.ones(structure.num_units, dtype=bool)
    for name in ("taylor", "fisher"):
        config = prune_config(name, calibration_batch_size=BATCH)
        score_units(model, structure, kept_U, UNIT_CASES["multihead"].workload(), config, ONE_RANK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.attention.parameters())
    assert model.mix.weight.grad is None
    assert not model.mix.weight.requires_grad
    assert model.training
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("name", ["taylor", "taylor_squared", "fisher"])
def test_examples_count_as_the_loss_is_a_mean_over_their_items(kind: str, name: str) -> None:
    workload, model = uneven(kind, NUM_EXAMPLES), in_float64(UNEVEN[kind].build)
    first, second = [n for n, p in model.named_parameters() if p.ndim > 1]
    parts = slices_of((first, 0, range(4), "out"), (second, 1, range(4), "in"))
    structure = structure_of(model, parts)
    expected_U = by_definition(model, structure, workload, name)
    config = prune_config(name, calibration_batch_size=BATCH)
    found_U = score_units(model, structure, np.ones(4, bool), workload, config, ONE_RANK)
    np.testing.assert_allclose(found_U, expected_U, rtol=1e-5, atol=1e-8 * expected_U.max())


def test_given_batches_score_as_calibration_examples_do() -> None:
    model, structure = UNIT_CASES["routed"].made()
    workload, kept_U = UNIT_CASES["routed"].workload(), np.ones(5, dtype=bool)
    given = [Batch(*(column[rows] for column in workload.train)) for rows in batches_of(workload)]
    for name in ("taylor", "fisher"):
        config = prune_config(name, calibration_batch_size=BATCH)
        one, other = (
            score_units(model, structure, kept_U, workload, config, ONE_RANK, batches=batches)
            for batches in (None, given)
        )
        assert np.array_equal(one, other)


def test_examples_that_are_augmented_pass_at_once() -> None:
    model, structure = UNIT_CASES["residual"].made()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    workload = dataclasses.replace(UNIT_CASES["residual"].workload(), augment=jitter)
    config = prune_config("fisher", calibration_batch_size=BATCH)
    score_units(model, structure, np.ones(7, dtype=bool), workload, config, ONE_RANK)
    assert sizes == [3, 3, 3, 1, 1, 3, 3, 3, 2]


# -- weights that make and read the same units -----------------------------------------------------


def tied(*, by_function: bool = False) -> Net:
    """Looks words up in the matrix of its last layer; word 0 is padding."""

    def passing(net: Any, words: Tensor) -> Tensor:
        found = net.table(words)
        if by_function:
            found = functional.embedding(words, net.table.weight)
        stream = found + net.mix(torch.tanh(found))
        return net.head(getattr(net, "gate", 1.0) * stream).mean(dim=1)

    table, head = nn.Embedding(12, 6, padding_idx=0), nn.Linear(6, 12, bias=False)
    with torch.no_grad():
        table.weight.normal_()
    head.weight = table.weight
    return Net(passing, table=table, mix=nn.Linear(6, 6), head=head)


def of_tied(model: nn.Module) -> Structure:
    stream = slices_of(
        ("table.weight", 1, range(6), "out"),
        ("mix.weight", 0, range(6), "out"),
        ("mix.weight", 1, range(6), "in"),
        ("table.weight", 1, range(6), "in"),
    )
    return structure_of(model, stream)


def text() -> Workload:
    words = draw(NUM_EXAMPLES, 4, seed=1).mul(4).long().remainder(12)
    return Workload(tied, (words, words.sum(dim=1).remainder(12)), (words[:1], words[:1, 0]))


@pytest.mark.parametrize("has_own_use", [False, True])
@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_what_a_tied_weight_makes_is_no_part_of_the_gate(name: str, has_own_use: bool) -> None:
    """Against a gate written into the network, of what is read."""
    model, workload = in_float64(tied), text()
    structure = of_tied(model)
    if has_own_use:
        # Its layer is called, and the weight used once more.
        call = model.head.forward
        model.head.forward = lambda x: call(x) + 0.1 * functional.linear(x**2, model.head.weight)
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)

    def slope(rows: Tensor) -> Tensor:
        words, labels = (column[rows] for column in workload.train)
        found = model.table(words)
        stream = found + model.mix(gate * torch.tanh(found))
        read = gate * stream
        logits = functional.linear(read, model.head.weight)
        if has_own_use:
            logits = logits + 0.1 * functional.linear(gate * stream**2, model.head.weight)
        return torch.autograd.grad(functional.cross_entropy(logits.mean(dim=1), labels), gate)[0]

    if name == "taylor":
        slopes = sum(len(rows) * slope(rows) for rows in batches_of(workload))
        expected_U = (slopes / NUM_EXAMPLES).abs()
    else:
        singles = [slope(torch.tensor([row])).square() for row in range(NUM_EXAMPLES)]
        expected_U = torch.stack(singles).mean(dim=0)
    config = prune_config(name, calibration_batch_size=BATCH)
    found_U = score_units(model, structure, np.ones(6, bool), workload, config, ONE_RANK)
    np.testing.assert_allclose(found_U, expected_U.numpy(), rtol=1e-9)


def refusal(model: nn.Module, structure: Structure, workload: Workload, **fields: Any) -> str:
    config = prune_config(**{"criterion": "taylor", "calibration_batch_size": BATCH, **fields})
    kept_U = np.ones(structure.num_units, dtype=bool)
    with pytest.raises(PruneError) as caught:
        score_units(model, structure, kept_U, workload, config, ONE_RANK)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_makes_and_reads_by_functions_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(functional.linear(x, self.weight))
            return self.head(functional.linear(hidden, self.weight.T)).mean(dim=1)

    model = in_float64(Tied)
    parts = slices_of(("weight", 0, range(5), "out"), ("weight", 0, range(5), "in"))
    message = refusal(model, structure_of(model, parts), UNIT_CASES["gated ffn"].workload())
    assert "'weight' makes and reads the same units" in message


def test_units_that_no_weight_reads_are_refused_by_name() -> None:
    model, _ = UNIT_CASES["stepwise"].made()
    structure = structure_of(model, slices_of(("a.weight", 0, range(5), "out")))
    message = refusal(model, structure, UNIT_CASES["stepwise"].workload())
    assert "no weight reads the units of 'a.weight'" in message


@pytest.mark.parametrize("way", ["gate", "sum"])
@pytest.mark.parametrize("name", ["taylor", "fisher", "magnitude"])
def test_scores_that_are_not_finite_name_the_weight(name: str, way: str) -> None:
    model, structure = UNIT_CASES["gated ffn"].made()
    with torch.no_grad():
        model.up.weight[1, 2] = torch.nan
    workload = UNIT_CASES["gated ffn"].workload()
    message = refusal(model, structure, workload, criterion=name, unit_score=way)
    assert "'up.weight': NaN or infinite under prune.criterion" in message


# -- sums of the scores of weights -----------------------------------------------------------------


def sum_by_loops(structure: Structure, scores: Mapping[str, Tensor], power: int = 1) -> np.ndarray:
    """Adds up each weight's score once for each unit that it lies in."""
    sums = []
    for group in structure.groups:
        for unit in range(group.num_units):
            weights = set()
            for part in group.slices:
                if part.name not in scores:
                    continue
                for place in np.ndindex(*scores[part.name].shape):
                    if place[part.dim] in part.positions[unit]:
                        weights.add((part.name, place))
            values = sorted(float(scores[name][place]) ** power for name, place in weights)
            sums.append(sum(values) ** (1 / power))
    return np.array(sums)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("residual", name) for name in CRITERIA if name not in ("random", "movement")),
        ("multihead", "taylor_squared"),
        ("recurrent", "fisher"),
    ],
)
def test_the_sum_holds_each_weight_of_a_unit_once(case: str, name: str) -> None:
    model, structure = UNIT_CASES[case].made()
    workload = UNIT_CASES[case].workload()
    config = prune_config(name, unit_score="sum", calibration_batch_size=BATCH)
    inside = {part.name for _, part in structure.slices()}
    units = [
        Prunable(n, p, None)
        for n, p in sorted(model.named_parameters())
        # Norms and biases have no inputs that activations could be.
        if n in inside and (p.ndim > 1 or name not in LAYER_CRITERIA)
    ]
    scores = score(model, units, workload, config, ONE_RANK).gather(ONE_RANK)
    assert (
        any(values.ndim == 1 for values in scores.values())
        == (case == "residual" and name not in LAYER_CRITERIA)
        or case != "residual"
    )
    expected_U = sum_by_loops(structure, scores, 2 if name == "magnitude" else 1)
    kept_U = np.ones(structure.num_units, dtype=bool)
    found_U = score_units(model, structure, kept_U, workload, config, ONE_RANK)
    np.testing.assert_allclose(found_U, expected_U, rtol=1e-12)


def test_magnitude_is_the_norm_of_all_weights_of_a_unit() -> None:
    """Of the residual stream: rows of a weight that are columns of it, too, count once."""
    model, _ = UNIT_CASES["residual"].made()
    own = []
    for first, second in PAIRS:
        rows = [first, second]
        is_in = torch.zeros(6, 6, 3, 3, dtype=torch.bool)
        is_in[rows] = True
        is_in[:, rows] = True
        parts = [
            *(model.get_parameter(f"conv1.{own}")[rows] for own in ("weight", "bias")),
            *(getattr(norm, own)[rows] for norm in (model.norm1, model.norm2) for own in OF_NORM),
            *(model.conv2.weight[is_in], model.conv3.weight[:, first]),
        ]
        own.append(torch.cat([part.reshape(-1) for part in parts]).norm().item())
    found_U = scores_of_units("residual", "magnitude")
    np.testing.assert_allclose(found_U[:3], own, rtol=1e-6)


def test_movement_sums_what_was_gathered() -> None:
    model, structure = UNIT_CASES["residual"].made()
    gathered = {
        name: draw(*p.shape, seed=len(name), dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    config = prune_config("movement")
    kept_U, workload = np.ones(7, dtype=bool), UNIT_CASES["residual"].workload()
    found_U = score_units(
        *(model, structure, kept_U, workload, config, ONE_RANK), movement=gathered
    )
    np.testing.assert_allclose(found_U, sum_by_loops(structure, gathered), rtol=1e-5)
    assert "movement" in refusal(model, structure, workload, criterion="movement")
    with pytest.raises(PruneError, match=r"scores no weight of the units of 'conv1\.weight'"):
        score_units(*(model, structure, kept_U, workload, config, ONE_RANK), movement={})


def weights_alone(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Tensor
) -> dict[str, Tensor]:
    """Knows nothing of biases; gives removed weights a score, too."""
    return {name: w.detach() + 1 for name, w in model.named_parameters() if w.ndim > 1}


# -- masked and removed ----------------------------------------------------------------------------


def smaller(model: nn.Module, structure: Structure, kept_U: np.ndarray) -> tuple[Any, Any]:
    """Removes the units of a network with one group."""
    small, (group,) = copy.deepcopy(model), structure.groups
    for name, by_dim in structure.kept_positions(kept_U).items():
        weight = small.get_parameter(name).detach()
        for dim, stays in by_dim.items():
            weight = weight.index_select(dim, torch.from_numpy(np.flatnonzero(stays)))
        owner = small.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(weight))
    left = range(int(kept_U.sum()))
    parts = slices_of(*((s.name, s.dim, left, s.role) for s in group.slices))
    return small, structure_of(small, parts)


@pytest.mark.parametrize("way", ["gate", "sum"])
@pytest.mark.parametrize(
    "name", [*(n for n in CRITERIA if n != "movement"), f"{__name__}:weights_alone"]
)
def test_masked_units_score_nothing_and_the_others_as_if_they_were_gone(
    name: str, way: str
) -> None:
    model, structure = UNIT_CASES["gated ffn"].made()
    workload = UNIT_CASES["gated ffn"].workload()
    kept_U = np.array([True, False, True, True, False, False, True])
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        for weight, mask in structure.masks(kept_U, names).items():
            model.get_parameter(weight).mul_(mask)
    config = prune_config(name, unit_score=way, calibration_batch_size=BATCH)
    masked_U = score_units(model, structure, kept_U, workload, config, ONE_RANK)
    assert not masked_U[~kept_U].any()
    assert masked_U[kept_U].all()
    small, left = smaller(model, structure, kept_U)
    small_U = score_units(small, left, np.ones(4, dtype=bool), workload, config, ONE_RANK)
    # The probes of obd are drawn by shape.
    if name != "obd":
        np.testing.assert_allclose(masked_U[kept_U], small_U, rtol=1e-6)


def test_random_draws_depend_on_seed_and_round() -> None:
    model, structure = UNIT_CASES["gated ffn"].made()
    kept_U = np.ones(7, dtype=bool)
    common = (model, structure, kept_U, UNIT_CASES["gated ffn"].workload())
    drawn = [
        tuple(
            score_units(*common, prune_config("random"), ONE_RANK, seed=seed, round_number=number)
        )
        for seed, number in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    assert all(0 <= value < 1 for value in drawn[0])


# -- on several ranks ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, ...], bytes]:
    return unit_scores_of(ONE_RANK)


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_have_the_same_bits_on_any_number_of_ranks_and_in_shards(
    world_size: int, alone: dict[tuple[str, ...], bytes], tmp_path: Path
) -> None:
    for report in reports_of_world(world_size, tmp_path, unit_program):
        for strategy, found in report.items():
            assert found == alone, (strategy, [key for key in alone if found[key] != alone[key]])
