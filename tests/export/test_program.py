"""Networks and masks used again: in plain PyTorch, on other weights, as a page of pictures."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save, save_file
from small_digits import prune_digits
from torch import nn
from without_package import run_without_package

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError, ExportError, PruneError, StoreError
from gbp_ray.export import program as export_module
from gbp_ray.export import rebuilt as rebuilt_module
from gbp_ray.export import weights as weights_module
from gbp_ray.export.apply import apply_masks
from gbp_ray.export.onnx import missing_onnx
from gbp_ray.export.program import Export, export_round
from gbp_ray.report.page import write_report
from gbp_ray.results.findings import read_findings
from gbp_ray.results.maintenance import fetch_results, find_faults
from gbp_ray.results.records import seal_record
from gbp_ray.results.store import Store, locate_jobs
from gbp_ray.runtime.api import PruneResult, open_result, prune
from gbp_ray.runtime.explain import explain_round
from gbp_ray.training.batchnorm import recalibrate_as_asked
from gbp_ray.workloads import digits_recurrent
from gbp_ray.workloads.loading import load_workload

WITHOUT_PACKAGE = """
import torch
from safetensors.torch import load_file
example = load_file("example.safetensors")
inputs = example["inputs"]
{three_lines}
assert torch.equal(outputs, example["outputs"])
assert model(inputs[:1]).shape == example["outputs"][:1].shape
assert model(torch.cat([inputs, inputs])).shape[0] == 2 * len(inputs)
num_zeros = sum((p == 0).sum().item() for p in model.parameters())
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return prune_digits(tmp_path_factory.mktemp("reuse"))


