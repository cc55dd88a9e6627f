"""Networks that have lost whole units, exported: small, the same function, loaded without us."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_units import NETWORKS, code_of, prune_units
from safetensors.torch import load_file
from torch import Tensor, nn

from gbp_ray.errors import ExportError
from gbp_ray.export import compacted as compacted_module
from gbp_ray.export import load as loader
from gbp_ray.export.load import fill_network, load_network
from gbp_ray.export.onnx import missing_onnx
from gbp_ray.export.program import Export, export_round
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.removal.layers import KEPT_AS_ZEROS
from gbp_ray.results.measurements import MeasurementsRecord, speed_sentence
from gbp_ray.runtime.api import PruneResult

CASES: dict[str, dict[str, Any]] = {
    "conv": {},
    "attending": {"granularity": "channel+head", "target": {"parameters": 0.6}},
    "lstm": {},
    "scaled": {},
}

Exported = Callable[[str], tuple[Path, Export]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


def pruned(storage: Path, network: str, **changed: Any) -> PruneResult:
    return prune_units(storage, network, **CASES.get(network, {}), **changed)


def export(result: PruneResult, folder: Path, **options: Any) -> Export:
    return export_round(result.uri, folder, trust_code=["exported_units"], **options)


@pytest.fixture(scope="module")
def exported(storage: Path) -> Exported:
    """Exports each network once, for all tests that read its files."""

    @cache
    def export_once(network: str) -> tuple[Path, Export]:
        folder = storage / "exported" / network
        return folder, export(pruned(storage, network), folder)

    return export_once


def masked_network(result: PruneResult) -> nn.Module:
    """Builds the network in dense shapes, with the stored zeros."""
    return result.load_model(trust_code=["exported_units"])


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


WITHOUT_PACKAGE = """
import importlib.util, sys
import torch
from safetensors.torch import load_file, save_file

def run(folder, name):
    spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

for folder in sys.argv[1:]:
    inputs = load_file(f"{folder}/example.safetensors")["inputs"]
    with torch.no_grad():
        made = run(folder, "load").load_network(run(folder, "network").Network())(inputs)
        program = torch.export.load(f"{folder}/model.pt2").module()
        found = {"load": made, "program": program(inputs)}
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(found, f"{folder}/outputs.safetensors")
        assert program(inputs[:1]).shape[1:] == made.shape[1:]
