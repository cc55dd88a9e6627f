"""Rounds that remove whole units: the same units, weights and figures however they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_program import reports_of_world
from unit_rounds import (
    CASES,
    case_of,
    checkpoint_of,
    few_program,
    rounds_of,
    unit_program,
    weights_in,
)

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.data import first_example

SAME = ("mask", "units", "widths", "macs", "score", "loss", "weights", "shapes", "stored", "masks")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Any]]]:
    return {name: rounds_of(name, Ranks()) for name in CASES}


@pytest.mark.parametrize(("world_size", "program"), [(2, unit_program), (4, few_program)])
def test_any_number_of_ranks_removes_the_same_units(
    alone: dict[str, list[dict[str, Any]]], world_size: int, program: Any, tmp_path: Path
) -> None:
    for report in reports_of_world(world_size, tmp_path, program):
        for (name, strategy, *resumed), rounds in report.items():
            expected = alone[name][2:] if resumed else alone[name]
            assert len(rounds) == len(expected)
            for wanted, found in zip(expected, rounds, strict=True):
                for key in SAME:
                    assert found[key] == wanted[key], f"{name} {strategy} {resumed} {key}"


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_trial_ends_as_an_uninterrupted_one(
    name: str, alone: dict[str, list[dict[str, Any]]]
) -> None:
    whole = alone[name]
    for number in range(len(whole) - 1):
        rest = rounds_of(name, Ranks(), resume=checkpoint_of(whole, number))
        for expected, found in zip(whole[number + 1 :], rest, strict=True):
            for key in (*SAME, "files"):
                assert found[key] == expected[key], f"{key} after round {number}"


@pytest.mark.parametrize("name", CASES)
def test_the_target_is_met_and_the_network_is_as_small_as_its_record_says(name: str) -> None:
    job, workload = case_of(name)
    for state in run_rounds(job, workload, Ranks()):
        cost = state.record.cost
        assert cost.units is not None
        is_cut = cost.units.is_compact
        counted = count_macs(state.model, first_example(workload).inputs)
        assert counted.total == (cost.units.macs if is_cut else cost.macs)
        weights = sum(parameter.numel() for parameter in state.model.parameters())
        assert weights == (cost.units.num_parameters if is_cut else cost.num_parameters)
        if is_cut and state.record.round:
            assert cost.units.difference is not None
            assert cost.units.difference <= 1e-5
    dense = {"macs": cost.macs, "parameters": cost.num_parameters, "sparsity": 1}
    kind = job.prune.target.kind or "sparsity"
    if kind != "sparsity":
        left = {"macs": cost.units.macs, "parameters": cost.units.num_parameters}[kind]
        assert left <= job.prune.target.value * dense[kind]
    else:
        kept = sum(width.num_kept for width in cost.units.widths)
        total = sum(width.num_units for width in cost.units.widths)
        assert total - kept == round(job.prune.sparsity * total)


def test_units_that_leave_and_units_kept_as_zeros_train_alike(
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    for cut, zeros in zip(alone["gate"], alone["zeros"], strict=True):
        assert cut["widths"] == zeros["widths"]
        assert cut["mask"] == zeros["mask"]
        assert cut["loss"] == pytest.approx(zeros["loss"], rel=1e-4)
        for name in zeros["shapes"]:
            tensor = weights_in(zeros)[name]
            torch.testing.assert_close(weights_in(cut)[name], tensor, rtol=1e-3, atol=1e-4)


def test_stored_weights_are_those_of_a_network_that_computes_the_same(
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    for name in ("gate", "heads"):
        job, workload = case_of(name)
        *_, last = run_rounds(job, workload, Ranks())
        model = workload.build_model()
        model.load_state_dict(weights_in(alone[name][-1]))
        inputs = first_example(workload).inputs
        with torch.no_grad():
            expected = model.eval()(inputs)
            found = last.model.eval()(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert sum(p.numel() for p in last.model.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
