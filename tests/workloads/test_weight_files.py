"""Loading checkpoints, and refusing those of other models."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from small_data import message_of, truncate

from gbp_ray.workloads import cifar10_resnet20, cifar10_resnet56
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.data import seeded, take_batch
from gbp_ray.workloads.networks import build_cifar_resnet


@pytest.fixture
def state():
    with seeded(7):
        return build_cifar_resnet(20).state_dict()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("dense.safetensors", save_file),
        ("dense.pt", torch.save),
        (
            "dense.th",
            lambda state, path: torch.save(
                {"state_dict": {f"module.{k}": v for k, v in state.items()}, "best": 91.7}, path
            ),
        ),
    ],
)
def test_checkpoint_is_loaded_into_every_fresh_model(tiny, tmp_path, state, name, save):
    kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save(kept, tmp_path / name)
    before = torch.random.get_rng_state()
    workload = cifar10_resnet20(str(tiny), checkpoint=str(tmp_path / name))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = workload.build_model(), workload.build_model()
    first.conv1.weight.data.zero_()
    for key, value in kept.items():
        assert torch.equal(second.state_dict()[key], value), key


def drop(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop("linear.weight", "linear.bias"), "it lacks 'linear.weight', 'linear.bias'"),
        (lambda s: s | {"fc.weight": torch.ones(1)}, "it has the unexpected 'fc.weight'"),
        (
            lambda s: s | {"linear.weight": torch.ones(100, 64)},
            "'linear.weight' has shape (100, 64) where the model has (10, 64)",
        ),
        (lambda s: {"w": torch.ones(1)}, "and 94 more; it has the unexpected 'w'"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tiny, tmp_path, state, change, expected):
    path = tmp_path / "other.safetensors"
    save_file(change(state), path)
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(path))
    assert text.startswith(f"workload.options.checkpoint = '{path}': does not fit the model: ")
    assert expected in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.safetensors", None, "no such file"),
        ("x.safetensors", b"", "is truncated or not a safetensors file"),
        ("x.safetensors", b"half", "is truncated or not a safetensors file"),
        ("x.pt", b"half", "is truncated or holds more than tensors"),
        ("x.pt", pickle.dumps(Path("a"), protocol=2), "holds more than tensors: pathlib.PosixPath"),
        ("x.onnx", b"half", "unknown kind of file '.onnx' (allowed: .safetensors, .pt"),
    ],
)
def test_unreadable_checkpoint_is_refused(tiny, tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(tmp_path / name))
    assert text.startswith("workload.options.checkpoint = ")
    assert expected in text


def test_truncated_and_foreign_checkpoints_are_refused(tiny, tmp_path, state):
    path = tmp_path / "dense.safetensors"
    save_file(state, path)
    truncate(path)
    assert "is truncated" in message_of(cifar10_resnet20, str(tiny), checkpoint=str(path))
    torch.save([1, 2], tmp_path / "list.pt")
    text = message_of(cifar10_resnet20, str(tiny), checkpoint=str(tmp_path / "list.pt"))
    assert "holds no state dict" in text


@pytest.mark.slow
def test_published_resnet20_reaches_its_accuracy(real_data, tmp_path):
    (shard,) = (real_data / "cifar10").glob("test-*.parquet")
    (tmp_path / "test.parquet").symlink_to(shard)
    # Decoding the 50,000 training images takes long, and nobody looks at them.
    pq.write_table(pq.read_table(shard).slice(0, 10), tmp_path / "train.parquet")
    checkpoint = str(real_data / "checkpoints" / "resnet20.safetensors")
    workload = cifar10_resnet20(str(tmp_path), checkpoint=checkpoint)
    # In this layout and so many at a time a CPU takes half as long.
    model = workload.build_model().eval().to(memory_format=torch.channels_last)
    right = 0
    with torch.no_grad():
        for indices in torch.arange(2_000).split(100):
            inputs, targets = take_batch(workload, workload.test, indices)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            right += int(workload.count_correct(model(inputs), targets))
    # 91.65 % of these, 91.73 % of all. An image may lie on an edge that another kernel's rounding
    # crosses.
    assert abs(right - 1833) <= 1


def test_published_resnet56_fits(real_data, tiny):
    checkpoint = str(real_data / "checkpoints" / "resnet56.safetensors")
    workload = cifar10_resnet56(str(tiny), checkpoint=checkpoint)
    check_workload(workload, workload.build_model(), 2)
