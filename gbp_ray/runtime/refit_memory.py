"""Predict what refitting kept weights holds and sends (`pruning.reconstruction`).

All calibration batches of a rank pass through both networks side by side, and all passes stop in
front of each layer. Either all but one stand there while that one goes on to the next layer, or all
stand there while the layer is solved for.

Two runs are counted on few examples: a forward pass, in stretches from layer to layer, and a refit,
of which only what is outside of its passes is seen, as they run in threads of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig, sparsity_schedule
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import copy_network
from gbp_ray.pruning.activations import PatchLayer, rows_of
from gbp_ray.pruning.continuations import Continuation, find_continuations
from gbp_ray.pruning.reconstruction import MANY_SUPPORTS, layers_to_refit, reconstruct
from gbp_ray.training.footprint import MOST_MEASURED, Footprint, measure_stretches
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
    order: list[PatchLayer] = []

    def run(size: int = MOST_MEASURED) -> None:
        forward(model, workload, batch.part(slice(0, size), MOST_MEASURED))

    with in_mode(model, is_training=False), isolated(model, 0), torch.no_grad():
        found = layers_to_refit(model, run)
        follows = find_continuations(model, found, run)
        row_bytes = _count_rows(found, follows, config.reconstruct_positions, run)

        def stop_at_each(size: int, mark: Callable[[], None]) -> None:
            def stop(layer: PatchLayer, given: object) -> None:
                order.append(layer)
                mark()

            hooks = [layer.register_forward_pre_hook(stop) for layer in found.values()]
            try:
                run(size)
            finally:
                for hook in hooks:
                    hook.remove()

        passing = measure_stretches(stop_at_each)
    again = config.num_relu_steps
    steps = {layer: again * follows[name].is_rectified for name, layer in found.items()}
    masks = {} if config.unit_kinds else _keep_few_outputs(found, config)
    twin, own_thread = copy_network(model), threading.get_ident()

    def refit(size: int, mark: Callable[[], None]) -> None:
        # Before the passes there is one more in this thread, to find the layers.
        hook = twin.register_forward_hook(
            lambda *_: mark() if threading.get_ident() == own_thread else None
        )
        given = {"calibration_examples": num_batches * size, "calibration_batch_size": size}
        try:
            reconstruct(
                # Few examples decide little.
                *(twin, model, workload),
                config.model_copy(
                    update={
                        **given,
                        "reconstruct_damping": 1.0,
                        "reconstruct_relu_steps": min(config.reconstruct_relu_steps, 1),
                    }
                ),
                Ranks(),
                masks=masks,
                kept_rows={},
                dense_weights=dict(model.named_parameters()),
                on_progress=lambda progress: mark(),
            )
        finally:
            hook.remove()

    solving = measure_stretches(refit)[-len(found) - 1 : -1]
    sizes: list[int] = []
    batch.map(lambda tensor: _note_bytes(tensor, sizes))
    return RefitMemory(
        tuple(order[: len(found)]),
        tuple(passing),
        tuple(solving),
        tuple(row_bytes[layer] * (steps[layer] > 0) for layer in order[: len(found)]),
        tuple(steps[layer] for layer in order[: len(found)]),
        num_batches,
        sum(sizes) // MOST_MEASURED,
        sum(buffer.nbytes for buffer in model.buffers()),
    )


def _count_rows(
    layers: Mapping[str, PatchLayer],
    follows: Mapping[str, Continuation],
    most: int,
    run: Callable[[], None],
) -> dict[PatchLayer, int]:
    """Counts the bytes of a layer's rows, targets and summands that an example makes."""
    found: dict[PatchLayer, int] = {}

    def look(name: str, layer: PatchLayer, given: tuple[Tensor, ...]) -> None:
        rows = rows_of(layer, given[0], most)
        outputs = len(rows) * len(layer.weight) * rows.itemsize
        with_summand = 1 + (follows[name].summand is not None)
        found[layer] = (rows.nbytes + with_summand * outputs) // MOST_MEASURED

    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


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
