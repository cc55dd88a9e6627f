"""Sweeps as a user meets them, as far as no Ray is needed: answers, tables, refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shell import Outcome, Shell

from gbp_ray.config.job import expand, load_job, trial_id
from gbp_ray.errors import ConfigError, TrialError
from gbp_ray.results.query import summarize
from gbp_ray.results.store import Store
from gbp_ray.runtime import api, search
from gbp_ray.runtime.trial import run_solo

JOB = """
name = "tiny"
workload = { factory = "gbp_ray.zoo:digits_convnet", options = { width = 4 } }
pretrain.epochs = 0.3
finetune.epochs = 0.2
cluster.num_workers = 1
prune = { rounds = 1, calibration_examples = 64, batchnorm_examples = 64 }

[sweep.space]
prune.criterion = ["taylor", "fisher"]
prune.sparsity = [0.5, 0.9]
seed = [0, 1]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, all of whose trials have ended."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "job.toml").write_text(JOB)
    for job in expand(load_job(folder / "job.toml", {"storage": str(folder / "results")})):
        Store(job.storage, job.name).claim(job)
        for _ in run_solo(job):
            pass
    return folder


Run = Callable[..., Outcome]


@pytest.fixture
def run(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `gbp-ray sweep job.toml` in a folder, with results of its own."""

    def sweep(folder: Path, *arguments: str) -> Outcome:
        monkeypatch.chdir(folder)
        return shell("sweep", "job.toml", *arguments, f"--set=storage={folder / 'results'}")

    return sweep


def test_a_finished_sweep_answers_with_one_line_per_criterion_and_sparsity(
    run: Run, finished: Path
) -> None:
    done = run(finished)
    assert done.code == 0, done.err
    assert done.err == ""
    lines = [line.split() for line in done.out.splitlines() if "%" in line]
    assert sorted(word for line in lines for word in line if word.isalpha()) == (
        ["fisher"] * 2 + ["taylor"] * 2
    )
    assert "8 trials: 8 finished, 0 stopped, 0 failed; 0 of them now" in done.out


def test_json_is_one_object_with_means_over_the_seeds(run: Run, finished: Path) -> None:
    done = run(finished, "--json")
    told = json.loads(done.out)
    assert (told["num_finished"], told["num_new"], told["worker_seconds"]) == (8, 0, 0)
    assert len(told["summary"]) == 4
    accuracies = {
        (row["prune.criterion"], row["prune.sparsity"], row["seed"]): row["accuracy"]
        for row in api.open_results(finished / "results").final().to_rows()
    }
    for line in told["summary"]:
        one, two = (accuracies[line["prune.criterion"], line["prune.sparsity"], s] for s in (0, 1))
        assert line["num_seeds"] == 2
        assert line["accuracy"] == pytest.approx((one + two) / 2)
        assert line["accuracy_deviation"] == pytest.approx(abs(one - two) / 2**0.5)


@pytest.mark.usefixtures("without_ray")
def test_a_finished_sweep_never_starts_ray(finished: Path) -> None:
    result = api.sweep(finished / "job.toml", {"storage": str(finished / "results")})
    assert (result.num_new, len(result.finished)) == (0, 16)


def test_a_search_that_has_ended_answers_from_its_trials(run: Run, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB.split("[sweep.space]")[0])
    target = ["target.max_drop=0.9", "target.highest=0.4", "target.tolerance=0.1"]
    settings = [f"sweep.{text}" for text in target]
    # A network that has learned nothing has nothing to lose, and would give no answer.
    settings += ["pretrain.epochs=3"]
    settings += ["prune.criterion=taylor", f"storage={tmp_path / 'results'}"]
    # With so much to lose, all of its trials are within the target: 0.2 and then 0.3 and 0.4.
    for sparsity in (0.2, 0.3, 0.4):
        job = load_job(tmp_path / "job.toml", [*settings, f"prune.sparsity={sparsity}"])
        one = job.model_copy(update={"sweep": load_job().sweep})
        Store(one.storage, one.name).claim(one)
        list(run_solo(one))
    done = run(tmp_path, "--json", *(f"--set={text}" for text in settings))
    assert done.code == 0, done.err
    (answer,) = json.loads(done.out)["answers"]
    assert (answer["sparsity"], answer["is_highest"], answer["num_trials"]) == (0.4, True, 3)
    assert (
        "the highest that was asked for"
        in run(tmp_path, *(f"--set={text}" for text in settings)).out
    )


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sweep.space.prune.sparsity=[0.5, 1.5]", "sweep.space: 4 of 8 trials are refused"),
        ("sweep.scheduler=fast", "sweep.scheduler = 'fast': not allowed"),
        ("sweep.space.prune.exclude=[['nothing.*']]", "matches no parameter"),
    ],
)
def test_what_no_trial_could_do_is_refused_in_one_line(
    run: Run, finished: Path, setting: str, expected: str
) -> None:
    done = run(finished, "--set", setting)
    assert done.code == 2
    assert done.out == ""
    assert expected in done.err.splitlines()[-1]


def test_if_all_trials_failed_so_has_the_sweep() -> None:
    job = load_job()
    failed = search.Outcome(trial_id(job), job, "failed", cause="out of luck")
    with pytest.raises(TrialError, match=r"all 2 trials failed.*out of luck") as caught:
        api._refuse_failure_of_all([failed, failed])
    assert caught.value.exit_code == 1
    api._refuse_failure_of_all([failed, search.Outcome("b", job, "finished")])
    api._refuse_failure_of_all([])


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    job = load_job(None, {"sweep.loggers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"pip install 'gbp-ray\[wandb\]'"):
        search.check_extras(job)
    search.check_extras(load_job())


def test_a_prune_of_a_sweeps_job_says_what_it_leaves_out(finished: Path) -> None:
    settings = {"storage": str(finished / "results"), "prune.sparsity": 0.9}
    with pytest.warns(UserWarning, match="sweep has no effect on a single prune"):
        result = api.prune(finished / "job.toml", settings, is_quiet=True)
    # It is the trial of the sweep itself.
    assert result.record.trial_id.startswith("taylor-s0.90")
    assert result.record.num_workers == 1
    assert "sweep" not in result.record.model_dump(mode="json")["job"]


def test_a_job_may_come_through_a_pipe(shell: Shell, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    job = JOB.partition("[sweep")[0].replace(
        "{ rounds", '{ criterion = "obd", sparsity = 0.9, rounds'
    )
    os.write(writing, job.encode())
    os.close(writing)
    storage = f"--set=storage={tmp_path}"
    planned = shell("prune", f"/dev/fd/{reading}", "--dry-run", "--json", storage)
    os.close(reading)
    assert planned.code == 0
    assert json.loads(planned.out)["trial_id"].startswith("obd-s0.90-r1-")


def test_rows_are_taken_together_whatever_the_seed() -> None:
    def row(seed: int, criterion: str, accuracy: float, sparsity: float = 0.5) -> dict[str, Any]:
        measured = {"loss": 1.0, "macs_nonzero": 10, "num_nonzero": 5, "sparsity": sparsity}
        return {"seed": seed, "prune.criterion": criterion, "accuracy": accuracy} | measured

    rows = [row(0, "a", 0.7), row(1, "b", 0.9), row(1, "a", 0.9), row(0, "c", 0.5, 0.4)]
    lines = summarize(rows, ["prune.criterion", "seed"])
    assert [(line["prune.criterion"], line["num_seeds"]) for line in lines] == [
        ("c", 1),
        ("b", 1),
        ("a", 2),
    ]
    assert lines[2]["accuracy"] == pytest.approx(0.8)
    assert lines[2]["accuracy_deviation"] == pytest.approx(0.2 / 2**0.5)
    assert lines[0]["accuracy_deviation"] is None


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("without_ray")
def test_a_dry_run_tells_what_is_done_and_starts_nothing(run: Run, finished: Path) -> None:
    before = files_in(finished)
    done = run(finished, "--dry-run")
    assert done.code == 0, done.err
    assert "trials: 8, of which 8 are finished and are skipped" in done.out
    assert "nothing would be run" in done.out

    # A third seed and a third criterion: 12 + 3 * 2 trials, 8 of them there.
    space = [
        "sweep.space.seed=[0, 1, 2]",
        "sweep.space.prune.criterion=['taylor', 'fisher', 'obd']",
    ]
    other = run(finished, "--dry-run", "--json", *(f"--set={text}" for text in space))
    assert (other.code, other.err) == (0, "")
    planned = json.loads(other.out)
    counted = ("num_trials", "num_finished", "num_left", "num_begun", "num_unplanned")
    assert [planned[name] for name in counted] == [18, 8, 10, 0, 0]
    # The dense networks of the first two seeds are there.
    assert planned["num_dense"] == 1
    by_kind = {kind["name"]: kind["num_trials"] for kind in planned["kinds"]}
    assert by_kind == {"taylor": 2, "fisher": 2, "obd": 6}
    assert planned["seconds_left"] > 0
    assert files_in(finished) == before


def test_a_dry_run_foretells_what_the_trials_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)
    # A network whose weights outweigh the headers of its files, which are not foretold.
    settings = {"sweep.space.seed": [0], "workload.options": {"width": 16}, "prune.rounds": 2}
    planned = api.plan_sweep("job.toml", settings)
    jobs = expand(load_job("job.toml", settings))
    assert planned.num_left == len(jobs) == 4
    for job in jobs:
        Store(job.storage, job.name).claim(job)
        for _ in run_solo(job):
            pass
    folder = tmp_path / "gbp-results" / "tiny"
    stored = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".pt"))
    assert planned.stored_bytes <= stored < 1.15 * planned.stored_bytes


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"cluster.use_gpu": True}, "cluster.use_gpu = true: none of the cluster's 1 machine has"),
        ({"cluster.cpus_per_worker": 1e-4}, "memory of this machine: "),
    ],
)
def test_a_dry_run_says_what_would_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (misfit,) = api.plan_sweep("job.toml", settings).misfits
    assert part in misfit


def test_a_dry_run_of_a_search_tells_how_many_halvings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(JOB.partition("prune.sparsity = [")[0])
    # 0 to 0.99 in hundredths: seven halvings for each of two criteria.
    planned = api.plan_sweep("job.toml", {"sweep.target.max_drop": 0.01})
    assert (planned.num_trials, planned.num_left, planned.is_estimate) == (14, 14, True)
