"""Rounds that remove whole units: the same units, weights and figures however they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_program import reports_of_world
from safetensors.torch import load
from small_networks import images, job_config
from torch import Tensor, nn
from unit_rounds import (
    CASES,
    case_of,
    checkpoint_of,
    few_program,
    rounds_of,
    unit_program,
    weights_in,
)

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checkpoint import Checkpoint
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import RoundState, run_rounds
from gbp_ray.pruning.whole_units import WholeUnits
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import first_example

SAME = ("mask", "units", "widths", "macs", "score", "loss", "weights", "shapes", "stored", "masks")


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Any]]]:
    return {name: rounds_of(name, Ranks(), with_model=True) for name in CASES}


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
def test_the_target_is_met_and_the_network_is_as_small_as_its_record_says(
    name: str, alone: dict[str, list[dict[str, Any]]]
) -> None:
    job, workload = case_of(name)
    for number, report in enumerate(alone[name]):
        cost, model = report["cost"], report["model"]
        assert cost.units is not None
        is_cut = cost.units.is_compact
        counted = count_macs(model, first_example(workload).inputs)
        assert counted.total == (cost.units.macs if is_cut else cost.macs)
        weights = sum(parameter.numel() for parameter in model.parameters())
        assert weights == (cost.units.num_parameters if is_cut else cost.num_parameters)
        if is_cut and number:
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


def test_layers_that_are_alike_keep_equal_widths_in_every_round(
    alone: dict[str, list[dict[str, Any]]],
) -> None:
    dense, first, last = (
        {width.num_kept for width in report["cost"].units.widths} for report in alone["uniform"]
    )
    assert {len(dense), len(first), len(last)} == {1}
    assert dense == {20}
    assert min(dense) > min(first) > min(last)


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
        _, workload = case_of(name)
        last = alone[name][-1]["model"]
        model = workload.build_model()
        model.load_state_dict(weights_in(alone[name][-1]))
        inputs = first_example(workload).inputs
        with torch.no_grad():
            expected = model.eval()(inputs)
            found = last.eval()(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert sum(p.numel() for p in last.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


class Tied(nn.Module):
    """Two blocks on a stream that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.up2, self.down2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.up2.weight, self.down2.weight = self.up.weight, self.down.weight
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs.transpose(1, 2).flatten(2)).mean(1)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        return self.head(hidden + self.down2(torch.relu(self.up2(hidden))))


def tied_job(finetune: dict[str, Any] | None = None, **prune: Any) -> tuple[JobConfig, Workload]:
    fields = {"granularity": "channel", "rounds": 2, "target": {"macs": 0.5}, "sparsity": 0.0}
    job = job_config(
        pretrain={"epochs": 1, "batch_size": 12},
        prune={**fields, "criterion": "magnitude", **prune},
        finetune={"epochs": 1, "batch_size": 12, **(finetune or {})},
    )
    return job, images(Tied)


def test_tied_weights_are_rewound_in_a_network_that_has_lost_units() -> None:
    job, workload = tied_job(rewind="weights", finetune={"epochs": 0})
    dense, *_, last = [
        (MaskSet(state.masks.masks), weights_of(state))
        for state in run_rounds(job, workload, Ranks())
    ]
    masks, stored = last
    for name, mask in masks.items():
        torch.testing.assert_close(stored[name], dense[1][name] * mask, rtol=0, atol=0)
    assert masks.num_pruned


def weights_of(state: RoundState) -> dict[str, Tensor]:
    return load(state.to_files()["weights.safetensors"])


def test_globs_exclude_by_any_name_of_a_tied_weight_and_match_something() -> None:
    job, workload = tied_job(exclude=("up2.weight",))
    with pytest.raises(ConfigError, match="no such units that can go"):
        check_job(job, workload)  # every unit of this network lies in it
    job, workload = tied_job(exclude=("upp.weight",))
    with pytest.raises(ConfigError, match=r"exclude = 'upp\.weight': matches no parameter, did"):
        check_job(job, workload)


def test_movement_of_units_needs_no_biases_that_move() -> None:
    job, workload = tied_job(criterion="movement", finetune={"freeze": ("*.bias",)})
    check_job(job, workload)
    assert len(list(run_rounds(job, workload, Ranks()))) == 3
    job, workload = tied_job(criterion="movement", finetune={"freeze": ("down.weight",)})
    with pytest.raises(ConfigError, match=r"'down\.weight' is frozen"):
        check_job(job, workload)


def test_units_of_initial_masks_leave_before_the_first_decision(
    alone: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    begun = MaskSet.from_bytes(alone["gate"][1]["masks"])
    (tmp_path / "masks.safetensors").write_bytes(begun.to_bytes())
    given = {"initial_masks": str(tmp_path / "masks.safetensors"), "target": {"macs": 0.4}}
    job, workload = case_of("gate", **given)
    dense, *rest = run_rounds(job, workload, Ranks())
    assert dense.masks == begun
    assert (dense.masks.criterion, dense.masks.parent) == ("taylor_squared", begun.digest)
    assert dense.record.cost.units is not None
    assert not dense.record.cost.units.is_compact, "they are zeros in the network of round 0"
    assert all(s.record.cost.units and s.record.cost.units.is_compact for s in rest)


def test_a_resumed_trial_with_initial_masks_decides_on_the_network_it_would_have(
    alone: dict[str, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masks.safetensors").write_bytes(alone["gate"][1]["masks"])
    given = {"initial_masks": str(tmp_path / "masks.safetensors"), "target": {"macs": 0.3}}
    job, workload = case_of("gate", **given)
    scored: list[int] = []
    score = WholeUnits.score

    def watched(self: WholeUnits, model: nn.Module, *given: Any) -> Any:
        scored.append(sum(parameter.numel() for parameter in model.parameters()))
        return score(self, model, *given)

    monkeypatch.setattr(WholeUnits, "score", watched)
    saved = None
    for state in run_rounds(job, workload, Ranks()):
        files = state.to_files()
        saved = saved or Checkpoint(
            0, files["masks.safetensors"], files["weights.safetensors"], files["state.pt"]
        )
    whole, scored[:] = list(scored), []
    list(run_rounds(job, workload, Ranks(), resume=saved))
    assert scored == whole
    assert state.record.cost.num_parameters > whole[0] > whole[1]


FEATURES = {"weight": 0.5, "features": ["1"]}
FIXED = {"layer_max_sparsity": {"0.*": 0.0}}


@pytest.mark.parametrize("kept", [{"compact": False}, FIXED, {"exclude": ["0.weight"]}])
def test_features_of_a_teacher_are_those_of_layers_that_keep_their_width(
    kept: dict[str, Any],
) -> None:
    workload = images(wide_net)
    fields = {"criterion": "taylor", "granularity": "channel", "rounds": 1, "sparsity": 0.5}
    taught = {"epochs": 1, "distillation": FEATURES}
    with pytest.raises(ConfigError, match=r"features = '1': its outputs become narrower"):
        check_job(job_config(prune=fields, finetune=taught), workload)
    job = job_config(prune=fields | kept, finetune=taught)
    check_job(job, workload)
    *_, last = run_rounds(job, workload, Ranks())
    assert last.record.cost.num_nonzero < last.record.cost.num_parameters


def wide_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
