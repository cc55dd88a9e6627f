"""Every verb says which matrices a job leaves alone, how many weights they have, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import Shell
from user_files import files_of_a_user

MODULE = """
import torch
from torch import nn
from gbp_ray import Workload

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.spare = nn.LSTM(4, 6, batch_first=True), nn.Linear(8, 8)
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(torch.tanh(self.middle(self.rnn(inputs)[0][:, -1])))

def sequences():
    inputs = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0))
    split = (inputs, (inputs.sum(dim=(1, 2)) > 0).long())
    return Workload(Tagger, split, split)
"""
JOB = """
name = "tagger"
workload.factory = "tagger_of_a_user:sequences"
pretrain.epochs = 0
prune.criterion = "magnitude"
prune.sparsity = 0.5
prune.exclude = ["middle.*"]
finetune.epochs = 0
cluster.num_workers = 0
"""
UNPRUNED = {
    "rnn.weight_ih_l0": [96, "LSTM, not in prune.include"],
    "rnn.weight_hh_l0": [144, "LSTM, not in prune.include"],
    "spare.weight": [64, "no pass reaches it"],
    "middle.weight": [36, "prune.exclude"],
}
SENTENCE = "340 of 352 weights in matrices are not prunable: " + ", ".join(
    f"{name} ({number}, {why})" for name, (number, why) in UNPRUNED.items()
)


# That the layer is not used is warned of, too; see tests/pruning/test_unusual_models.py.
pytestmark = pytest.mark.filterwarnings("ignore:prune. 'spare.weight'")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with files_of_a_user(tmp_path, monkeypatch, "tagger_of_a_user", MODULE, JOB):
        yield tmp_path


def test_every_verb_lists_what_is_left_alone(shell: Shell, folder: Path) -> None:
    code, out, _ = shell("prune", "job.toml", "--dry-run")
    assert (code, SENTENCE in out) == (0, True)
    assert shell.json("prune", "job.toml", "--dry-run")["plan"]["unpruned"] == UNPRUNED
    record = shell.json("prune", "job.toml", "-q")
    assert [state["cost"]["unpruned"] for state in record["rounds"]] == [UNPRUNED, UNPRUNED]
    assert record["rounds"][-1]["cost"]["layers"][0]["num_nonzero"] == 6
    for command in (("prune", "job.toml", "-q"), ("show", record["uri"])):
        code, out, _ = shell(*command)
        assert (code, SENTENCE in " ".join(out.split())) == (0, True)
    trusted = "--trust-code=tagger_of_a_user"
    assert shell("explain", record["uri"], trusted).code == 0
    assert shell("report", "gbp-results/tagger").code == 0
    pages = [page.read_text() for page in folder.rglob("*.html")]
    assert len(pages) == 2
    assert all(SENTENCE in page for page in pages)


def test_what_is_included_is_not_among_it(shell: Shell, folder: Path) -> None:
    include = 'prune.include=["rnn.weight_*", "spare.*"]'
    record = shell.json("prune", "job.toml", "-q", "--set", include)
    assert record["rounds"][-1]["cost"]["unpruned"] == {"middle.weight": [36, "prune.exclude"]}
    layers = {layer["name"]: layer for layer in record["rounds"][-1]["cost"]["layers"]}
    assert layers.keys() == {"head.weight", *UNPRUNED} - {"middle.weight"}
    assert sum(layer["num_nonzero"] for layer in layers.values()) == (12 + 304) // 2
    assert layers["rnn.weight_hh_l0"]["macs"] == 3 * 144
    told = shell.refusal("prune", "job.toml", "--set", 'prune.include=["rnn.bias_*"]')
    assert "prune.include = 'rnn.bias_*': matches only what has no two axes" in told
    told = shell.refusal("prune", "job.toml", "--set", 'prune.include=["rn.weight_hh_l0"]')
    assert "did you mean 'rnn.weight_hh_l0'?" in told
