"""The verbs after pruning, and `stability`, on the command line: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_digits import FIELDS, prune_digits
from typer.testing import CliRunner

from gbp_ray.cli.app import app
from gbp_ray.config.job import trial_id
from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.export.onnx import missing_onnx
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.measurements import MeasurementsRecord, latency_rows, speed_sentence
from gbp_ray.results.store import Store
from gbp_ray.runtime.stability import measure_stability


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prune_digits(tmp_path_factory.mktemp("verbs")).uri


def test_the_verbs_say_what_they_did(uri: str, tmp_path: Path) -> None:
    exported = json.loads(run("export", uri, str(tmp_path / "net"), "--json"))
    assert set(exported["files"]) == {path.name for path in (tmp_path / "net").iterdir()}
    assert "outputs as the pruned network's" in run("export", uri, str(tmp_path / "net"))
    applied = json.loads(
        run("apply", uri, f"{uri}/round_000", "--to", str(tmp_path / "out.safetensors"), "--json")
    )
    assert applied["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert applied["num_changed"] > 0
    with pytest.raises(ConfigError, match=r"--threads = 2: is for --measure and --to csr"):
        run("export", uri, str(tmp_path / "net"), "--threads=2")
    explained = run("explain", uri, "-q")
    assert "of 500 answers changed" in explained
    assert "cosine of the input gradients" in explained


def test_measuring_prints_times_and_sizes_and_writes_them(uri: str, tmp_path: Path) -> None:
    to = [] if missing_onnx() else ["--to=onnx", "--to=program"]
    text = run("export", uri, str(tmp_path / "net"), "--measure", *to)
    written = (tmp_path / "net" / "measurements.json").read_text()
    measured = MeasurementsRecord.model_validate_json(written)
    card = (tmp_path / "net" / "README.md").read_text()
    engines = ["eager"] if missing_onnx() else ["eager", "onnxruntime"]
    assert [(i.engine, i.batch_size, i.network) for i in measured.latency] == [
        (engine, size, name)
        for engine in engines
        for size in (1, 32)
        for name in ("dense", "pruned")
    ]
    for shown in (text, card):
        assert speed_sentence(measured) in shown
        assert "Zeros do not make it faster" in shown
    for cells in latency_rows(measured)[1]:
        assert f"| {' | '.join(cells)} |" in card
        assert cells[2] in text
    dense, pruned = measured.networks["dense"], measured.networks["pruned"]
    assert (dense.round, dense.num_parameters) == (0, pruned.num_parameters)
    assert pruned.num_nonzero < 0.2 * dense.num_nonzero
    for name, size in pruned.file_bytes.items():
        assert size == (tmp_path / "net" / name).stat().st_size
    assert set(dense.file_bytes) == set(pruned.file_bytes)
    found = json.loads(run("export", uri, str(tmp_path / "net"), "--measure", "--json"))
    again = MeasurementsRecord.model_validate(found["measurements"])
    assert again.networks.keys() == measured.networks.keys()
    assert again.networks["pruned"].forward_bytes == pruned.forward_bytes
    # It is made for the comparison, and not written unasked.
    assert "model.onnx" not in found["files"]


def test_stability_compares_samples_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"--set={key}={json.dumps(value)}" for key, value in FIELDS.items()]
    common = ["stability", *settings, f"--set=storage={tmp_path}", "--seeds=2", "-q"]
    sizes = ["--examples=64:256", "--criterion=taylor", "--criterion=magnitude", "--accuracy"]
    found: dict[str, Any] = json.loads(
        run(*common, *sizes, "--json", f"--to={tmp_path / 'figure'}")
    )
    assert [size["examples"] for size in found["samples"]["taylor"]["sizes"]] == [64, 128, 256]
    # What passes over no data depends on no sample.
    assert found["samples"]["magnitude"]["enough_examples"] == 64
    for size in found["samples"]["magnitude"]["sizes"]:
        assert size["overlap"]["mean"] == 1.0
    seeds = found["seeds"]
    store = Store(tmp_path, "digits")
    masks = []
    for trial in seeds["trials"]:
        record = store.read_trial(trial["trial_id"])
        assert record is not None
        assert trial_id(record.job) == trial["trial_id"]
        assert trial["accuracy"] == record.test_accuracy
        data = store.read_file(trial["trial_id"], record.chosen, "masks.safetensors")
        masks.append(MaskSet.from_bytes(data))
    assert seeds["overlap"]["mean"] == masks[0].overlap(masks[1]) < 1.0
    written = json.loads((tmp_path / "figure" / "stability.json").read_text())
    assert written["samples"] == found["samples"]
    assert (tmp_path / "figure" / "stability.png").read_bytes().startswith(b"\x89PNG")
    text = run(*common, "--no-samples", f"--to={tmp_path / 'figure'}")
    assert "2 seeds: accuracy" in text
    # After a sweep its trials are read, whatever cluster they ran on.
    monkeypatch.setattr("gbp_ray.runtime.stability.sweep", lambda *arguments: None)
    fsdp = ["--set=cluster.num_workers=2", "--set=cluster.strategy=fsdp"]
    swept = run(*common, "--no-samples", "--sweep", *fsdp, "--json", f"--to={tmp_path / 'figure'}")
    assert json.loads(swept)["seeds"]["trials"] == seeds["trials"]
    with pytest.raises(StoreError, match="there is no such folder"):
        run(*common, "--no-samples", "--sweep", "--set=seed=7", f"--to={tmp_path / 'figure'}")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--examples=x"], r"--examples = 'x': must read FIRST:LAST"),
        (["--seeds=1"], r"--seeds = 1: must be 2 or more"),
        (["--no-samples", "--no-trained"], "leave nothing to do"),
        (["--no-trained", "--criterion=movement"], "has no calibration sample"),
        (["--no-trained", "--examples=9999"], "there are 1297 training examples"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the figure would go is made before anything is read.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=fault):
        run("stability", "-q", "--set=finetune.epochs=1", *arguments)
    with pytest.raises(StoreError, match=r"--to = 'x+': cannot be written: File name too long"):
        run("stability", "-q", f"--to={'x' * 300}")


def test_enough_is_where_no_larger_size_falls_below(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_stability(
        None,
        FIELDS | {"pretrain.epochs": 0},
        sizes=(64, 128, 256),
        num_seeds=2,
        with_seeds=False,
    )
    means = [size.between.mean for size in found.samples["taylor_squared"]]
    for limit, expected in ((0.0, 64), (min(means[1:]), 128 if means[0] < min(means[1:]) else 64)):
        monkeypatch.setattr("gbp_ray.runtime.stability.STABLE", limit)
        assert found.enough_examples("taylor_squared") == expected
    monkeypatch.setattr("gbp_ray.runtime.stability.STABLE", 1.01)
    assert found.enough_examples("taylor_squared") is None
