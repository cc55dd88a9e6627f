"""A whole trial from a checkpoint of other classes, read back where the checkpoint is gone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from gbp_ray import prune
from gbp_ray.workloads.networks import build_cifar_resnet


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
