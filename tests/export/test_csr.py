"""Linear layers as compressed sparse rows: the same outputs, and only where they were faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_digits import prune_digits
from small_networks import draw
from torch import Tensor, nn
from typer.testing import CliRunner
from without_package import run_without_package

from gbp_ray.cli.app import app
from gbp_ray.export import csr as csr_module
from gbp_ray.export import program as program_module
from gbp_ray.export.csr import CSR_FILES
from gbp_ray.export.load_csr import CsrLinear, load_network
from gbp_ray.export.program import Export, export_round
from gbp_ray.results.measurements import speed_sentence
from gbp_ray.runtime.api import PruneResult
from gbp_ray.workloads.loading import load_workload


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    folder = tmp_path_factory.mktemp("csr")
    return prune_digits(folder, **{"prune.scope": "layer", "prune.sparsity": 0.95})


def pretend(times: Mapping[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CSR take these times by batch size, and dense layers one second."""
    sizes = iter(times.values())

    def time_in_turn(runs: Mapping[str, Callable[[], Tensor]], **_: object) -> object:
        outputs = {name: run() for name, run in runs.items()}
        torch.testing.assert_close(outputs["csr"], outputs["dense"])
        return {"dense": [1.0], "csr": [next(sizes)]}

    monkeypatch.setattr(csr_module, "time_in_turn", time_in_turn)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_gives_what_the_dense_one_gives(has_bias: bool) -> None:
    layer = nn.Linear(7, 5, bias=has_bias)
    with torch.no_grad():
        layer.weight.copy_(draw(5, 7))
        layer.weight[draw(5, 7, seed=1) < 0.5] = 0
        layer.weight[0] = layer.weight[-1] = 0  # rows of zeros
    sparse = CsrLinear.of(layer)
    assert sparse.values.numel() == int(layer.weight.count_nonzero())
    assert {sparse.crow.dtype, sparse.col.dtype} == {torch.int32}
    for shape in ((7,), (1, 7), (4, 7), (2, 3, 7), (1, 1, 7)):
        inputs = draw(*shape, seed=len(shape))
        with torch.no_grad():
            found = sparse(inputs)
            torch.testing.assert_close(found, layer(inputs))
        assert found.is_contiguous()


def export(result: PruneResult, folder: Path, **options: object) -> Export:
    return export_round(result.uri, folder, to=["csr"], **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("few_passes")
def test_what_is_written_loads_into_the_class_without_the_package(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend({1: 0.5, 32: 0.25}, monkeypatch)
    # CSR layers are measured in eager PyTorch only.
    monkeypatch.setattr(program_module, "missing_onnx", lambda: ["onnx"])
    found = export(result, tmp_path / "net", is_measured=True)
    assert set(CSR_FILES) <= set(found.files)
    ((name, ratios),) = found.csr_ratios.items()
    assert ratios == {1: 2.0, 32: 4.0}
    job = result.record.job
    model = load_workload(job.workload, 5).build_model()
    tensors = load_file(tmp_path / "net" / "model.csr.safetensors")
    assert f"{name}.weight" not in tensors
    load_network(model, tensors)
    assert isinstance(model.get_submodule(name), CsrLinear)
    example = load_file(tmp_path / "net" / "example.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(example["inputs"]), example["outputs"])
    assert "load_network" in run_without_package(tmp_path / "net" / "load_csr.py")
    assert len((tmp_path / "net" / "load_csr.py").read_text().splitlines()) <= 60
    card = (tmp_path / "net" / "README.md").read_text()
    assert f"| {name} | 2.00 | 4.00 |" in card
    assert "which make no pass faster, except in the CSR layers above" in card
    # The whole network is measured for itself, whatever its layers promise.
    measured = found.measurements
    assert measured is not None
    assert speed_sentence(measured) in card
    assert [i.network for i in measured.latency][:3] == ["dense", "pruned", "csr"]
    stored, pruned = measured.networks["csr"], measured.networks["pruned"]
    (layer,) = [x for x in result.record.chosen.cost.layers if x.name == f"{name}.weight"]
    assert stored.num_parameters == pruned.num_parameters - layer.num_weights + layer.num_nonzero
    assert stored.num_nonzero == pruned.num_nonzero
    assert stored.macs == pruned.macs - layer.macs + layer.macs_nonzero
    assert stored.file_bytes == {"model.csr.safetensors": len_of(tmp_path / "net")}


@pytest.mark.filterwarnings("default:no model.csr.safetensors")
def test_the_command_says_which_layers_and_why_none(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = [result.uri, str(tmp_path / "net"), "--to=csr", "--threads=1"]
    pretend({1: 0.5, 32: 0.25}, monkeypatch)
    done = CliRunner().invoke(app, ["export", *target], catch_exceptions=False)
    assert "as CSR, measured, dense / CSR: 2.00 (batch 1), 4.00 (batch 32)" in done.stdout
    pretend({1: 2, 32: 2}, monkeypatch)
    done = CliRunner().invoke(app, ["export", *target], catch_exceptions=False)
    assert "as CSR" not in done.stdout
    assert "warning: no model.csr.safetensors: no linear layer was faster; dense" in done.stderr
    assert not (tmp_path / "net" / "load_csr.py").exists()


def len_of(folder: Path) -> int:
    return (folder / "model.csr.safetensors").stat().st_size


@pytest.mark.parametrize("times", [{1: 1.2, 32: 0.5}, {1: 0.5, 32: 0.95}])
def test_a_layer_that_is_not_faster_for_both_stays_dense(
    times: dict[int, float],
    result: PruneResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(times, monkeypatch)
    found = export(result, tmp_path / "net")
    assert not set(CSR_FILES) & set(found.files)
    assert found.csr_ratios == {}
    # What is slower for one example is not timed for more.
    timed = [f"{1 / time:.2f} at batch {size}" for size, time in times.items()]
    assert f"({', '.join(timed[: 1 if times[1] > 1 else 2])})" in found.csr_fault
    card = (tmp_path / "net" / "README.md").read_text()
    assert f"There is no `model.csr.safetensors`: {found.csr_fault}." in card


class Tied(nn.Module):
    """Its layers are sparse, and yet none is a candidate but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(10, 10))
        self.double = nn.Linear(10, 10).double()
        self.dense, self.plain = nn.Linear(10, 10), nn.Linear(10, 10)


def test_only_plain_sparse_layers_with_a_weight_of_their_own_are_candidates() -> None:
    model = Tied()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dense" not in name:
                parameter.zero_()
        model.dense.weight.view(-1)[11:] = 0  # 89 % sparse
        model.plain.weight.view(-1)[:10] = 1  # 90 %
    assert list(csr_module._candidates(model)) == ["plain"]
    assert csr_module._candidates(nn.Linear(2, 2)) == {}
