"""What every rank computes in test_tied_weights: trials of networks that share kernels."""

from __future__ import annotations

from typing import Any

import torch
from sharded_program import trial
from torch import nn

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.workloads.networks import RecurrentConvNet
from gbp_ray.workloads.tying import tie_weights

_WIDTH = 6  # The second layer's kernel, 12 x 12 x 9, is a group of its own in shards.


def recurrent() -> nn.Module:
    """Uses each kernel twice; one of them is gathered twice in a pass."""
    return RecurrentConvNet(2, 3, _WIDTH, 2, True)


def tied_blank(*, is_tied: bool = True) -> nn.Module:
    """Ties kernels on the meta device."""
    with torch.device("meta"):
        model = RecurrentConvNet(2, 3, _WIDTH, 2, False)
    if is_tied:
        tie_weights(model, [["layer1.kernels.*"], ["layer2.kernels.*"]])
    return model


def tied_program(ranks: Ranks) -> dict[Any, Any]:
    """Runs trials in one piece and in shards."""
    return {
        ("fisher", "replicated"): trial(ranks, "replicated", recurrent, criterion="fisher"),
        ("fisher", "fsdp"): trial(ranks, "fsdp", recurrent, criterion="fisher"),
        ("blank", "fsdp"): trial(ranks, "fsdp", tied_blank),
    }
