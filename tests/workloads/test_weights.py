"""Networks that start from the weights of another training, but for a new head."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gbp_ray import prune
from gbp_ray.config.job import JobConfig
from gbp_ray.config.workload import TransferConfig, WorkloadConfig
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.runtime.pinning import pin_files
from gbp_ray.workloads.data import seeded
from gbp_ray.workloads.loading import load_workload
from gbp_ray.workloads.networks import build_cifar_resnet
from gbp_ray.workloads.weights import find_misfits, start_from


def network(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, num_classes)
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Weights of a network of a hundred classes."""
    with seeded(7):
        model = network(100)
    model[1].running_mean.fill_(0.5)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    return str(tmp_path / "other.safetensors")


def started(checkpoint: str, *new_head: str, build: Any = network) -> nn.Module:
    with seeded(3):
        return start_from(build, TransferConfig(checkpoint=checkpoint, new_head=new_head))()


def test_everything_but_the_new_head_is_the_checkpoint(checkpoint: str) -> None:
    with seeded(7):
        source = network(100).state_dict()
    source["1.running_mean"].fill_(0.5)
    with seeded(3):
        fresh = network().state_dict()
    for name, value in started(checkpoint, "3.*").state_dict().items():
        expected = fresh[name] if name.startswith("3.") else source[name]
        assert torch.equal(value, expected), name


def test_the_new_head_depends_on_the_seed_alone(checkpoint: str) -> None:
    first, again = started(checkpoint, "3.*"), started(checkpoint, "3.*")
    assert torch.equal(first[3].weight, again[3].weight)
    with seeded(4):
        other = start_from(network, TransferConfig(checkpoint=checkpoint, new_head=("3.*",)))()
    assert not torch.equal(first[3].weight, other[3].weight)


def test_a_head_of_another_size_is_refused_unless_it_is_named(checkpoint: str) -> None:
    with pytest.raises(WorkloadError, match=r"'3\.weight' has shape \(100, 16\) .*new_head"):
        started(checkpoint)
    with pytest.raises(WorkloadError, match=r"'3\.bias' has shape"):
        started(checkpoint, "3.weight")


def test_a_glob_that_names_nothing_is_refused(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"new_head = 'head\.\*': matches no weight"):
        started(checkpoint, "head.*")


def test_a_checkpoint_may_lack_the_new_head_or_have_one_of_another_name(tmp_path: Path) -> None:
    state = {f"0.{k}": v for k, v in nn.Conv2d(1, 4, 3).state_dict().items()}
    norm = {f"1.{k}": v for k, v in nn.BatchNorm2d(4).state_dict().items()}
    path = tmp_path / "body.safetensors"
    save_file(state | norm, path)
    model = started(str(path), "3.*")
    assert torch.equal(model[0].weight, state["0.weight"])


def test_a_network_on_the_meta_device_is_refused(checkpoint: str) -> None:
    def blank() -> nn.Module:
        with torch.device("meta"):
            return network()

    with pytest.raises(WorkloadError, match="built on the meta device"):
        started(checkpoint, "3.*", build=blank)


def test_all_but_one_of_a_tied_tensors_names_may_be_absent() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    state = {n: t for n, t in model.state_dict().items() if n != "1.weight"}
    assert find_misfits(state, model.state_dict()) == ""
    del state["0.weight"]
    assert "it lacks '0.weight', '1.weight'" in find_misfits(state, model.state_dict())


def test_any_workload_takes_a_checkpoint(tmp_path: Path) -> None:
    factory = "gbp_ray.zoo:digits_convnet"
    with seeded(7):
        source = load_workload(WorkloadConfig(factory=factory)).build_model()
    path = str(tmp_path / "digits.safetensors")
    save_file(source.state_dict(), path)
    transfer = {"checkpoint": path, "new_head": ["linear.*"]}
    model = load_workload(WorkloadConfig(factory=factory, transfer=transfer)).build_model()
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert not torch.equal(model.linear.weight, source.linear.weight)
    # Names are those of the network without its encoding.
    encoded = {"kind": "thermometer", "levels": 4}
    whole = WorkloadConfig(factory=factory, transfer=transfer, encoding=encoded)
    inner = load_workload(whole).build_model().network
    assert torch.equal(inner.conv2.weight, source.conv2.weight)
    gone = {"checkpoint": str(tmp_path / "gone.safetensors")}
    with pytest.raises(WorkloadError, match=r"workload\.transfer\.checkpoint = .*no such file"):
        load_workload(WorkloadConfig(factory=factory, transfer=gone))


# -- files as people have them ---------------------------------------------------------------------

State = dict[str, Tensor]


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def changed(state: Mapping[str, Tensor]) -> State:
    return {name: t + 1 for name, t in state.items()}


