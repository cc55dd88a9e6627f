"""What is printed: only text, only results on standard output, and on every kind of terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sample_results import sample_job, write_trial
from shell import Shell

from gbp_ray.cli.terminal import console, note, print_csv, progress_printer, say, write_log
from gbp_ray.config.job import load_job
from gbp_ray.results.store import Store
from gbp_ray.training.progress import Progress

HOSTILE = "[red]a[/] [/] :smile: \x1b[31m\r\n\u202e\udcff"
SHOWN = r"[red]a[/] [/] :smile: \x1b[31m\r\n\u202e\udcff"

MODULE = """
import os
import subprocess
import sys
import torch
from torch import nn
from gbp_ray import Workload

print("at import")

class Net(nn.Sequential):
    def forward(self, inputs):
        print("in forward")
        return super().forward(inputs)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, index):
        print("in an item")
        return torch.eye(4)[index % 4], index % 4

def make():
    print("in the factory")
    os.system("echo from another process")
    os.write(1, b"past Python")
    return Workload(lambda: Net(nn.Linear(4, 4)), Data(), Data())
"""

JOB = """
name = "loud"
[workload]
factory = "loud:make"
[prune]
criterion = "magnitude"
sparsity = 0.5
[cluster]
num_workers = 0
"""


def test_names_steer_nothing_wherever_they_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table(box=SIMPLE_HEAD, title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    say(HOSTILE)
    note(HOSTILE)
    progress_printer(is_quiet=False)(Progress(HOSTILE, 1, 2))
    shown, errors = capsys.readouterr()
    assert shown == f"{SHOWN}\n"
    assert errors == f"{SHOWN}\n{SHOWN}\n"
    monkeypatch.delenv("FORCE_COLOR")
    console().print(table)
    shown, _ = capsys.readouterr()
    assert shown.count(SHOWN) == 3


def test_a_log_of_another_machine_keeps_its_lines_and_steers_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\x1b[36m(worker)\x1b[0m 1\t2\r\n50 %\r60 %\n\x1b[2J\x1b]0;title\x07\u202e\ndone\n"
    shown = "(worker) 1\t2\n50 %\n60 %\n\\x1b[2J\\x1b]0;title\\x07\\u202e\ndone\n"
    write_log(text)
    write_log(text, to_errors=True)
    assert capsys.readouterr() == (shown, shown)


def test_no_cell_of_a_csv_is_a_formula(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1", "a=1", ""]
    print_csv([{"=a": text, "number": -1.5, "whole": -2} for text in texts])
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "'=a,number,whole"
    assert [line.split(",")[0].strip('"') for line in lines[1:9]] == [
        *(f"'{text}" for text in texts[:6]),
        *texts[6:],
    ]
    assert all(line.endswith(",-1.5,-2") for line in lines[1:9])


def test_a_storage_of_formulas_lists_as_text(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "[red]x[/]"
    job = load_job(sample_job(), {"workload.options": {"name": "=cmd()", "size": -3}})
    write_trial(Store(str(folder), "samples"), job)
    out = shell("results", str(folder), "--csv", "--rounds").out
    assert "'=cmd()" in out
    assert ",=cmd()" not in out
    assert ",-3," in out


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loud")
    (folder / "loud.py").write_text(MODULE)
    (folder / "job.toml").write_text(JOB)
    return folder


def test_results_have_standard_output_to_themselves_on_any_terminal(loud: Path) -> None:
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "TERM": "dumb",
        "COLUMNS": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "gbp_ray", *arguments]
        done = subprocess.run(command, cwd=loud, env=environment, capture_output=True)
        errors = done.stderr.decode("ascii")
        assert done.returncode == 0, errors
        return done.stdout.decode("ascii"), errors

    out, errors = run("prune", "job.toml", "--set=storage=größe", "--json")
    uri = json.loads(out)["uri"]
    assert "größe" in uri
    for text in ("at import", "in the factory", "in forward", "in an item", "past Python"):
        assert text in errors
    assert "from another process" in errors
    out, _ = run("index", "größe")
    assert r"gr\xf6\xdfe" in out
