"""Networks with dicts, sequences, pixels and numbers: pruned, and measured as plain loops do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from any_networks import KINDS, NUM_WORDS, Reader, any_program, language_model, outcome
from oracles import (
    DATA_FREE_CRITERIA,
    GRADIENT_CRITERIA,
    LAYER_CRITERIA,
    NUM_EXAMPLES,
    assert_scores,
    config_of,
    weights_of,
)
from rank_program import reports_of_world
from small_networks import Tagger, built, draw, in_float64, job_config, scores_of, uneven
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import WorkloadError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.evaluation import evaluate
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.contract import Workload


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: outcome(name, Ranks()) for name in KINDS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    return reports_of_world(2, tmp_path_factory.mktemp("pair"), any_program)


@pytest.mark.parametrize("name", KINDS)
def test_dense_and_pruned_are_measured_as_by_a_plain_loop(name: str, alone: dict[str, Any]) -> None:
    make, measure = KINDS[name]
    workload = make()
    for found in alone[name]:
        model = workload.build_model()
        model.load_state_dict(found["state"])
        with torch.no_grad():
            expected = measure(model.eval(), workload)
        assert found["measured"] == pytest.approx(expected, rel=1e-6)
    dense, pruned = alone[name]
    layers = pruned["record"]["cost"]["layers"]
    kept = sum(layer["num_nonzero"] for layer in layers)
    total = sum(layer["num_weights"] for layer in layers)
    assert kept == total - int(0.6 * total + 0.5)
    assert dense["mask"] != pruned["mask"]


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("name", KINDS)
def test_values_do_not_depend_on_the_batch_size(
    name: str, size: int, alone: dict[str, Any]
) -> None:
    workload = KINDS[name][0]()
    pruned = alone[name][1]
    model = workload.build_model()
    model.load_state_dict(pruned["state"])
    measured = evaluate(model, workload, Ranks(), size)
    found = {**measured.metrics, "loss": measured.loss}
    assert found == pytest.approx(pruned["measured"], rel=1e-6)


@pytest.mark.parametrize("strategy", ["replicated", "fsdp"])
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_prune_to_the_same_bits(
    name: str, strategy: str, alone: dict[str, Any], pair: list[dict[tuple[str, str], Any]]
) -> None:
    for report in pair:
        for found, expected in zip(report[name, strategy], alone[name], strict=True):
            assert found["mask"] == expected["mask"]
            assert found["measured"] == expected["measured"]
            assert found["record"] == expected["record"]
            for key, weights in expected["weights"].items():
                assert torch.equal(found["weights"][key], weights), key


# -- every criterion on dicts whose examples have different numbers of labels ----------------------


class Named(Tagger):
    """Takes a dict, and gives its logits with their loss."""

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def ragged() -> Workload:
    """Sequences of 2 to 8 positions, every fourth of which has no label at its end."""
    items = []
    for number in range(NUM_EXAMPLES):
        inputs = draw(3, 2 + 5 * number % 7, seed=number, dtype=torch.float64)
        labels = (inputs.sum(dim=0) > 0).long() + (inputs[0] > 1)
        if number % 4 == 0:
            labels[-1] = -100
        items.append({"inputs": inputs, "labels": labels})

    def pad(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        inputs = pad_sequence([item["inputs"].T for item in some], batch_first=True)
        labels = pad_sequence([item["labels"] for item in some], True, -100)
        return {"inputs": inputs.transpose(1, 2), "labels": labels}

    return Workload(Named, items, items, collate=pad)


def loss_of_items(model: nn.Module, items: list[dict[str, Tensor]]) -> Callable[..., Tensor]:
    """The mean over all labels of some examples, one after another, by the flat weights."""
    units = prunable_parameters(model)

    def loss(weights_N: Tensor) -> Tensor:
        pieces = weights_N.split([unit.parameter.numel() for unit in units])
        pairs = zip(units, pieces, strict=True)
        replaced = {unit.name: piece.view_as(unit.parameter) for unit, piece in pairs}
        sums, number = [], 0
        for item in items:
            given = item["inputs"][None], item["labels"][None]
            found = functional_call(model, replaced, given)["logits"][0]
            sums.append(functional.cross_entropy(found.T, given[1][0], reduction="sum"))
            number += int((given[1] != -100).sum())
        return torch.stack(sums).sum() / number

    return loss


@pytest.mark.parametrize("name", ["taylor", "snip", "taylor_squared", "fisher", "grasp"])
def test_scores_of_dicts_are_those_of_their_labels_whatever_the_padding(name: str) -> None:
    model, workload, batches = in_float64(Named), ragged(), []
    by_sum = {float(item["inputs"].sum()): item for item in workload.train}

    def remember(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        sums = batch["inputs"].sum(dim=(1, 2)).tolist()
        batches.append([min(by_sum.items(), key=lambda pair: abs(pair[0] - s))[1] for s in sums])
        return batch

    scores = scores_of(model, replace(workload, augment=remember), config_of(name))
    weights_N = weights_of(model)

    def gradient_of(items: list[dict[str, Tensor]]) -> Tensor:
        return torch.func.grad(loss_of_items(model, items))(weights_N)

    counts = [int((item["labels"] != -100).sum()) for item in workload.train]
    if name == "taylor_squared":
        expected_N = sum((weights_N * gradient_of(items)).square() for items in batches)
    elif name == "fisher":
        parts = [
            count * gradient_of([item]).square()
            for count, item in zip(counts, workload.train, strict=True)
        ]
        expected_N = weights_N.square() * sum(parts) / sum(counts)
    else:
        whole_N = gradient_of(workload.train)
        expected_N = (weights_N * whole_N).abs()
        if name == "grasp":
            loss = loss_of_items(model, workload.train)
            hessian = torch.autograd.functional.hessian(loss, weights_N)
            expected_N = weights_N * (hessian @ whole_N)
    assert len(set(counts)) > 3
    assert_scores(scores, expected_N, rtol=1e-5)


@pytest.mark.parametrize("name", [*GRADIENT_CRITERIA, *LAYER_CRITERIA, *DATA_FREE_CRITERIA])
def test_a_dict_is_scored_as_the_pair_with_the_same_tensors(name: str) -> None:
    pairs = uneven("positions", NUM_EXAMPLES)

    def named(inputs: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

    dicts = replace(pairs, build_model=Named, train=named(*pairs.train), test=named(*pairs.test))
    expected = scores_of(in_float64(pairs.build_model), pairs, config_of(name))
    found = scores_of(in_float64(Named), dicts, config_of(name))
    # Of a pair, examples are vectorised for fisher.
    bound = 1e-6 if name == "fisher" else 0
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=bound, atol=0)


@pytest.mark.parametrize("lengths", ["alike", "as many in both halves"])
def test_a_shifted_loss_without_its_count_is_refused_whatever_the_lengths(lengths: str) -> None:
    """Both halves of the batch then have as many words by either count."""
    sizes = [6] * 8 if lengths == "alike" else [2, 9, 6, 5, 7, 8, 5, 2]
    items = [1 + torch.arange(size) % (NUM_WORDS - 1) for size in sizes]
    workload = replace(language_model(), train=items, test=items, count=None)
    words = (
        r"loss: .*; here count=lambda batch: \(batch\['labels'\]\[:, 1:\] != -100\)\.sum\(\) fits"
    )
    with pytest.raises(WorkloadError, match=words):
        check_workload(workload, built(Reader), 8)


def test_movement_gathered_from_dicts_is_that_of_pairs() -> None:
    training = {"epochs": 1, "batch_size": 10, "microbatches": 2}
    job = job_config(
        pretrain=training,
        finetune=training,
        prune={"criterion": "movement", "sparsity": 0.5, "rounds": 1},
    )
    pairs = replace(uneven("positions"), build_model=lambda: Tagger().double())

    def named(inputs: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
        return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

    dicts = Workload(lambda: Named().double(), named(*pairs.train), named(*pairs.test))
    one, other = (list(run_rounds(job, workload, Ranks()))[1] for workload in (pairs, dicts))
    assert one.masks.digest == other.masks.digest
    assert one.record.loss == other.record.loss