@pytest.fixture
def state() -> State:
    with seeded(7):
        model = network()
    model[1].running_mean.fill_(0.5)
    return dict(model.state_dict())


FILES: list[tuple[str, Callable[[State], Any]]] = [
    ("plain.pth", lambda s: s),
    ("upper.PTH", lambda s: s),
    ("what?.pth", lambda s: s),
    ("pytorch_model.bin", lambda s: s),
    ("ddp.pth", lambda s: under("module.", s)),
    ("compiled.pth", lambda s: under("_orig_mod.", s)),
    ("both.pth", lambda s: under("module._orig_mod.", s)),
    ("partly.pth", lambda s: {k.replace("0.", "0._orig_mod."): v for k, v in s.items()}),
    ("fsdp.pt", lambda s: under("model._fsdp_wrapped_module.", s)),
    ("own_name.pt", lambda s: under("my_classifier.", s)),
    ("model.pth.tar", lambda s: {"state_dict": under("module.", s), "epoch": 3}),
    ("tutorial.pt", lambda s: {"model_state_dict": s, "loss": 0.1}),
    ("model.pkl", lambda s: {"model": s, "optimizer": {"state": {0: {"step": s["3.bias"]}}}}),
    ("net.pth", lambda s: {"net": under("module.", s), "acc": 91.7}),
    ("ema.pth", lambda s: {"ema": {"module": s, "decay": 0.9}, "lr": [0.1]}),
    ("twice.pth", lambda s: {"state_dict": s, "state_dict_ema": s}),
    ("lightning.ckpt", lambda s: {"state_dict": under("model.", s), "hyper_parameters": {"a": 1}}),
    ("numbers.pth", lambda s: {"model": s, "best": np.float64(0.9), "counts": np.arange(3)}),
    ("arguments.pth", lambda s: {"model": s, "args": argparse.Namespace(lr=np.float32(0.1))}),
    ("doubles.pth", lambda s: {k: v.double() for k, v in s.items()}),
]


@pytest.mark.parametrize(("name", "wrap"), FILES, ids=[name for name, _ in FILES])
def test_weights_are_found_wherever_people_keep_them(
    tmp_path: Path, state: State, name: str, wrap: Callable[[State], Any]
) -> None:
    torch.save(wrap(state), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = started(str(tmp_path / name)).state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod."])
def test_safetensors_may_have_prefixes_too(tmp_path: Path, state: State, prefix: str) -> None:
    save_file(under(prefix, state), tmp_path / "a.safetensors")
    found = started(str(tmp_path / "a.safetensors"), "3.*").state_dict()
    assert torch.equal(found["0.weight"], state["0.weight"])
    assert not torch.equal(found["3.weight"], state["3.weight"])


@pytest.mark.parametrize("kind", ["old", "halved"])
def test_other_formats_give_the_same_weights(tmp_path: Path, state: State, kind: str) -> None:
    halves = {name: t.half() for name, t in state.items()}
    saved = halves if kind == "halved" else state
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=kind != "old")
    found = started(str(tmp_path / "a.pt")).state_dict()
    assert all(torch.equal(found[name], saved[name].to(t.dtype)) for name, t in state.items())


def test_a_network_that_has_a_prefix_itself_keeps_it(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "plain.pt")
    torch.save(under("module.", state), tmp_path / "wrapped.pt")
    for name in ("plain.pt", "wrapped.pt"):
        model = started(str(tmp_path / name), build=lambda: nn.DataParallel(network()))
        assert torch.equal(model.state_dict()["module.0.weight"], state["0.weight"])


@pytest.mark.parametrize(
    ("wrap", "left_out"),
    [
        (lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)}, "'n_averaged'"),
        (lambda s: s | {"ema_decay": torch.tensor(0.9)}, "'ema_decay'"),
        (lambda s: {"state_dict": under("model.", s) | {"loss.w": torch.ones(4)}}, "'loss.w'"),
    ],
)
def test_what_is_not_the_networks_is_left_out_by_name(
    tmp_path: Path, state: State, wrap: Callable[[State], Any], left_out: str
) -> None:
    torch.save(wrap(state), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=f"{left_out} left out"):
        model = started(str(tmp_path / "a.pt"))
    assert torch.equal(model[0].weight, state["0.weight"])


