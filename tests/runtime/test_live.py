"""Jobs of objects in this process: the bits of a named job, never the results of another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import TanhNet, built, draw
from torch import nn
from torch.nn import functional

import gbp_ray
from gbp_ray.config.job import load_job
from gbp_ray.errors import ConfigError, GbpError, StoreError
from gbp_ray.runtime.live import load_live_job
from gbp_ray.workloads import code

JOB = {
    "prune.criterion": "taylor",
    "prune.sparsity": 0.5,
    "prune.rounds": 2,
    "finetune.epochs": 1,
    "finetune.batch_size": 10,
}

MODULE = """
import torch
from torch import nn
import gbp_ray

def spirals(examples: int = 40) -> gbp_ray.Workload:
    inputs = torch.randn(examples, 3, generator=torch.Generator().manual_seed(1))
    targets = (inputs.sum(dim=1) > 0).long()
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    return gbp_ray.Workload(lambda: net, (inputs, targets), (inputs, targets))
"""


def workload(seed: int = 0, **fields: Any) -> gbp_ray.Workload:
    model, inputs = built(TanhNet, seed), draw(40, 3, seed=1)
    split = (inputs, (inputs.sum(dim=1) > 0).long())
    return replace(gbp_ray.Workload(lambda: model, split, split), **fields)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(code, "LIVE", {})
    monkeypatch.setattr("gbp_ray.runtime.live.LIVE", code.LIVE)


def prune(live: Any, **overrides: Any) -> gbp_ray.PruneResult:
    return gbp_ray.prune(workload=live, overrides={**JOB, **overrides}, is_quiet=True)


def test_a_live_function_gives_the_bits_of_a_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spirals_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    from spirals_module import spirals

    named = prune(spirals, name="named")
    assert named.record.job.workload.factory == "spirals_module:spirals"

    def here(examples: int = 40) -> gbp_ray.Workload:
        return spirals(examples)

    live = prune(here)
    assert live.record.job.name == "here"
    assert live.record.job.workload.factory.startswith("live:here_")
    assert live.record.num_workers == 0
    for number in range(3):
        assert live.load_masks(number) == named.load_masks(number)
        pairs = zip(
            live.load_model(number).parameters(), named.load_model(number).parameters(), strict=True
        )
        assert all(torch.equal(one, other) for one, other in pairs)
    assert len(repr(live)) < 300


def test_a_workload_keeps_its_network_and_its_results_are_found_again() -> None:
    live = workload()
    before = [p.clone() for p in live.build_model().parameters()]
    first = prune(live)
    assert first.record.job.name == "workload"
    again = prune(live)
    assert again.record == first.record
    assert all(
        torch.equal(p, q) for p, q in zip(live.build_model().parameters(), before, strict=True)
    )
    # As one that another process makes anew.
    assert prune(workload()).record == first.record


def test_an_interrupted_job_goes_on() -> None:
    first = prune(workload())
    folder = Path(first.uri)
    (folder / "trial.json").unlink()
    for file in (folder / "round_002").iterdir():
        file.unlink()
    second = prune(workload())
    assert second.load_masks() == first.load_masks()
    assert second.record.rounds[1] == first.record.rounds[1]


def scaled(factor: float) -> Any:
    return lambda outputs, targets: factor * functional.cross_entropy(outputs, targets)


class Doubled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


CELL = """
from torch import nn
from torch.nn import functional

SCALE = 1.0

def smooth(outputs, targets):
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)

def loss(outputs, targets):
    return SCALE * smooth(outputs, targets)

class Net(nn.Module):
    factor = 2

    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.power = nn.Linear(3, 2), nn.Dropout(0.1), 1

    def forward(self, inputs):
        return self.factor * self.drop(self.linear(inputs)) ** self.power
"""


def of_cell(old: str = "", new: str = "") -> gbp_ray.Workload:
    """The workload of a notebook's cell, edited."""
    assert old in CELL
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(CELL.replace(old, new, 1), found)
    return workload(build_model=found["Net"], loss=found["loss"])


