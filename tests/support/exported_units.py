"""Workloads whose networks lose whole units and are exported, by a name that jobs can give."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_networks import ConvNet, draw, images
from torch import Tensor, nn
from unit_rounds import Attending

import gbp_ray
from gbp_ray.config.job import JobConfig
from gbp_ray.runtime.api import PruneResult
from gbp_ray.workloads.contract import Workload

HALF = {"granularity": "channel", "target": {"macs": 0.5}}


class LstmTagger(nn.Module):
    """Labels each step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8, batch_first=True)
        self.hidden = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.rnn(inputs)
        return self.head(torch.relu(self.hidden(states))).transpose(1, 2)


class Scaled(nn.Module):
    """Scales its hidden neurons by a buffer that no state dict holds; two layers are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(72, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.third.weight = self.second.weight
        self.head = nn.Linear(12, 3)
        self.register_buffer("scale", torch.linspace(1, 2, 12), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs.flatten(1))) * self.scale
        return self.head(torch.relu(self.third(torch.relu(self.second(hidden)))))


class Named(nn.Module):
    """Refuses to go without any feature of its first layer; the second is free."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(72, 12), nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs.flatten(1)))
        if hidden.shape[1] != 12:
            raise ValueError("wants 12 features")
        return self.head(torch.relu(self.second(hidden)))


NETWORKS: dict[str, Any] = {
    "conv": partial(ConvNet, dropout=0.0),
    "attending": Attending,
    "lstm": LstmTagger,
    "scaled": Scaled,
    "named": Named,
}


def pictures(network: str) -> Workload:
    return images(NETWORKS[network])


def steps(network: str) -> Workload:
    inputs = draw(40, 5, 3, seed=3)
    labels = (inputs.cumsum(dim=1)[:, :, 0] > 0).long() + (inputs[:, :, 1] > 0).long()
    return Workload(NETWORKS[network], (inputs[:24], labels[:24]), (inputs[24:], labels[24:]))


def prune_units(storage: Path, network: str, **prune: Any) -> PruneResult:
    """Prunes one of the networks in a round, or answers from the storage."""
    factory = "steps" if network == "lstm" else "pictures"
    fields = {
        "name": network,
        "storage": str(storage),
        "workload": {
            "factory": f"exported_units:{factory}",
            "options": {"network": network},
        },
        "pretrain": {"epochs": 1, "batch_size": 12},
        "prune": {
            **{"criterion": "taylor", "calibration_examples": 20, "batchnorm_examples": 24},
            **{**HALF, **prune},
        },
        "finetune": {"epochs": 1, "batch_size": 12, "learning_rate": 0.01},
        "cluster": {"num_workers": 0},
    }
    return gbp_ray.prune(JobConfig(**fields), is_quiet=True)


def code_of(network: str) -> str:
    """Writes code, free of the package, after which `Network` is the class of a network."""
    made = NETWORKS[network]
    kind = made.func if isinstance(made, partial) else made
    return (
        "import torch\nfrom torch import Tensor, nn\nfrom torch.nn import functional\n\n\n"
        f"{inspect.getsource(kind)}\n\nNetwork = {kind.__name__}\n"
    )