assert not [name for name in sys.modules if name.startswith("gbp_ray")]
"""


def test_what_is_written_loads_without_the_package_and_gives_the_masked_outputs(
    storage: Path, exported: Exported, tmp_path: Path
) -> None:
    for network in CASES:
        folder, found = exported(network)
        assert found.is_compact
        assert (found.program_fault, found.compact_fault) == ("", "")
        shutil.copytree(folder, tmp_path / network)
        (tmp_path / network / "network.py").write_text(code_of(network))
    # -I: neither the working folder nor PYTHONPATH, only what is installed.
    folders = [str(tmp_path / network) for network in CASES]
    command = [sys.executable, "-I", "-c", WITHOUT_PACKAGE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for network in CASES:
        example = load_file(tmp_path / network / "example.safetensors")
        with torch.no_grad():
            wanted = masked_network(pruned(storage, network))(example["inputs"])
        outputs = load_file(tmp_path / network / "outputs.safetensors")
        for made in (*outputs.values(), example["outputs"]):
            assert largest_difference(made, wanted) <= 1e-5


@pytest.mark.parametrize("network", list(CASES))
def test_the_small_network_has_the_parameters_on_record(
    network: str, storage: Path, exported: Exported
) -> None:
    result = pruned(storage, network)
    folder, _ = exported(network)
    cost = result.record.chosen.cost
    assert cost.units is not None
    made = load_network(NETWORKS[network](), folder)
    assert not made.training
    count = sum(parameter.numel() for parameter in made.parameters())
    assert count == cost.units.num_parameters < cost.num_parameters
    held = sum(parameter.nbytes for parameter in made.parameters())
    assert held == cost.units.num_bytes
    # Of each weight there is what its mask keeps, in order.
    masks, stored = result.load_masks(), masked_network(result).state_dict()
    for name, tensor in made.state_dict().items():
        if name in masks:
            assert torch.equal(tensor.flatten(), stored[name][masks[name]])
    assert len(list(made.parameters())) == len(list(NETWORKS[network]().parameters()))


def test_widths_list_every_changed_shape_and_attribute(storage: Path, exported: Exported) -> None:
    result = pruned(storage, "attending")
    widths = json.loads((exported("attending")[0] / "widths.json").read_text())
    units = result.record.chosen.cost.units
    assert units is not None
    heads, neurons = ({w.name: w for w in units.widths}[n] for n in ("qkv.weight", "up.weight"))
    assert (heads.kind, heads.num_units, neurons.num_units) == ("head", 4, 32)
    rows, hidden = 12 * heads.num_kept, neurons.num_kept
    assert widths["shapes"] == {
        "qkv.weight": [[48, 16], [rows, 16]],
        "qkv.bias": [[48], [rows]],
        "proj.weight": [[16, 16], [16, rows // 3]],
        "up.weight": [[32, 16], [hidden, 16]],
        "up.bias": [[32], [hidden]],
        "down.weight": [[16, 32], [16, hidden]],
    }
    assert widths["attributes"] == {
        "num_heads": heads.num_kept,
        "qkv.out_features": rows,
        "proj.in_features": rows // 3,
        "up.out_features": hidden,
        "down.in_features": hidden,
    }
    assert widths["kept"] == {}


def test_a_buffer_beside_the_state_dict_is_cut_where_it_is_loaded(
    storage: Path, exported: Exported
) -> None:
    result = pruned(storage, "scaled")
    fresh = NETWORKS["scaled"]()
    kept = result.load_masks()["first.bias"]
    made = load_network(fresh, exported("scaled")[0])
    assert torch.equal(made.get_buffer("scale"), torch.linspace(1, 2, 12)[kept])
    assert made.get_submodule("second").weight is made.get_submodule("third").weight


def test_the_loader_is_short_and_needs_only_torch_and_safetensors() -> None:
    lines = Path(loader.__file__).read_text().splitlines()
    assert len(lines) <= 60
    imported = {
        line.split()[1].split(".")[0] for line in lines if line.startswith(("import", "from"))
    }
    assert imported <= {"__future__", "json", "pathlib", "typing", "torch", "safetensors"}


def test_the_loader_refuses_another_network(exported: Exported) -> None:
    folder, _ = exported("conv")
    widths = json.loads((folder / "widths.json").read_text())
    weights = load_file(folder / "model.safetensors")
    wider = NETWORKS["conv"]()
    wider.conv2 = nn.Conv2d(8, 9, 3, bias=False)
    with pytest.raises(ValueError, match=r"conv2\.weight: is \[9, 8, 3, 3\] here, and was \[8, 8,"):
        fill_network(wider, widths, weights)
    with pytest.raises(AssertionError, match=r"conv1\.weight: is not in this network, and is in"):
        fill_network(nn.Sequential(), widths, weights)


def test_nothing_is_written_of_a_class_that_gives_other_outputs(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(model: nn.Module, *rest: Any) -> nn.Module:
        filled = fill_network(model, *rest)
        nn.init.zeros_(filled.get_parameter("head.bias"))
        return filled

    monkeypatch.setattr(compacted_module, "fill_network", forget)
    with pytest.raises(ExportError, match=r"load\.py: its outputs differ by .*nothing was written"):
        export(pruned(storage, "conv"), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_removal_that_fails_is_one_line(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = pruned(storage, "conv")
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: x.new_ones(len(x), 3, 4, 4))
    with pytest.raises(ExportError, match=r"^[^\n]+$"):
        export(result, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_units_kept_as_zeros_leave_in_the_export_or_it_says_why_not(
    storage: Path, tmp_path: Path
) -> None:
    found = export(pruned(storage, "conv", compact=False), tmp_path / "conv")
    assert found.is_compact
    result = pruned(storage, "named", compact=False)
    found = export(result, tmp_path / "named")
    assert not found.is_compact
    assert "without its removed units it fails with ValueError: wants 12" in found.compact_fault
    assert KEPT_AS_ZEROS not in found.compact_fault
    assert "widths.json" not in found.files
    card = (tmp_path / "named" / "README.md").read_text()
    assert f"are zeros here: the network cannot go without them ({found.compact_fault})" in card
    state = load_file(tmp_path / "named" / "model.safetensors")
    assert state["first.weight"].shape == (12, 72)


def test_groups_that_the_trial_left_out_keep_their_width(storage: Path, tmp_path: Path) -> None:
    result = pruned(storage, "named", target={"macs": 0.95})
    assert "first.weight" not in result.load_masks()
    assert export(result, tmp_path / "net").is_compact
    made = load_network(NETWORKS["named"](), tmp_path / "net")
    assert made.get_parameter("first.weight").shape == (12, 72)
    assert len(made.get_parameter("second.bias")) < 10


def test_the_dense_round_leaves_whole(storage: Path, tmp_path: Path) -> None:
    result = pruned(storage, "conv")
    found = export_round(result.round_uri(0), tmp_path / "net", trust_code=["exported_units"])
    assert not found.is_compact
    assert "load.py" not in found.files


@pytest.mark.usefixtures("few_passes")
def test_measurements_and_card_tell_what_the_small_network_costs(
    storage: Path, tmp_path: Path
) -> None:
    result = pruned(storage, "conv")
    to = ["csr", *([] if missing_onnx() else ["onnx"])]
    found = export(result, tmp_path / "net", is_measured=True, to=to)
    assert "what is left is dense" in found.csr_fault
    text = (tmp_path / "net" / "measurements.json").read_text()
    measured = MeasurementsRecord.model_validate_json(text)
    dense, small = measured.networks["dense"], measured.networks["pruned"]
    cost = result.record.chosen.cost
    assert cost.units is not None
    assert (small.macs, small.macs_nonzero) == (cost.units.macs, cost.units.macs)
    assert (dense.macs, dense.num_parameters) == (cost.macs, cost.num_parameters)
    assert small.num_parameters == cost.units.num_parameters
    # By hand: a pixel of the inputs, then of what a 3x3 kernel leaves of 6x6, then the head.
    one, two = (width.num_kept for width in cost.units.widths)
    assert small.macs == 36 * 9 * 2 * one + 16 * 9 * one * two + 3 * 4 * two
    for name, size in small.file_bytes.items():
        assert size == (tmp_path / "net" / name).stat().st_size < dense.file_bytes[name]
    assert small.forward_bytes[32] < dense.forward_bytes[32]
    card = (tmp_path / "net" / "README.md").read_text()
    assert speed_sentence(measured) in card
    assert "The dense network takes this many times as long as the pruned one" in card
    assert f"| multiply-adds | {cost.macs:,} | {cost.units.macs:,} |" in card
    assert f"| parameters | {cost.num_parameters:,} | {cost.units.num_parameters:,} |" in card
    assert f"| conv1.weight | channels | 8 | {one} |" in card
    assert f"# conv: ConvNet, {cost.headline}" in card
    assert "model = load_network(ConvNet(...))" in card
    assert "stored as zeros" not in card
    if not missing_onnx():
        assert found.onnx_difference is not None
        assert found.onnx_difference < 1e-4


def test_batchnorm_is_folded_into_what_is_left(storage: Path, tmp_path: Path) -> None:
    result = pruned(storage, "conv")
    export(result, tmp_path / "net", is_folded=True)
    program = torch.export.load(tmp_path / "net" / "model.pt2").module()
    assert not [name for name, _ in program.named_parameters() if "norm" in name]
    example = load_file(tmp_path / "net" / "example.safetensors")
    assert largest_difference(program(example["inputs"]), example["outputs"]) <= 1e-5


def test_masks_keep_the_dense_shapes(storage: Path, exported: Exported) -> None:
    result = pruned(storage, "conv")
    written = (exported("conv")[0] / "masks.safetensors").read_bytes()
    assert MaskSet.from_bytes(written).digest == result.load_masks().digest
