"""Networks composed at random: without their removed units they compute and train alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from architectures import randomize, run
from random_networks import random_network
from structures import largest_difference, mask
from torch import Tensor, nn
from torch.optim import SGD

from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.training.passes import count_macs


def train(model: nn.Module, inputs: Tensor, masks: Mapping[str, Tensor]) -> None:
    """Takes two steps in training mode; pruned weights stay zero."""
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(2):
        outputs = run(model, inputs)[0]
        goal = torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)
        (outputs - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.masked_fill_(~masks[name], 0)


@pytest.mark.parametrize("seed", range(30))
def test_removed_and_masked_units_are_the_same_in_evaluation_and_training(seed: int) -> None:
    model, (example,) = random_network(seed)
    randomize(model)
    structure = find_structure(model, (example,), run)
    every = np.ones(structure.num_units, dtype=bool)
    assert structure.count_macs(every) == count_macs(model, example).total
    random = np.random.default_rng(seed)
    keep = random.random(structure.num_units) < 0.6
    for start, stop in zip(structure.bounds, structure.bounds[1:], strict=False):
        keep[random.choice(np.arange(start, stop), 2, replace=False)] = True
    other = (example + 5) % 11 if example.dtype == torch.long else torch.randn_like(example)
    batch = torch.cat([example, other])
    masks = mask(model, structure, keep)
    masked = copy.deepcopy(model)
    remove_units(model, structure, keep, lambda network: run(network, batch))
    with torch.no_grad():
        assert largest_difference(run(masked, batch)[0], run(model, batch)[0]) <= 1e-5
    assert structure.count_macs(keep) == count_macs(model, example).total
    assert structure.count_weights(keep) == sum(p.numel() for p in model.parameters())
    train(masked, batch, masks)
    train(model, batch, {})
    for is_training in (True, False):
        one, two = (run(net.train(is_training), batch)[0] for net in (masked, model))
        assert largest_difference(one, two) <= 3e-5
