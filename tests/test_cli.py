"""The command line: exit codes, one line per error, JSON alone on standard output."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

QUICK = {
    "cluster.num_workers": 0,
    "pretrain.epochs": 0.5,
    "finetune.epochs": 0.2,
    "prune.rounds": 2,
    "prune.calibration_examples": 64,
    "prune.batchnorm_examples": 64,
}

BAD_WORKLOADS = """
import torch
from torch import nn
from gbp_ray import Workload


def make(num_train=8, top_label=1, width=4):
    inputs, targets = torch.rand(num_train, 4), torch.arange(num_train) % (top_label + 1)
    test = (torch.rand(8, 4), torch.zeros(8, dtype=torch.long))
    return Workload(lambda: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)),
                    (inputs, targets), test)
"""


def run(folder: Path, *words: str, **settings: object) -> subprocess.CompletedProcess[str]:
    pairs = [f"--set={key}={value}" for key, value in settings.items()]
    return subprocess.run(
        [sys.executable, "-m", "gbp_ray", *words, *pairs],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, object]]:
    """A folder with one finished quick job, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("finished")
    done = run(folder, "prune", "--json", **QUICK)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def error_of(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.stderr.splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    return errors[0]


def test_prune_prints_one_json_object_and_progress_elsewhere(finished) -> None:
    folder, printed = finished
    assert printed["rounds"][-1]["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert Path(printed["folder"]).parent == folder / "gbp-results" / "digits" / "trials"


def test_a_finished_job_answers_at_once_with_a_table(finished) -> None:
    folder, printed = finished
    again = run(folder, "prune", **QUICK)
    assert again.returncode == 0
    assert printed["trial_id"] in again.stdout
    assert "pretrain" not in again.stderr
    accuracy = printed["rounds"][-1]["accuracy"]
    assert f"{accuracy:.2%}" in again.stdout


def test_show_lists_a_trial_and_then_a_job_of_two(finished, tmp_path) -> None:
    folder, printed = finished
    shown = run(folder, "show", "gbp-results/digits", "--json")
    assert json.loads(shown.stdout)["trial_id"] == printed["trial_id"]
    assert "conv1.weight" in run(folder, "show", printed["folder"]).stdout
    shutil.copytree(folder / "gbp-results", tmp_path / "gbp-results")
    other = tmp_path / "gbp-results" / "digits" / "trials" / "unfinished"
    shutil.copytree(tmp_path / Path(printed["folder"]).relative_to(folder), other)
    (other / "trial.json").unlink()
    listed = json.loads(run(tmp_path, "show", "gbp-results/digits", "--json").stdout)
    assert {row["trial"]: row["finished"] for row in listed["trials"]} == {
        printed["trial_id"]: True,
        "unfinished": False,
    }
    assert "run the same job again" in run(tmp_path, "show", str(other)).stdout


@pytest.mark.parametrize("verb", ["criteria", "fields"])
def test_lists_are_also_json(verb: str, tmp_path) -> None:
    assert len(json.loads(run(tmp_path, verb, "--json").stdout)[verb]) >= 10
    assert "sparsity" in run(tmp_path, "fields", "prune").stdout


@pytest.mark.parametrize("words", [(), ("prune",), ("show",), ("criteria",), ("fields",)])
def test_help_teaches(words: tuple[str, ...], tmp_path) -> None:
    shown = run(tmp_path, *words, "--help")
    assert shown.returncode == 0
    assert "Usage" in shown.stdout
    if words == ("prune",):
        assert "--set prune.sparsity=0.95" in shown.stdout


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prune.sparsty": 0.5}, "prune.sparsty: no such key, did you mean 'sparsity'?"),
        ({"prune.schedule": "linaer"}, "did you mean 'linear'?"),
        ({"prune.criterion": "tailor"}, "did you mean 'taylor'?"),
        ({"prune.sparsity": 1.0}, "prune.sparsity = 1.0"),
        ({"prune.sparsity": -0.1}, "prune.sparsity = -0.1"),
        ({"prune.granularity": "'2:4'", "prune.sparsity": 0.5}, "'conv1.weight' has 1"),
        ({"workload.factory": "gbp_ray.zoo:digits_convne"}, "did you mean 'digits_convnet'?"),
        ({"workload.options.widht": 3}, "workload.options.widht"),
        ({"pretrain.learning_rate": 1e30}, "pretrain.learning_rate"),
        ({"storage": "/proc/nowhere"}, "storage: cannot write"),
        ({"storage": "s3://bucket/x"}, "storage = 's3://bucket/x'"),
        ({"workload.factory": "bad:make", "workload.options.num_train": 0}, "no examples"),
        ({"workload.factory": "bad:make", "workload.options.top_label": 6}, "labels run from 0 to"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_no_round(settings, says, tmp_path) -> None:
    (tmp_path / "bad.py").write_text(BAD_WORKLOADS)
    done = run(tmp_path, "prune", **(QUICK | settings))
    assert says in error_of(done)
    assert list(tmp_path.rglob("round.json")) == []


@pytest.mark.parametrize("words", [("prune", "none.toml"), ("show", "nowhere"), ("prun",)])
def test_what_is_not_there_is_said(words: tuple[str, ...], tmp_path) -> None:
    assert words[-1] in error_of(run(tmp_path, *words))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"not a checkpoint")
    done = run(
        tmp_path,
        "prune",
        **QUICK,
        **{
            "workload.factory": "gbp_ray.zoo:cifar10_resnet20",
            "workload.options.data": "nowhere",
            "workload.options.checkpoint": "weights.safetensors",
        },
    )
    assert "workload.options." in error_of(done)


def test_the_folder_of_another_job_is_refused(finished, tmp_path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "gbp-results", tmp_path / "gbp-results")
    (tmp_path / "bad.py").write_text(BAD_WORKLOADS)
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, "prune", **QUICK, **{"workload.factory": "bad:make"})
    assert "holds results of another job" in error_of(done)
    assert [path for path in sorted(tmp_path.rglob("*")) if "pycache" not in str(path)] == before


@pytest.mark.parametrize("name", ["weights.safetensors", "masks.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_stops_the_job_that_would_go_on_from_it(
    name: str, damage: str, finished, tmp_path
) -> None:
    folder, printed = finished
    shutil.copytree(folder / "gbp-results", tmp_path / "gbp-results")
    trial = tmp_path / Path(printed["folder"]).relative_to(folder)
    (trial / "trial.json").unlink()
    shutil.rmtree(trial / "round_002")
    data = bytearray((trial / "round_001" / name).read_bytes())
    if damage == "cut":
        del data[-9:]
    else:
        data[len(data) // 2] ^= 1
    (trial / "round_001" / name).write_bytes(data)
    done = run(tmp_path, "prune", **QUICK)
    assert f"round_001/{name}" in error_of(done)


def test_ctrl_c_is_130_and_the_job_goes_on_to_the_same_end(finished, tmp_path) -> None:
    _, printed = finished
    pairs = [f"--set={key}={value}" for key, value in QUICK.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "gbp_ray", "prune", *pairs],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "pretrain" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1].startswith("error: stopped")
    again = run(tmp_path, "prune", "--json", **QUICK)
    ends = [json.loads(again.stdout)["rounds"][-1], printed["rounds"][-1]]
    assert ends[0]["mask_digest"] == ends[1]["mask_digest"]


@pytest.mark.slow
def test_a_killed_process_ends_with_the_same_mask_when_run_again(finished, tmp_path) -> None:
    _, printed = finished
    pairs = [f"--set={key}={value}" for key, value in QUICK.items()]
    for number, delay_s in enumerate((3.0, 4.5, 6.0)):
        job = [sys.executable, "-m", "gbp_ray", "prune", "--json", *pairs, f"--set=name=k{number}"]
        process = subprocess.Popen(
            job, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay_s)
        process.kill()
        process.wait()
        again = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True)
        assert (
            json.loads(again.stdout)["rounds"][-1]["mask_digest"]
            == (printed["rounds"][-1]["mask_digest"])
        )
