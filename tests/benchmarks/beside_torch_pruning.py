"""Ours and Torch-Pruning 1.6.1 on the architectures of the test table: half of the multiply-adds.

    python tests/benchmarks/beside_torch_pruning.py [--only NAME ...] [--seconds 60] [--gib 4]

Both get the same network with random weights (tests/support/architectures.py) and choose at random.
Each architecture and side runs in a process of its own, with a limit of time and of memory.

How Torch-Pruning's result is judged: all weights of the network are distinct, so that the weights
of its result say which positions of each axis it kept. The same positions are kept in the dense
network, all other weights are set to zero, and both outputs for two inputs in eval mode are
compared: "same" is a largest difference of at most 1e-5 of the greatest magnitude. Weights that
are none of the dense network's are said so. Its ratio of channels rises in steps of 0.05 until at
most half of the multiply-adds are left. It is told the number of heads of attention modules, as its
examples do, and to leave the last layer alone; the modules' numbers of heads are set afterwards.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import numpy as np
import torch
from architectures import ARCHITECTURES, build, run, two_examples, why_missing
from torch import Tensor, nn

from gbp_ray.pruning.budget import Bounds, Budget, select_units
from gbp_ray.pruning.graph.find import find_structure
from gbp_ray.pruning.removal.remove import remove_units
from gbp_ray.training.passes import count_macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--side", choices=["ours", "theirs"], help="run one, in this process")
    options = parser.parse_args()
    if options.side:
        limit = options.gib * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](options.only[0])))
        return
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one thread")
    print("| architecture | ours | Torch-Pruning |\n|---|---|---|")
    for name in options.only:
        if why := why_missing(name):
            print(f"| {name} | {why} | {why} |")
            continue
        cells = [in_process(name, side, options) for side in ("ours", "theirs")]
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


def in_process(name: str, side: str, options: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--side", side, "--gib", str(options.gib), "--only", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done in {options.seconds} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        return f"fails: {lines[-1][:110]}".replace("|", "/")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return f"{found['outcome']}, MACs {found['macs']}"


def share_of(model: nn.Module, inputs: tuple[Tensor, ...], dense: Any) -> float:
    return count_macs(model, inputs[0]).total / dense.total if dense.total else float("nan")


def distinct(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Builds a network of which no two weights are equal."""
    model, inputs = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    return model, inputs


def outcome_of(masked: Tensor, removed: Tensor) -> str:
    if masked.shape != removed.shape:
        return f"outputs of shape {tuple(removed.shape)}, not {tuple(masked.shape)}"
    difference = float((masked - removed).abs().max() / masked.abs().max())
    return "same" if difference <= 1e-5 else f"DIFFERS by {difference:.2g}"


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return run(model, *inputs)[0]


def ours(name: str) -> dict[str, str]:
    model, inputs = distinct(name)
    structure = find_structure(model, inputs, run)
    every = np.ones(structure.num_units, dtype=bool)
    dense = structure.count_macs(every)
    one_each = np.concatenate([np.arange(group.num_units) == 0 for group in structure.groups])
    share = max(0.5, 1.1 * structure.count_macs(one_each) / dense)
    scores = np.random.default_rng(0).random(structure.num_units)
    bounds = Bounds(round_to=8 if name == "Mixtral" else 1)
    choice = select_units(structure, scores, every, Budget("macs", share * dense), bounds=bounds)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for own, mask in structure.masks(choice.kept_U, parameters).items():
            parameters[own].masked_fill_(~mask, 0)
    batch = two_examples(inputs)
    masked = outputs_of(model, batch)
    remove_units(model, structure, choice.kept_U, lambda network: run(network, *batch))
    outcome = outcome_of(masked, outputs_of(model, batch))
    return {"outcome": outcome, "macs": f"{choice.cost / dense:.3f}"}


def theirs(name: str) -> dict[str, str]:
    share = 1.0
    for ratio in np.arange(0.1, 0.96, 0.05):
        model, inputs = distinct(name)
        dense = count_macs(model, inputs[0])
        if not dense.total:
            return {"outcome": "MACs are not counted", "macs": "-"}
        original = {key: value.detach().clone() for key, value in model.named_parameters()}
        prune(model, inputs, float(ratio))
        share = share_of(model, inputs, dense)
        if share == 0.0:
            outputs_of(model, inputs)  # raises what keeps it from being counted
        if share <= 0.5:
            break
    kept = kept_positions(original, model)
    macs = f"{share:.3f}" if share <= 0.5 else f"{share:.3f} at most"
    if isinstance(kept, str):
        return {"outcome": kept, "macs": macs}
    batch = two_examples(inputs)
    removed = outputs_of(model, batch)
    masked, _ = distinct(name)
    with torch.no_grad():
        for key, parameter in masked.named_parameters():
            for dim, positions in enumerate(kept[key]):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[positions] = False
                parameter.index_fill_(dim, gone.nonzero()[:, 0], 0)
    return {"outcome": outcome_of(outputs_of(masked, batch), removed), "macs": macs}


def prune(model: nn.Module, inputs: tuple[Tensor, ...], ratio: float) -> None:
    import torch_pruning

    torch.manual_seed(1)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    last = (linear or convs)[-1]
    if convs and list(model.modules()).index(convs[-1]) > list(model.modules()).index(last):
        last = convs[-1]
    heads, owners = {}, []
    for module in model.modules():
        number = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        named = {n: child for n, child in module.named_children() if isinstance(child, nn.Linear)}
        for own in ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q", "k", "v"):
            if isinstance(number, int) and own in named:
                heads[named[own]] = number
                owners.append((module, named[own]))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs[0] if len(inputs) == 1 else inputs,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=ratio,
        ignored_layers=[last],
        num_heads=heads,
        output_transform=lambda outputs: sum(
            tensor.float().sum() for tensor in run(lambda: outputs)
        ),
    )
    pruner.step()
    for module, layer in owners:
        for attribute in ("num_heads", "num_attention_heads"):
            if hasattr(module, attribute):
                setattr(module, attribute, pruner.num_heads.get(layer, heads[layer]))
        if hasattr(module, "head_dim"):
            module.head_dim = layer.out_features // (3 if layer.out_features % 3 == 0 else 1)
            module.head_dim //= max(1, getattr(module, "num_heads", 1))


def kept_positions(original: dict[str, Tensor], model: nn.Module) -> dict[str, list[Any]] | str:
    """Recovers by value which positions of each axis are left, or says what is not."""
    kept = {}
    found = dict(model.named_parameters())
    for key, old in original.items():
        if key not in found:
            return f"no parameter {key} any more"
        new = found[key].detach()
        if new.ndim != old.ndim:
            return f"{key} has {new.ndim} axes, not {old.ndim}"
        order = old.reshape(-1).argsort()
        values = old.reshape(-1)[order]
        at = torch.searchsorted(values, new.reshape(-1)).clamp_max(len(values) - 1)
        if not torch.equal(values[at], new.reshape(-1)):
            return f"{key} has other weights"
        places = np.unravel_index(order[at].numpy(), old.shape)
        kept[key] = [torch.from_numpy(np.unique(axis)) for axis in places]
    return kept


if __name__ == "__main__":
    main()
