"""The verbs on a trial that removed whole units: what they print, of networks without those."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shell import Outcome, Shell
from small_digits import FIELDS, prune_digits

from gbp_ray.cli.measured import print_beside
from gbp_ray.errors import WorkloadError
from gbp_ray.export import beside
from gbp_ray.export.beside import compare_with_dense
from gbp_ray.results.findings import read_findings
from gbp_ray.results.store import Store
from gbp_ray.runtime.api import PruneResult
from gbp_ray.runtime.stability import measure_stability

HALF: dict[str, Any] = {"prune.granularity": "channel", "prune.sparsity": 0.5, "prune.rounds": 2}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return prune_digits(tmp_path_factory.mktemp("units"), **HALF)


def prune(shell: Shell, result: PruneResult, *options: str) -> Outcome:
    """Runs the command that the trial is the result of."""
    fields = {**FIELDS, **HALF, "storage": result.record.job.storage}
    return shell("prune", *(f"--set={k}={json.dumps(v)}" for k, v in fields.items()), *options)


def test_prune_ends_with_size_and_latency_of_dense_and_pruned(
    result: PruneResult, shell: Shell
) -> None:
    done = prune(shell, result)
    assert done.code == 0, done.err
    cost = result.record.chosen.cost
    assert cost.units is not None
    rows = {line.split("  ")[0].strip(): line for line in done.out.splitlines()}
    for name, dense, pruned in (
        ("parameters", cost.num_parameters, cost.units.num_parameters),
        ("multiply-adds", cost.macs, cost.units.macs),
        ("bytes", cost.num_bytes, cost.units.num_bytes),
    ):
        cells = rows[name].split()[1:]
        assert cells == [f"{dense:,}", f"{pruned:,}", f"{dense / pruned:.2f}"]
    for size in (1, 32):
        *_, median, _, _, _, ratio = rows[f"latency, batch {size}, ms"].split()
        assert float(median) > 0
        assert float(ratio) > 0
    assert "latency in eager PyTorch: median (10th to 90th percentile)" in done.out
    assert "1 thread, torch" in done.out


def test_prune_measures_nothing_that_it_does_not_print(
    result: PruneResult, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "compare_with_dense", lambda *_, **__: pytest.fail("measured"))
    for option in ("--quiet", "--json"):
        assert prune(shell, result, option).code == 0


def test_a_trial_is_done_also_where_it_cannot_be_measured(
    result: PruneResult, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WorkloadError("data: are on the workers")

    monkeypatch.setattr(beside, "compare_with_dense", refuse)
    done = prune(shell, result)
    assert done.code == 0
    assert "latency: not measured here: data: are on the workers" in done.out


@pytest.mark.parametrize(
    ("pruned_ms", "round_to", "is_advised"), [(0.9, 1, True), (0.3, 1, False), (0.9, 8, False)]
)
def test_other_widths_are_advised_where_time_fell_by_less_than_multiply_adds(
    result: PruneResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pruned_ms: float,
    round_to: int,
    is_advised: bool,
) -> None:
    found = compare_with_dense(result.uri, seconds=0.01)
    assert found.sizes["dense"].macs > 1.9 * found.sizes["pruned"].macs
    medians = {"dense": 1.0, "pruned": pruned_ms}
    latency = tuple(r.model_copy(update={"median_ms": medians[r.network]}) for r in found.latency)
    monkeypatch.setattr(
        beside, "compare_with_dense", lambda *_, **__: replace(found, latency=latency)
    )
    print_beside(result.uri, result.trusted, round_to)
    assert ("--set prune.round_to=8, or 16" in capsys.readouterr().out) == is_advised


def test_long_passes_are_left_out(result: PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_MOST_MACS", 2.0 * result.record.dense.cost.macs)
    found = compare_with_dense(result.uri, seconds=0.01)
    assert found.too_long == (32,)
    assert {record.batch_size for record in found.latency} == {1}


def test_export_says_what_was_written(result: PruneResult, shell: Shell, tmp_path: Path) -> None:
    done = shell("export", result.uri, str(tmp_path / "net"))
    assert done.code == 0, done.err
    for name in ("widths.json", "load.py", "model.pt2", "model.safetensors"):
        assert f"  {name}  {(tmp_path / 'net' / name).stat().st_size:,} bytes" in done.out
    told = json.loads(shell("export", result.uri, str(tmp_path / "net"), "--json").out)
    assert told["is_compact"]
    # The class changed since: an earlier export of single weights leaves nothing behind.
    dense = shell("export", result.round_uri(0), str(tmp_path / "net"))
    assert dense.code == 0
    assert not (tmp_path / "net" / "load.py").exists()


def test_masks_are_put_on_dense_weights(result: PruneResult, shell: Shell, tmp_path: Path) -> None:
    target = tmp_path / "masked.safetensors"
    done = shell("apply", result.uri, result.round_uri(0), f"--to={target}", "--json")
    told = json.loads(done.out)
    masks, dense = result.load_masks(), result.load_model(0).state_dict()
    state = load_file(target)
    for name, tensor in dense.items():
        wanted = tensor * masks[name] if name in masks else tensor
        assert torch.equal(state[name], wanted)
    assert (told["num_units"], told["mask_digest"]) == (masks.num_units, masks.digest)


def test_what_changed_is_explained_by_the_layers_that_units_lie_in(
    result: PruneResult, shell: Shell
) -> None:
    done = shell("explain", result.uri, "-q")
    assert done.code == 0, done.err
    assert "of 500 answers changed" in done.out
    store = Store(result.record.job.storage, result.record.job.name)
    findings = read_findings(store, result.record.trial_id)
    assert findings is not None
    layers = {layer.name: layer for layer in findings.layers}
    masks = result.load_masks()
    assert set(layers) == {name for name, mask in masks.items() if mask.ndim > 1}
    for name, layer in layers.items():
        assert layer.num_kept == int(masks[name].sum())
        assert 0 < layer.dense_kept < layer.dense_all
        assert layer.pruned > 0


def test_results_are_verified_fetched_and_compared(
    result: PruneResult, shell: Shell, tmp_path: Path
) -> None:
    assert "all as claimed" in shell("verify", result.uri).out
    assert shell("fetch", result.uri, str(tmp_path / "copy")).code == 0
    told = shell("diff", result.uri, str(tmp_path / "copy")).out
    assert "overlap of the masks 100.00%" in told


def test_samples_give_masks_of_whole_units(tmp_path: Path) -> None:
    fields = {**FIELDS, **HALF, "storage": str(tmp_path), "pretrain.epochs": 0.2}
    found = measure_stability(
        None, fields, num_seeds=2, sizes=[32, 64, 32], with_seeds=False, is_evaluated=True
    )
    small, large = found.samples["taylor_squared"]
    assert (small.examples, large.examples) == (32, 64)
    assert large.to_largest == large.between.pairs * 2
    # Masks of whole units agree in biases as in norms: they are the same channels.
    layers = large.between.by_layer
    assert layers["bn1.weight"] == layers["bn1.bias"] == layers["conv1.weight"]
    assert 0 < large.between.mean <= 1
    assert len(large.scores) == 2
