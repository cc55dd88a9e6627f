"""What the first program of a submitted job finds on the head."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from user_files import USER_JOB

import gbp_ray
from gbp_ray.config.job import load_job
from gbp_ray.results.store import Store
from gbp_ray.runtime import bootstrap
from gbp_ray.runtime.submission import PYTHONS

FACTS = {
    "version": gbp_ray.__version__,
    "pythons": list(PYTHONS),
    "modules": ["ray", "torch", "gbp_ray"],
    "job": "job.toml",
    "arguments": ["fields", "cluster", "--json"],
}


def run(folder: Path, **facts: Any) -> subprocess.CompletedProcess[str]:
    program = folder / ".gbp-ray-bootstrap.py"
    shutil.copy(bootstrap.__file__, program)
    (folder / "job.toml").write_text(f'storage = "results"\n{USER_JOB}')
    (folder / bootstrap.FACTS).write_text(json.dumps(FACTS | facts))
    return subprocess.run([sys.executable, program], cwd=folder, capture_output=True, text=True)


def test_a_job_runs_as_on_the_command_line_with_its_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fields"][0]["field"] == "[cluster]"
    failed = run(tmp_path, arguments=["prune", "nowhere.toml"])
    assert failed.returncode == 2
    assert failed.stderr == (
        "error: job file 'nowhere.toml' does not exist; give the path of a TOML file\n"
    )


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"pythons": ["2.7"]}, "is Python 3.1"),
        ({"modules": ["ray", "no_such", "nor_this"]}, "lacks no_such, nor_this; install"),
        ({"version": "9.9"}, f"has gbp-ray {gbp_ray.__version__}, and 9.9 submitted the job"),
    ],
)
def test_what_is_amiss_with_the_head_is_one_line(
    tmp_path: Path, facts: dict[str, Any], expected: str
) -> None:
    done = run(tmp_path, **facts)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the head's python (")
    assert expected in line


def test_a_folder_of_another_job_is_refused_before_torch_is_there(tmp_path: Path) -> None:
    Store(tmp_path / "results", "rings").claim(load_job())
    done = run(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match("error: storage: '.*results/rings' holds results of another job", line)
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_path('.gbp-ray-bootstrap.py', run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("ray", "has no Ray; start Ray from an activated environment"),
        ("gbp_ray", "has no gbp_ray; install gbp-ray 0.1.0 on every node, or submit without"),
    ],
)
def test_what_is_missing_altogether_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, missing: str, expected: str
) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda name: name != missing or None)
    fault = bootstrap.find_fault(FACTS | {"version": "0.1.0"})
    assert fault is not None
    assert expected in fault