REFUSED: list[tuple[Callable[[State], Any], str]] = [
    (lambda s: {"state_dict": s, "ema": changed(s)}, "several sets .*: 'state_dict', 'ema'; save"),
    (lambda s: under("model.", s) | under("ema.", changed(s)), r"'model\.\*', 'ema\.\*'"),
    # The network has the plain names, so no prefix is taken off the others.
    (lambda s: s | under("ema.", changed(s)), r"the unexpected 'ema\.0\.weight'"),
    (lambda s: s | {"head.weight": torch.ones(2)}, r"the unexpected 'head\.weight'"),
    (lambda s: s | {"3.bias": torch.ones(10, dtype=torch.int8)}, "'3.bias' is int8 where .* float"),
    (lambda s: s | {"3.bias": torch.ones(10) * 1j}, "'3.bias' is complex64 where"),
    (lambda s: s | {"3.bias": s["3.bias"].to("meta")}, "'3.bias' is no ordinary tensor"),
    (lambda s: s | {"3.weight": s["3.weight"].to_sparse()}, "'3.weight' is no ordinary tensor"),
    (lambda s: [s], "holds no state dict"),
    (lambda s: {"epoch": 3}, "holds no state dict"),
    (lambda s: {name: t.numpy() for name, t in s.items()}, "holds no state dict"),
]


@pytest.mark.parametrize(("wrap", "part"), REFUSED, ids=[part for _, part in REFUSED])
def test_weights_that_are_not_clear_or_not_whole_are_refused(
    tmp_path: Path, state: State, wrap: Callable[[State], Any], part: str
) -> None:
    torch.save(wrap(state), tmp_path / "a.pt")
    with pytest.raises(WorkloadError, match=part):
        started(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "it is a web page"),
    ],
)
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, content: bytes, part: str) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WorkloadError, match=part):
            started(str(tmp_path / name))


class Whole(nn.Sequential):
    """A module that is pickled whole."""


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __reduce__(self) -> Any:
        return self._call


def test_code_in_a_checkpoint_never_runs_and_the_message_is_whole(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in ((os.mkdir, ("run",)), (eval, ("open('run', 'w')",))):
        torch.save({"model": state, "more": Evil(call)}, "evil.pt")
        with pytest.raises(WorkloadError, match=r"(mkdir|eval), which .*nothing of the file was"):
            started("evil.pt")
    assert not Path("run").exists()
    whole = Whole(*network())
    whole.load_state_dict(state)
    torch.save({"model": whole, "epoch": 3, "options": {"a": Evil((int, ()))}}, "it's whole.pt")
    with pytest.raises(WorkloadError, match=r"more than tensors: test_weights\.Whole, ") as caught:
        started("it's whole.pt")
    command = re.search(r'python -c "([^"]+)" (.+)$', str(caught.value))
    assert command is not None
    line = f'"{sys.executable}" -c "{command[1]}" {command[2]}'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run(line, shell=True, check=True, env=environment)
    found = started("it's whole-weights.pt").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_shards_are_put_together_and_stay_in_their_folder(tmp_path: Path, state: State) -> None:
    names = list(state)
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: t for n, t in state.items() if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    found = started(str(index)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    transfer = {"checkpoint": str(index)}
    workload = {"factory": "a:b", "transfer": transfer}
    job = JobConfig(name="a", workload=workload, prune={"criterion": "taylor", "sparsity": 0.5})
    before = pin_files(job).workload.transfer.checkpoint_digest
    save_file({n: t + 1 for n, t in state.items() if n in names[::2]}, tmp_path / files[names[0]])
    assert pin_files(job).workload.transfer.checkpoint_digest != before
    for file in ("../a.safetensors", "/a.safetensors", "a\\b.safetensors", "a.pt", 3, None, {}):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(WorkloadError, match=r"names the shard|no index of shards"):
            started(str(index))


def test_a_network_is_pruned_while_it_learns_other_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_cifar_resnet(20, 100).state_dict()
    checkpoint = tmp_path / "other.safetensors"
    save_file(source, checkpoint)
    result = prune(
        None,
        {
            "storage": str(tmp_path / "results"),
            "workload.factory": "gbp_ray.zoo:digits_resnet20",
            "workload.options": {"image_size": 8},
            "workload.transfer": {"checkpoint": str(checkpoint), "new_head": ["linear.*"]},
            "pretrain": {"epochs": 0.2, "batch_size": 64, "freeze": ["conv1.*", "bn1.*", "layer*"]},
            "finetune": {"epochs": 0.1, "batch_size": 64, "freeze": ["layer1.*"]},
            "prune.rounds": 1,
            "prune.calibration_examples": 64,
            "cluster.num_workers": 0,
        },
        is_quiet=True,
    )
    checkpoint.unlink()
    dense, pruned = result.load_model(0).state_dict(), result.load_model().state_dict()
    masks = result.load_masks()
    head = ("linear.weight", "linear.bias")
    for name, value in dense.items():
        # The head alone was trained before the first round.
        assert torch.equal(value, source[name]) == (name not in head), name
    assert not masks["layer1.0.conv1.weight"].all()
    for name in ("layer1.0.conv1.weight", "layer1.2.bn2.weight"):
        kept = masks[name] if name in masks else torch.ones_like(dense[name])
        assert torch.equal(pruned[name], dense[name] * kept), name
    assert not torch.equal(pruned["layer3.0.bn1.weight"], dense["layer3.0.bn1.weight"])
