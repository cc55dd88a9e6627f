"""The table of architectures: half of the multiply-adds go, and the function stays as masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build, run, two_examples, why_missing
from structures import largest_difference, mask
from torch import Tensor, nn

from gbp_ray.pruning.budget import Bounds, Budget, select_units
from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.cutting import shrink_structure
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.pruning.structure import Structure
from gbp_ray.training.passes import count_macs

LEAST = {"ViT of torchvision": 0.75, "Transformer encoder": 0.65}
"""What stays of the multiply-adds of those that cannot be pruned by half: nn.MultiheadAttention has
one width inside and outside, which a LayerNorm freezes."""

UNCOUNTED = {"Mixtral": "_grouped_mm"}
"""Operations that hide what they multiply."""

ROUND_TO = {"Mixtral": 8}
"""Multiples of units, where a kernel needs them."""

OUTPUTS = "the network's outputs"
FROZEN = {
    "ResNet-20 A": {"linear.weight[0]": OUTPUTS},
    "ResNet-20 B": {"12.weight[0]": OUTPUTS},
    "U-Net": {"head.weight[0]": OUTPUTS},
    "ConvNeXt": {"stem.0.weight[0]": "layer_norm in 'stem.1'"},
    "ViT": {"patch_embed.proj.weight[0]": "layer_norm in 'blocks.0.norm1'"},
    "Swin": {"patch_embed.proj.weight[0]": "layer_norm in 'patch_embed.norm'"},
    "Transformer encoder": {
        "1.layers.0.self_attn.in_proj_weight[0]": "nn.MultiheadAttention in '1.layers.0.self_attn'",
        "0.weight[0]": "layer_norm in '1.layers.0.norm1'",
    },
    "BERT": {"bert.embeddings.word_embeddings.weight[1]": "layer_norm in 'bert.embeddings.Layer"},
    "GPT-2": {"transformer.wte.weight[1]": "layer_norm in 'transformer.h.0.ln_1'"},
    "Llama 8/4": {
        "model.embed_tokens.weight[1]": "mean in 'model.layers.0.input_layernorm'",
        "lm_head.weight[0]": OUTPUTS,
    },
}
"""How reasons begin by axis: outputs, residual streams before norms, attention of torch."""

CASES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why_missing(name)), reason=why_missing(name)))
    for name in ARCHITECTURES
]


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return torch.cat([output.float().flatten(1) for output in run(model, *inputs)], dim=1)


def choose(name: str, structure: Structure) -> np.ndarray:
    """Draws scores, and keeps the units that a budget of half of the multiply-adds leaves."""
    every = np.ones(structure.num_units, dtype=bool)
    target = LEAST.get(name, 0.5) * structure.count_macs(every)
    scores = np.random.default_rng(0).random(structure.num_units)
    bounds = Bounds(round_to=ROUND_TO.get(name, 1))
    return select_units(structure, scores, every, Budget("macs", target), bounds=bounds).kept_U


def check_macs(name: str, model: nn.Module, inputs: tuple[Tensor, ...], expected: int) -> None:
    counted = count_macs(model, inputs[0])
    if name in UNCOUNTED:
        assert UNCOUNTED[name] in counted.fault
    else:
        assert counted.total == expected


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_multiply_adds_go_and_the_function_stays(name: str) -> None:
    model, inputs = build(name)
    structure = find_structure(model, inputs, run)
    every = np.ones(structure.num_units, dtype=bool)
    dense_macs = structure.count_macs(every)
    check_macs(name, model, inputs, dense_macs)
    assert structure.count_weights(every) == sum(p.numel() for p in model.parameters())
    for axis, reason in FROZEN.get(name, {}).items():
        assert structure.frozen[axis].startswith(reason)

    kept_U = choose(name, structure)
    batch = two_examples(inputs)
    dense = outputs_of(model, batch)
    mask(model, structure, kept_U)
    masked = outputs_of(model, batch)
    assert largest_difference(masked[:1], masked[1:]) > 3e-4
    assert largest_difference(dense, masked) > 1e-3

    found = remove_units(model, structure, kept_U, lambda network: run(network, *batch))
    assert found.difference <= 1e-5
    assert largest_difference(masked, outputs_of(model, batch)) <= 1e-5
    macs = structure.count_macs(kept_U)
    assert macs <= LEAST.get(name, 0.5) * dense_macs
    check_macs(name, model, inputs, macs)
    assert structure.count_weights(kept_U) == sum(p.numel() for p in model.parameters())
    smaller = shrink_structure(structure, kept_U)
    assert smaller.count_macs(np.ones(smaller.num_units, dtype=bool)) == macs
