"""Networks that start from the weights of another training, but for a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gbp_ray.config import TransferConfig, WorkloadConfig
from gbp_ray.errors import ConfigError, WorkloadError
from gbp_ray.weights import find_misfits, start_from
from gbp_ray.workload import load_workload, seeded


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
