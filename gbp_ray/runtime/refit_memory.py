"""Predict what refitting kept weights holds and sends (`pruning.reconstruction`).

All calibration batches of a rank pass through both networks side by side, and all passes stop in
front of each layer. Either all but one stand there while that one goes on to the next layer, or all
stand there while the layer is solved for.

Two runs are counted on few examples: a forward pass, in stretches from layer to layer, and a refit
of the first layer of each kind, of which only what is outside of its passes is seen, as they run in
threads of their own. Layers are of one kind where shapes and steps are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig, sparsity_schedule
from gbp_ray.distributed.ranks import isolated
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.pruning.activations import PatchLayer, find_patch_layers, rows_of
from gbp_ray.pruning.continuations import Continuation, find_continuations
from gbp_ray.pruning.reconstruction import MANY_SUPPORTS, kind_of, layers_to_refit, refit_some
from gbp_ray.training.footprint import FEW_MEASURED, MOST_MEASURED, Footprint, measure_stretches
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import cut_batches

__all__ = ["RefitMemory", "measure_refit"]


@dataclass(frozen=True)
class RefitMemory:
    """The measured passes of a refit.

    Attributes:
        layers: Those that are refitted, in the order of a pass.
        passing: The stretches of a forward pass: one in front of each layer, and the rest.
        solving: Of each layer what is outside of the passes: batches, rows, sums, solutions.
        row_bytes: Of each layer that is solved for again, its rows, which stay, for each example.
        steps: Of each layer, further solutions after the first.
        num_batches: In `solving`; the second one finds the sums of the first.
        example_bytes: Of a batch, for each example.
        buffer_bytes: Of one network.
    """

    layers: tuple[PatchLayer, ...]
    passing: tuple[Footprint, ...]
    solving: tuple[Footprint, ...]
    row_bytes: tuple[int, ...]
    steps: tuple[int, ...]
    num_batches: int
    example_bytes: int
    buffer_bytes: int

    def moments(self, num_examples: int, batch_size: int, world_size: int) -> list[dict[str, int]]:
        """List what the rank with most examples holds, from one moment to the next."""
        sizes = [len(cut) for cut in cut_batches(num_examples, batch_size)]
        turns = -(-len(sizes) // world_size)
        # A rank without a batch passes the first one.
        sizes += [sizes[0]] * (turns * world_size - len(sizes))
        size, examples = sizes[0], max(sum(sizes[r::world_size]) for r in range(world_size))
        batches = examples * self.example_bytes
        found: list[dict[str, int]] = []
        for number, stretch in enumerate(self.passing):
            # In front of the layer before, and of this one; each batch passes both networks.
            ends = stretch.lines[0], stretch.lines[-1]
            stopped, others = (
                [round(fixed * (2 * turns - k) + each * (2 * examples - k * size)) for k in (0, 1)]
                for fixed, each in ends
            )
            found.append(
                {
                    "batches": batches,
                    "stopped passes": max(stopped[1], others[1]),
                    "pass": stretch.peak_bytes(size),
                    "buffers": 2 * self.buffer_bytes,
                }
            )
            if number == len(self.layers):
                break
            layer = self.layers[number]
            each = self.row_bytes[number]
            counted = self.num_batches * size * (self.example_bytes + each)
            solving = self.solving[number].peak_bytes(size) - counted
            if world_size > 1:
                # A slice of the sums stays, and all slices are gathered, then put together.
                num_sums = count_sums(layer)
                gathered = 16 * num_sums + 2 * self.buffer_bytes
                solving = max(solving, gathered) + 8 * num_sums // world_size
            moment = {"batches": batches, "stopped passes": others[0], "solving": solving}
            found.append({**moment, "rows": examples * each})
        return found

    def sent_bytes(self, turns: int, world_size: int) -> int:
        """Compute what a rank sends: sums in float32, then they and the solutions in float64."""
        sent = 0
        for layer, steps in zip(self.layers, self.steps, strict=True):
            part = -(-layer.weight.numel() // world_size)
            share = -(-count_sums(layer) // world_size) + steps * part
            sent += (4 * turns + 8) * share + 16 * (1 + steps) * part
        return (world_size - 1) * sent


def count_sums(layer: PatchLayer) -> int:
    """Count the numbers that are summed over the rows of a layer: x x^T and x y^T."""
    num_inputs = layer.weight[0].numel()
    num_groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return num_groups * num_inputs**2 + layer.weight.numel()


def measure_refit(
    model: nn.Module,
    workload: Workload,
    config: PruneConfig,
    take: Callable[[int], Batch],
    turns: int,
) -> RefitMemory:
    """Measure a refit of a network that is not sharded and is left as it is.

    A few outputs of each layer are solved for, as they are in turn: each keeps the share of its
    inputs that the first round keeps of all weights. Of whole units all outputs keep the same.

    Args:
        workload: A few examples of it are enough.
        take: Reads a batch of so many of them.
        turns: Batches of a rank.
    """
    batch, num_batches = take(MOST_MEASURED), min(turns, 2)
    order: list[str] = []

    def run(size: int = FEW_MEASURED) -> None:
        forward(model, workload, batch.part(slice(0, size), MOST_MEASURED))

    with in_mode(model, is_training=False), isolated(model, 0), torch.no_grad():
        layers = layers_to_refit(model, run)
        follows = find_continuations(model, layers, run)
        row_bytes, kinds = _look_at_rows(layers, follows, config.reconstruct_positions, run)

        def stop_at_each(size: int, mark: Callable[[], None]) -> None:
            def stop(name: str, layer: PatchLayer, given: object) -> None:
                order.append(name)
                mark()

            hooks = [
                layer.register_forward_pre_hook(partial(stop, name))
                for name, layer in layers.items()
            ]
            try:
                run(size)
            finally:
                for hook in hooks:
                    hook.remove()

        passing = measure_stretches(stop_at_each)
    names = order[: len(layers)]
    again = config.num_relu_steps
    steps = {name: again * follows[name].is_rectified for name in names}
    masks = {} if config.unit_kinds else _keep_few_outputs(layers, config)
    first: dict[Hashable, str] = {}
    for name in names:
        first.setdefault(kinds[name], name)
    twin = copy_network(model)
    twins = find_patch_layers(twin)
    small = {"reconstruct_damping": 1.0}  # few examples decide little
    small["reconstruct_relu_steps"] = min(config.reconstruct_relu_steps, 1)

    def refit(size: int, mark: Callable[[], None]) -> None:
        given = {"calibration_examples": num_batches * size, "calibration_batch_size": size}
        refit_some(
            *(twin, model, workload, config.model_copy(update={**small, **given})),
            {name: twins[name] for name in names},
            *(follows, masks, first.values(), lambda progress: mark()),
        )

    # The last stretch follows the last layer. The first one includes how batches are read.
    measured = measure_stretches(refit)[:-1]
    chooses = config.reconstruct != "least_squares"
    chosen = {name: chooses * layers[name].weight.numel() for name in names}
    by_kind, before = dict[Hashable, Footprint](), 0
    for (kind, name), footprint in zip(first.items(), measured, strict=True):
        by_kind[kind] = footprint.plus(-before)
        before += chosen[name]
    # New masks stay, of the layers before.
    ends = accumulate((chosen[name] for name in names), initial=0)
    solving = [by_kind[kinds[name]].plus(end) for name, end in zip(names, ends, strict=False)]
    sizes: list[int] = []
    batch.map(lambda tensor: _note_bytes(tensor, sizes))
    return RefitMemory(
        tuple(layers[name] for name in names),
        tuple(passing),
        tuple(solving),
        tuple(row_bytes[name] * (steps[name] > 0) for name in names),
        tuple(steps[name] for name in names),
        num_batches,
        sum(sizes) // MOST_MEASURED,
        sum(buffer.nbytes for buffer in model.buffers()),
    )


def _look_at_rows(
    layers: Mapping[str, PatchLayer],
    follows: Mapping[str, Continuation],
    most: int,
    run: Callable[[], None],
) -> tuple[dict[str, int], dict[str, Hashable]]:
    """Counts the bytes of a layer's rows, targets and summands for each example; finds its kind."""
    found: dict[str, int] = {}
    kinds: dict[str, Hashable] = {}

    def look(name: str, layer: PatchLayer, given: tuple[Tensor, ...]) -> None:
        rows = rows_of(layer, given[0], most)
        outputs = len(rows) * len(layer.weight) * rows.itemsize
        with_summand = 1 + (follows[name].summand is not None)
        found[name] = (rows.nbytes + with_summand * outputs) // FEW_MEASURED
        kinds[name] = (kind_of(layer, follows[name]), given[0].shape, given[0].dtype)

    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found, kinds


def _keep_few_outputs(layers: Mapping[str, PatchLayer], config: PruneConfig) -> dict[str, Tensor]:
    """Keeps other inputs of each of a few outputs, as many as make a difference."""
    ramp = (config.schedule, config.sparsity, config.rounds, config.ramp_rounds)
    density = 1 - sparsity_schedule(*ramp)[0]
    masks = {}
    for name, layer in layers.items():
        mask = torch.zeros_like(layer.weight, dtype=torch.bool)
        num_inputs = mask[0].numel()
        first = torch.arange(num_inputs) < max(1, round(density * num_inputs))
        for number, row in enumerate(mask.flatten(1)[:MANY_SUPPORTS]):
            row.copy_(first.roll(number))
        masks[f"{name}.weight"] = mask
    return masks


def _note_bytes(tensor: Tensor, sizes: list[int]) -> Tensor:
    sizes.append(tensor.nbytes)
    return tensor
