"""The dry run: what a job would cost and do, told without doing it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import Shell
from user_files import files_of_a_user

from gbp_ray.errors import GbpError
from gbp_ray.runtime.api import plan_prune, prune


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a user, with a module and a job file."""
    monkeypatch.chdir(tmp_path)
    with files_of_a_user(tmp_path, monkeypatch):
        yield tmp_path


def plan_of(shell: Shell, *arguments: str) -> str:
    code, out, errors = shell("prune", "job.toml", "--dry-run", *arguments)
    assert code == 0, errors
    return out


def files_in(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.usefixtures("without_ray")
def test_a_dry_run_writes_nothing_and_starts_no_ray(shell: Shell, folder: Path) -> None:
    before = files_in(folder)
    arguments = ["prune", "job.toml", "--dry-run", "--json", "--set", "cluster.num_workers=2"]
    code, out, errors = shell(*arguments)
    assert (code, errors) == (0, "")
    planned = json.loads(out)
    assert planned["plan"]["num_workers"] == 2
    assert planned["plan"]["sent_bytes_per_round"] > 0
    assert files_in(folder) == before


def test_a_refit_and_one_training_at_the_end_are_told(shell: Shell, folder: Path) -> None:
    changes = ("prune.criterion=magnitude", "prune.reconstruct=least_squares", "finetune.epochs=1")
    settings = [f"--set={text}" for text in (*changes, "finetune.after=last")]
    text = " ".join(plan_of(shell, *settings).split())
    assert "scoring: magnitude, no pass over the data" in text
    assert "reconstruction: a pass of both networks over 100 examples each round" in text
    assert "then 6 after the last of 2 rounds" in text


def test_json_and_text_tell_the_same(shell: Shell, folder: Path) -> None:
    planned = json.loads(plan_of(shell, "--json"))
    plan = planned["plan"]
    assert planned["trial_id"].startswith("taylor-s0.50-r2-")
    assert (planned["finished"], planned["rounds_done"], planned["rounds_left"]) == (False, 0, 3)
    assert (plan["num_passes"], plan["calibration_examples"]) == (1, 100)
    # 300 training points: 6 steps an epoch, 3 epochs, then half an epoch in each of two rounds.
    assert (plan["pretrain_steps"], plan["finetune_steps"], plan["num_steps"]) == (18, 3, 24)
    assert plan["peak_bytes"] == max(phase["num_bytes"] for phase in plan["phases"])
    text = plan_of(shell)
    for phase in plan["phases"]:
        assert phase["num_bytes"] == sum(phase["held"].values())
        assert f" {phase['name']} " in text
    assert "18 steps, then 3 after each of 2 rounds, 24 in all" in text
    assert "1 pass over 100 examples each round" in text
    assert "nothing yet; 3 of 3 rounds would be run" in text
    assert planned["uri"] in text


def test_what_is_done_already_is_told(shell: Shell, folder: Path) -> None:
    trial = Path(prune("job.toml", is_quiet=True).uri)
    finished = plan_prune("job.toml")
    assert (finished.num_done, finished.num_left, finished.plan) == (3, 0, None)
    assert "finished: all 3 rounds are in" in plan_of(shell)
    assert json.loads(plan_of(shell, "--json"))["plan"] is None
    (trial / "trial.json").unlink()
    shutil.rmtree(trial / "round_002")
    broken = plan_prune("job.toml")
    assert (broken.num_done, broken.num_left) == (2, 1)
    assert "round 1 is the last whole one, what comes before is skipped; 1 of 3 rounds" in plan_of(
        shell
    )


BAD_INPUTS: list[dict[str, Any]] = [
    {"prune.sparsity": 1.5},
    {"prune.criterion": "tailor"},
    {"workload.factory": "nowhere_at_all:rings"},
    {"workload.options.example": 3},
    {"workload.factory": "rings_of_a_user:cursed"},
    {"prune.exclude": ["conv*"]},
    {"prune.granularity": "2:4"},
    {"prune.layer_max_sparsity": {"0.*": 0.1}, "prune.sparsity": 0.9},
    {"workload.options.top": 7},
    {"cluster.use_gpu": True},
    {"storage": "gs://bucket"},
]


@pytest.mark.parametrize("overrides", BAD_INPUTS, ids=lambda overrides: next(iter(overrides)))
def test_bad_input_ends_as_it_would_in_earnest(folder: Path, overrides: dict[str, Any]) -> None:
    if "cluster.use_gpu" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(GbpError) as planned:
        plan_prune("job.toml", overrides)
    assert not (folder / "gbp-results").exists()
    with pytest.raises(GbpError) as pruned:
        prune("job.toml", overrides, is_quiet=True)
    assert (type(planned.value), str(planned.value)) == (type(pruned.value), str(pruned.value))


def test_a_folder_of_another_job_is_refused(folder: Path) -> None:
    prune("job.toml", is_quiet=True)
    other = {"workload.factory": "gbp_ray.zoo:digits_convnet"}
    with pytest.raises(GbpError, match="holds results of another job") as planned:
        plan_prune("job.toml", other)
    with pytest.raises(GbpError) as pruned:
        prune("job.toml", other, is_quiet=True)
    assert str(planned.value) == str(pruned.value)


def test_a_folder_that_is_not_ours_is_refused(folder: Path) -> None:
    (folder / "gbp-results" / "rings").mkdir(parents=True)
    (folder / "gbp-results" / "rings" / "thesis.tex").write_text("")
    with pytest.raises(GbpError, match="is not empty and not a results folder"):
        plan_prune("job.toml")