OTHERS: dict[str, Any] = {
    "a cell": of_cell(),
    "a global": of_cell("SCALE = 1.0", "SCALE = 2.0"),
    "a helper": of_cell("label_smoothing=0.1", "label_smoothing=0.2"),
    "a layer": of_cell("Dropout(0.1)", "Dropout(0.2)"),
    "a field": of_cell("1\n\n    def forward", "2\n\n    def forward"),
    "a constant of a class": of_cell("factor = 2", "factor = 3"),
    "a method": of_cell("return self.factor * self", "return self"),
    "weights": workload(1),
    "an input": workload(train=(draw(40, 3, seed=1).index_fill(0, torch.tensor([17]), 3.0), None)),
    "a label": workload(),
    "a loss": workload(loss=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "another weight of the loss": workload(loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))),
    "a closure": workload(loss=scaled(2.0)),
    "another closure": workload(loss=scaled(3.0)),
    "a part": workload(loss=partial(functional.cross_entropy, label_smoothing=0.2)),
    "code": workload(prepare=lambda inputs: inputs * 2),
    "other code": workload(prepare=lambda inputs: inputs * 3),
    "an object": workload(prepare=Doubled(2.0)),
    "another object": workload(prepare=Doubled(3.0)),
    "a metric": workload(metrics=["perplexity"]),
    "a structure": workload(build_model=lambda: nn.Linear(3, 2)),
}
_SPLIT = workload().train
OTHERS["an input"] = replace(workload(), train=(OTHERS["an input"].train[0], _SPLIT[1]))
OTHERS["a label"] = workload(train=(_SPLIT[0], _SPLIT[1].index_fill(0, torch.tensor([17]), 0)))


def test_no_two_workloads_share_a_name() -> None:
    assert _SPLIT[1][17] != 0
    names = {
        label: load_live_job(live, JOB).workload.factory
        for label, live in {"the first": workload(), **OTHERS}.items()
    }
    assert len(set(names.values())) == len(names)
    assert load_live_job(workload(), JOB).workload.factory == names["the first"]
    assert load_live_job(of_cell("\n", "\n\n"), JOB).workload.factory == names["a cell"]
    other_seed = load_live_job(workload(), {**JOB, "seed": 7})
    assert other_seed.workload.factory == names["the first"]


def test_another_workload_under_the_same_name_is_refused() -> None:
    prune(workload())
    with pytest.raises(StoreError, match=r"another job, whose workload.factory = 'live:workload_"):
        prune(OTHERS["an input"])


SCRIPT = """
import json, sys, torch
from torch import nn
import gbp_ray
from gbp_ray.runtime.live import load_live_job

def made(width: int = 4) -> gbp_ray.Workload:
    inputs = torch.ones(9, 3) * torch.arange(9).unsqueeze(1)
    data = (inputs, torch.arange(9) % 2)
    sizes = {"a", "b", "c", "d"}
    return gbp_ray.Workload(
        lambda: nn.Linear(3, 2), data, data, prepare=lambda x: x if x.ndim in {1, 2, 3} else sizes
    )

job = load_live_job(made, {"prune.criterion": "taylor", "prune.sparsity": 0.5})
print(job.workload.factory, job.cluster.num_workers)
"""


def test_the_name_is_the_same_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(gbp_ray.__file__).parent.parent)
    found = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        command = [sys.executable, "script.py"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        found.add(done.stdout)
    (line,) = found
    assert line.startswith("live:made_")
    assert line.endswith(" 0\n")


def test_what_ray_cannot_import_is_refused_with_a_reason() -> None:
    reason = "is known in this process only, and workers are others"
    with pytest.raises(ConfigError, match=reason):
        prune(workload(), **{"cluster.num_workers": 2})
    tables = {"name": "x", "workload": {"factory": "__main__:made"}, "prune": {}}
    tables["prune"] = {"criterion": "taylor", "sparsity": 0.5}
    for call in (gbp_ray.prune, gbp_ray.plan_prune):
        with pytest.raises(ConfigError, match=f"workload.factory = '__main__:made': {reason}"):
            call(load_job({**tables, "cluster": {"num_workers": 2}}))
    for call in (gbp_ray.sweep, partial(gbp_ray.submit, address="http://localhost:1")):
        with pytest.raises(ConfigError, match=reason):
            call(load_job({**tables, "cluster": {"num_workers": 0}}))


def test_results_of_an_object_that_is_gone_say_so() -> None:
    result = prune(workload())
    code.LIVE.clear()
    with pytest.raises(ConfigError, match=r"was an object of the process that ran the job, and no"):
        result.load_model()
    assert result.load_masks().sparsity == 0.5
    assert gbp_ray.open_result(result.uri).record == result.record


@pytest.mark.parametrize(
    ("live", "text"),
    [
        (3, "workload: must be a gbp_ray.Workload or a function that returns one, not int"),
        (lambda: 3, "workload.factory = 'live:workload' returned int; it must return a"),
        (lambda width: workload(), "workload.options.width: is required by live:workload"),
    ],
)
def test_what_is_no_workload_is_refused(live: Any, text: str) -> None:
    with pytest.raises(GbpError) as caught:
        prune(live)
    assert str(caught.value).startswith(text)
    assert code.LIVE == {}
