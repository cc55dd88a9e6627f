"""ONNX files of networks, opened in ONNX Runtime as anybody would open them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from any_networks import Output
from safetensors.numpy import load_file
from small_digits import prune_digits
from small_networks import draw
from torch import Tensor, nn

from gbp_ray.errors import ConfigError, ExportError
from gbp_ray.export import onnx as onnx_module
from gbp_ray.export import program as program_module
from gbp_ray.export.onnx import make_onnx
from gbp_ray.export.program import export_round
from gbp_ray.export.traced import make_program
from gbp_ray.runtime.api import PruneResult
from gbp_ray.workloads.call import Call

needs_onnx = pytest.mark.skipif(
    bool(onnx_module.missing_onnx()), reason="needs the extra: pip install 'gbp-ray[onnx]'"
)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return prune_digits(tmp_path_factory.mktemp("onnx"))


def open_file(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Opens a file with nothing of the package."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return lambda feed: session.run(None, feed)[0]


@needs_onnx
def test_the_file_gives_the_pruned_networks_outputs_for_any_number_of_examples(
    result: PruneResult, tmp_path: Path
) -> None:
    folder = tmp_path / "net"
    export = export_round(result.uri, folder, to=["onnx"])
    assert {"model.onnx", "model.pt2"} <= set(export.files)
    assert export.onnx_difference is not None
    assert export.onnx_fault == ""
    run, model = open_file(folder / "model.onnx"), result.load_model()
    example = load_file(folder / "example.safetensors")
    found = run({"inputs": example["inputs"]})
    assert np.abs(found - example["outputs"]).max() == pytest.approx(export.onnx_difference)
    for number in (1, 3, 40):
        inputs = draw(number, 1, 8, 8, seed=number)
        with torch.no_grad():
            wanted = model(inputs).numpy()
        assert run({"inputs": inputs.numpy()}) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@needs_onnx
def test_the_cards_lines_run_it(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_round(result.uri, tmp_path / "net", to=["program", "onnx"], is_folded=True)
    monkeypatch.chdir(tmp_path / "net")
    card = Path("README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (block,) = [text for text in blocks if ".onnx" in text]
    example = load_file("example.safetensors")
    names = {"inputs": example["inputs"]}
    exec(compile(block, "README.md", "exec"), names)
    assert names["outputs"] == pytest.approx(example["outputs"], rel=1e-4, abs=1e-5)
    assert "In `model.pt2` and `model.onnx` each BatchNorm is folded" in card
    # A later export without it leaves none behind.
    export_round(result.uri, ".")
    assert not Path("model.onnx").exists()
    assert "onnx" not in Path("README.md").read_text()


class Nested(nn.Module):
    """Takes tensors in a tuple and in a dict, each of which matters in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, Tensor]) -> Output:
        first, second = pair
        return Output(self.layer(first - 2 * second) + more["b"] - 3 * more["a"])


@needs_onnx
def test_nested_arguments_reach_the_inputs_that_they_belong_to() -> None:
    model = Nested().eval()
    more = {"b": draw(4, 2, seed=3), "a": draw(4, 2, seed=4)}
    call = Call(((draw(4, 3, seed=1), draw(4, 3, seed=2)),), {"more": more}, 4)
    program = make_program(model, model, call)
    assert program.fault == ""
    assert program.traced is not None
    made = make_onnx(program.traced, model, call)
    assert made.fault == ""
    assert len(made.data) > 0
    assert list(call.leaves()) == ["inputs_0_0", "inputs_0_1", "more_b", "more_a"]


def other_outputs(data: bytes, threads: int = 1) -> Callable[..., Tensor]:
    return lambda inputs: torch.full((len(inputs), 10), 0.01)


def empty_file(*arguments: object, **options: object) -> SimpleNamespace:
    from onnx import ModelProto

    return SimpleNamespace(model_proto=ModelProto())


@needs_onnx
def test_a_file_that_computes_something_else_is_not_written(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", empty_file)
    monkeypatch.setattr(onnx_module, "open_session", other_outputs)
    with pytest.raises(ExportError, match=r"model\.onnx: its outputs differ by .*nothing was"):
        export_round(result.uri, tmp_path / "out", to=["onnx"])
    assert not (tmp_path / "out").exists()


@needs_onnx
@pytest.mark.usefixtures("few_passes")
def test_a_network_that_cannot_be_converted_goes_without_a_file(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no ONNX function for aten.strange")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    export = export_round(result.uri, tmp_path / "out", to=["onnx"], is_measured=True)
    assert "model.onnx" not in export.files
    assert "model.pt2" in export.files
    assert "no ONNX function for aten.strange" in export.onnx_fault
    assert export.measurements is not None
    assert {item.engine for item in export.measurements.latency} == {"eager"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "There is no `model.onnx`: the network cannot be converted (RuntimeError" in card
    assert "Not measured: ONNX Runtime, which cannot take the dense network: Runtime" in card


def test_a_missing_extra_and_an_unknown_format_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = onnx_module.find_spec
    monkeypatch.setattr(
        onnx_module, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    fault = r"--to = 'onnx': needs .*onnxscript.*, which .*; pip install 'gbp-ray\[onnx\]'"
    # Before anything is read.
    with pytest.raises(ConfigError, match=fault):
        export_round(tmp_path / "nowhere", tmp_path / "out", to=["onnx"])
    with pytest.raises(ConfigError, match=r"--to = 'onx': .* did you mean 'onnx'\? \(allowed: pro"):
        export_round(tmp_path / "nowhere", tmp_path / "out", to=["onx"])
    assert program_module.FORMATS == ("program", "onnx", "csr", "hf")