@pytest.fixture(scope="module")
def folder(result: PruneResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "net"
    export_round(result.uri, folder)
    return folder


def test_three_lines_of_the_card_load_the_network_without_this_package(
    result: PruneResult, folder: Path, tmp_path: Path
) -> None:
    """In this process; test_compacted loads such files in one that never had the package."""
    card = (folder / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if ".pt2" in b)
    lines = [line for line in block.splitlines() if line]
    assert len(lines) == 3
    shutil.copytree(folder, tmp_path / "net")
    program = tmp_path / "net" / "program.py"
    program.write_text(WITHOUT_PACKAGE.format(three_lines="\n".join(lines)))
    assert run_without_package(program)["num_zeros"] >= result.load_masks().num_pruned > 0


def test_batchnorm_is_folded_into_the_program_alone(result: PruneResult, tmp_path: Path) -> None:
    export = export_round(result.uri, tmp_path / "net", is_folded=True)
    program = torch.export.load(tmp_path / "net" / "model.pt2").module()
    assert not [name for name, _ in program.named_parameters() if "bn" in name]
    assert 0 < export.difference < 1e-4
    pruned = [(p == 0).sum().item() for _, p in program.named_parameters() if p.ndim > 1]
    assert sum(pruned) == result.load_masks().num_pruned
    assert "is folded into the layer before it" in (tmp_path / "net" / "README.md").read_text()
    state = load_file(tmp_path / "net" / "model.safetensors")
    assert set(state) == set(result.load_model().state_dict())


def test_the_state_dict_and_the_masks_are_those_of_the_chosen_round(
    result: PruneResult, folder: Path
) -> None:
    state = load_file(folder / "model.safetensors")
    model = result.load_model()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    example = load_file(folder / "example.safetensors")
    with torch.no_grad():
        assert torch.equal(model(example["inputs"]), example["outputs"])


def test_the_card_says_what_was_measured_on_what(result: PruneResult, folder: Path) -> None:
    card, record = (folder / "README.md").read_text(), result.record
    assert record.test is not None
    assert card.startswith("---\nlibrary_name: pytorch\n")
    dense = f"{record.test.dense_accuracy_recalibrated:.2%} with BatchNorm re-estimated; as stored"
    assert f"| test accuracy | {dense} {record.test.dense_accuracy:.2%} | " in card
    assert f" | {record.test.accuracy:.2%} |" in card
    assert f"; as stored {record.dense.accuracy:.2%} | {record.chosen.accuracy:.2%} |" in card
    assert "was used once" in card
    assert record.trial_id in card
    assert record.chosen.mask_digest in card
    for layer in record.chosen.cost.layers:
        assert f"| {layer.name} | " in card
    for heading in ("How to load it", "What it was made from", "Limits"):
        assert f"## {heading}" in card
    assert str(locate_jobs(result.uri)[0][0].uri) not in card, "where it lay is nobody's business"


def test_a_program_that_computes_something_else_is_not_written(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.export.load

    def load_other(file: object) -> object:
        program = whole(file)  # type: ignore[arg-type]
        with torch.no_grad():
            next(iter(program.state_dict.values())).add_(0.01)
        return program

    monkeypatch.setattr(torch.export, "load", load_other)
    with pytest.raises(ExportError, match=r"model\.pt2: its outputs differ by .*nothing was"):
        export_round(result.uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_cannot_be_traced_goes_without_a_program(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("data-dependent control flow")

    monkeypatch.setattr(torch.export, "export", refuse)
    export = export_round(result.uri, tmp_path / "out")
    assert "model.pt2" not in export.files
    assert "data-dependent control flow" in export.program_fault
    card = (tmp_path / "out" / "README.md").read_text()
    assert "There is no `model.pt2`" in card
    assert "data-dependent control flow" in card


def test_the_cards_lines_load_a_network_whose_layers_share_weights(tmp_path: Path) -> None:
    """Into the class as it is, which knows nothing of what a job has tied."""
    small = {"width": 4, "steps": 2}
    shared = {"workload.factory": "gbp_ray.zoo:digits_recurrent", "workload.options": small}
    by_name = {"shared": False, **small}
    ties = [["layer1.kernels.*"], ["layer2.kernels.*"]]
    for number, more in enumerate(
        ({}, {"workload.options": by_name, "workload.tie": ties}),
    ):
        result = prune(
            overrides={
                **shared,
                **more,
                "storage": str(tmp_path / str(number)),
                "cluster.num_workers": 0,
                "pretrain.epochs": 0,
                "prune.rounds": 1,
                "prune.calibration_examples": 32,
                "prune.batchnorm_examples": 32,
                "finetune.epochs": 0,
            },
            is_quiet=True,
        )
        folder = tmp_path / f"net{number}"
        export_round(result.uri, folder)
        options = more.get("workload.options", small)
        model = digits_recurrent(**options).build_model()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        example = load_file(folder / "example.safetensors")
        with torch.no_grad():
            assert torch.equal(model.eval()(example["inputs"]), example["outputs"])
        card = (folder / "README.md").read_text()
        assert ("Layers share weights" in card) == bool(more)


@pytest.mark.parametrize("name", ["classifier", "language_model", "segmentation", "tagger"])
def test_networks_of_dicts_and_sequences_are_exported_without_their_labels(
    name: str, tmp_path: Path
) -> None:
    factory = f"any_networks:{name}"
    short = {"pretrain.epochs": 0, "finetune.epochs": 0, "prune.rounds": 1}
    options = {"storage": str(tmp_path), "workload.factory": factory, "cluster.num_workers": 0}
    result = prune(overrides={**options, **short}, is_quiet=True)
    folder = tmp_path / "net"
    to = ["program"] if missing_onnx() or name == "language_model" else ["onnx"]
    found = export_round(result.uri, folder, to=to, trust_code=[factory])
    example, card = load_file(folder / "example.safetensors"), (folder / "README.md").read_text()
    outputs = example.pop("outputs")
    given = {key.removeprefix("inputs."): tensor for key, tensor in example.items()}
    if "onnx" in to:
        check_onnx_file(folder, found, given, outputs, is_there=name != "tagger")
    workload = load_workload(result.record.job.workload, 0)
    model = workload.build_model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    positional = [given.pop("inputs")] if "inputs" in given else []
    with torch.no_grad():
        expected = model.eval()(*positional, **given)
    assert torch.equal(getattr(expected, "logits", expected), outputs)
    assert "labels" not in given
    if name == "tagger":
        # Packing reads the lengths, which torch.export does not know.
        assert found.program_fault
        assert "There is no `model.pt2`" in card
        return
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(*positional, **given), outputs)
    few = {key: tensor[:3] for key, tensor in given.items()}
    first = [tensor[:3] for tensor in positional]
    torch.testing.assert_close(program(*first, **few), outputs[:3])
    called = re.search(r"outputs = model\((.*)\)", card)
    names = {"classifier": "input_ids=input_ids, attention_mask=attention_mask"}
    names |= {"language_model": "input_ids=input_ids", "segmentation": "inputs"}
    assert called is not None
    assert sorted(called[1].split(", ")) == sorted(names[name].split(", "))
    assert ("the length in `example.safetensors` only" in card) == (name == "language_model")


def check_onnx_file(
    folder: Path,
    found: Export,
    given: dict[str, torch.Tensor],
    outputs: torch.Tensor,
    is_there: bool,
) -> None:
    """Runs a file in ONNX Runtime; its own names are those of the arguments, or "inputs"."""
    if not is_there:
        assert found.onnx_fault == found.program_fault != ""
        text = (folder / "README.md").read_text()
        assert "There is no `model.onnx`: the network cannot be converted" in text
        return
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    for number in (len(outputs), 3):
        feed = {name: tensor[:number].numpy() for name, tensor in given.items()}
        made = session.run(None, feed)[0]
        assert made == pytest.approx(outputs[:number].numpy(), rel=1e-4, abs=1e-5)


def _whole(model: nn.Module) -> bytes:
    return save(model.state_dict())


def test_a_network_with_more_than_its_state_dict_is_refused(
    result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, fresh = rebuilt_module.rebuild_network, weights_module.network_of_seed

    def drawn(*arguments: object) -> nn.Module:
        model = whole(*arguments)  # type: ignore[arg-type]
        model.linear = Shifted(model.linear)
        return model

    def drawn_anew(*arguments: object) -> tuple[nn.Module, object]:
        model, macs = fresh(*arguments)  # type: ignore[arg-type]
        model.linear = Shifted(model.linear)
        return model, macs

    class Shifted(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear, self.shift = linear, float(torch.rand(()))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.linear(inputs) + self.shift

    monkeypatch.setattr(rebuilt_module, "rebuild_network", drawn)
    monkeypatch.setattr(weights_module, "network_of_seed", drawn_anew)
    monkeypatch.setattr(export_module, "complete_state", lambda model, weights: _whole(model))
    monkeypatch.setattr(rebuilt_module.MaskSet, "find_revived", lambda masks, model: None)
    with pytest.raises(ExportError, match=r"not in its state dict|in its state dict alone"):
        export_round(result.uri, tmp_path / "out")


@pytest.mark.parametrize(
    ("factory", "criterion"),
    [
        ("os:system", "taylor"),
        ("marker:run", "taylor"),
        ("gbp_ray.cli.app:main", "taylor"),
        ("gbp_ray.zoo:Path", "taylor"),
        ("gbp_ray.workloads.digits:digits_convnet", "taylor"),
        ("gbp_ray.zoo:digits_convnet", "marker:run"),
    ],
)
def test_reading_results_runs_no_code_that_only_a_record_names(
    result: PruneResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factory: str,
    criterion: str,
) -> None:
    """Also where the module lies in the working folder, as beside results that were downloaded."""
    shutil.copytree(Path(result.uri).parents[2], tmp_path / "crafted")
    (tmp_path / "marker.py").write_text("open('ran', 'w').close()\ndef run(**options): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = result.record.job
    workload = job.workload.model_copy(
        update={"factory": factory, "options": {"command": "touch ran"}}
    )
    prune = job.prune.model_copy(update={"criterion": criterion})
    crafted = result.record.model_copy(
        update={
            "job": job.model_copy(update={"workload": workload, "prune": prune}),
            "sources": {"marker:run": "0" * 64},
        }
    )
    store = Store(tmp_path / "crafted", job.name)
    # As whoever crafts one would, since a record is never replaced by the store itself.
    store.objects.put(f"trials/{crafted.trial_id}/trial.json", seal_record(crafted))
    name = re.escape(criterion if "marker" in criterion else factory)
    for read in (
        lambda: export_round(store.uri, tmp_path / "out"),
        lambda: explain_round(store.uri),
        lambda: open_result(store.uri).load_model(),
    ):
        with pytest.raises(ConfigError, match=rf"record names the code .*--trust-code {name} "):
            read()
    assert str(tmp_path) not in sys.path
    # A job that names none of it, but meets the record of its trial, does not run it either.
    assert prune_digits(tmp_path / "crafted").record.sources == crafted.sources
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(
    result: PruneResult, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt'"):
        export_round(result.uri, tmp_path)
    export_round(result.uri, folder)


# -- masks on other weights ------------------------------------------------------------------------


def test_masks_are_put_on_other_weights(result: PruneResult, tmp_path: Path) -> None:
    dense = {name: t.clone() for name, t in result.load_model(0).state_dict().items()}
    other = {name: t + 1 if t.is_floating_point() else t for name, t in dense.items()}
    save_file(other, tmp_path / "other.safetensors")
    applied = apply_masks(
        result.uri, str(tmp_path / "other.safetensors"), tmp_path / "sparse.safetensors"
    )
    found, masks = load_file(tmp_path / "sparse.safetensors"), result.load_masks()
    for name, tensor in other.items():
        expected = tensor * masks[name] if name in masks else tensor
        assert torch.equal(found[name], expected)
    assert applied.num_pruned == masks.num_pruned
    assert applied.sparsity == pytest.approx(result.sparsity)
    assert applied.num_changed == sum(
        int((other[name][~mask] != 0).sum()) for name, mask in masks.items()
    )
    # A round of its own, or a trial, will do as weights, too.
    again = apply_masks(result.round_uri(), result.uri, tmp_path / "again.safetensors")
    assert again.num_changed == 0


def test_weights_that_do_not_fit_are_refused_by_name(result: PruneResult, tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in result.load_model(0).state_dict().items()}
    wide = state | {"conv2.weight": torch.zeros(32, 16, 3, 3)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(PruneError, match=r"'conv2\.weight' has shape \(32, 16, 3, 3\), the mask"):
        apply_masks(result.uri, str(tmp_path / "wide.safetensors"), tmp_path / "out.safetensors")
    del state["conv3.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(PruneError, match=r"CHECKPOINT = .*: has no 'conv3\.weight'"):
        apply_masks(result.uri, str(tmp_path / "less.safetensors"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# -- pictures --------------------------------------------------------------------------------------


def test_what_is_explained_is_what_the_networks_do(result: PruneResult) -> None:
    found = explain_round(result.uri).findings
    job = result.record.job
    workload = load_workload(job.workload, job.seed)
    inputs, targets = workload.test
    networks = [result.load_model(number) for number in (0, found.round)]
    assert result.record.dense.reference.is_recalibrated
    assert recalibrate_as_asked(job, networks[0], workload, Ranks()) == 128
    with torch.no_grad():
        dense, pruned = (network(inputs.float() / 16).argmax(dim=1) for network in networks)
    assert found.num_examples == len(targets)
    assert found.num_changed == int((dense != pruned).sum()) > 0
    assert found.num_hurt == int(((dense == targets) & (pruned != targets)).sum())
    assert found.num_helped == int(((dense != targets) & (pruned == targets)).sum())
    for item in found.classes:
        own = targets == item.label
        assert item.num_examples == int(own.sum())
        assert item.num_right_pruned == int((pruned[own] == item.label).sum())
    test = result.record.test
    assert test is not None
    assert sum(c.num_right_pruned for c in found.classes) == round(test.accuracy * len(targets))
    changed = [item for item in found.examples if item.is_changed]
    assert changed
    assert len(changed) < len(found.examples)
    for place, item in enumerate(found.examples):
        assert (item.answer_dense, item.answer_pruned) == (dense[item.index], pruned[item.index])
        picture = found.images[place, :, :, 0]
        assert np.array_equal(picture > 0, inputs[item.index, 0].numpy() > 0)
    # The map is the gradient of the true class's output by the prepared input.
    first = found.examples[0]
    single = (inputs[first.index : first.index + 1].float() / 16).requires_grad_(True)
    result.load_model(found.round)(single)[0, first.label].backward()
    assert single.grad is not None
    assert found.maps_pruned[0] == pytest.approx(single.grad[0].abs().amax(0).numpy(), rel=1e-4)
    for layer in found.layers:
        assert layer.num_kept == int(result.load_masks()[layer.name].sum())
        assert 0 < layer.dense_kept <= layer.dense_all
    assert set(found.agreement) == {"same", "changed"}


def test_findings_are_kept_beside_the_trial_and_shown(result: PruneResult, tmp_path: Path) -> None:
    explanation = explain_round(result.uri)
    ((store,), name) = locate_jobs(result.uri)
    assert name is not None
    kept = read_findings(store, name)
    assert kept is not None
    assert kept.to_dict() == json.loads(json.dumps(explanation.findings.to_dict()))
    assert np.array_equal(kept.images, explanation.findings.images)
    report = write_report(store.uri, tmp_path / "report")
    page = f"trials/{store.name}-{name}.html"
    assert page in report.files
    assert f'href="{page}"' in (tmp_path / "report" / "index.html").read_text()
    text = (tmp_path / "report" / page).read_text()
    for title in (
        "Accuracy by class",
        "Examples that the pruned network sees differently",
        "What lives in each layer",
        "Which filter reads which input channel",
        "Saliency by layer, before and after",
        "The first layer&#39;s filters",
        "Layers in numbers",
    ):
        assert title in text or title.replace("&#39;", "'") in text
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text), "nothing comes from outside"
    for layer in result.record.chosen.cost.layers:
        assert layer.name in text


def test_findings_travel_with_their_trial(result: PruneResult, tmp_path: Path) -> None:
    findings = explain_round(result.uri).findings
    fetch_results(result.uri, tmp_path)
    copied = read_findings(Store(tmp_path, result.record.job.name), result.record.trial_id)
    assert copied is not None
    assert copied.to_dict() == json.loads(json.dumps(findings.to_dict()))
    assert find_faults(tmp_path).faults == []


@pytest.mark.usefixtures("undrawn")
def test_a_trial_alone_has_its_page_without_being_explained(tmp_path: Path) -> None:
    other = prune_digits(tmp_path / "results", **{"prune.rounds": 2, "prune.ramp_rounds": 1})
    report = write_report(other.uri, tmp_path / "report")
    (page,) = (file for file in report.files if file.endswith(".html") and "trials/" in file)
    text = (tmp_path / "report" / page).read_text()
    assert "gbp-ray explain" in text
    assert "What lives in each layer" in text
    assert "Accuracy by class" not in text


@pytest.mark.usefixtures("undrawn")
def test_damaged_findings_are_said_and_left_out(result: PruneResult, tmp_path: Path) -> None:
    explain_round(result.uri)
    ((store,), name) = locate_jobs(result.uri)
    assert isinstance(store, Store)
    assert store.folder is not None
    path = store.folder / "explained" / str(name) / "findings.json"
    path.write_bytes(b"{}")
    with pytest.raises(StoreError, match="were written"):
        read_findings(store, str(name))
    report = write_report(store.uri, tmp_path / "report")
    assert any("findings.json" in text for text in report.left_out)


def test_the_cards_line_reads_the_masks_without_the_package(
    result: PruneResult, tmp_path: Path
) -> None:
    export_round(result.uri, tmp_path / "net")
    card = (tmp_path / "net" / "README.md").read_text()
    line = "numpy.unpackbits(mask, count=weight.size, bitorder='little').reshape(weight.shape)"
    assert f"1 = kept: `{line}`." in card
    packed = load_numpy(tmp_path / "net" / "masks.safetensors")
    for name, kept in result.load_masks().items():
        weight = kept.numpy()
        found = np.unpackbits(packed[name], count=weight.size, bitorder="little")
        assert (found.reshape(weight.shape) == weight).all()
