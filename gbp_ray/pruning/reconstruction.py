"""Reconstruction: the kept weights of each layer refitted to the dense network's outputs.

Layer after layer, from input to output: x are the rows of a layer's inputs in the pruned network,
whose earlier layers are refitted already, and y those of its outputs, without bias, in the dense
network. Least squares takes, for each output, the kept weights w that minimise

    sum over rows (w x - y)^2 + damping * mean(diag(H)) * |w - w0|^2,    H = sum of x x^T,

w0 being the dense network's weights. This needs no labels, no gradients and no training, only sums
over rows, added in batch order: so all ranks hold the same bits. Layer-wise refitting to the dense
network's outputs is the method of He et al. 2017 (arXiv 1707.06168), section 3.1, there for
channels.

What a layer's outputs go through next is reckoned with, see `continuations`: where BatchNorm scales
them, or they are added to what came in earlier, y is chosen so that the sum is the dense network's.
Where ReLU comes next, further solutions follow, each of which gives up what the one before shows
that ReLU hides.

SparseGPT minimises the same and takes of a decision only how many weights each layer, or each group
of a convolution, loses: which ones it chooses itself. Its own weights are near the least, and least
squares on its masks is exact. The algebra is in `refit`.

Shape suffixes: R = rows, K = groups of a convolution, C = inputs of one group, M = outputs of one
group, S = kept inputs of one output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.gathering import unsharded_in_turn
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import copy_network, gather_whole, is_sharded, shard_like
from gbp_ray.distributed.sums import OrderedSum
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.activations import (
    Lane,
    PatchLayer,
    equal_supports,
    find_patch_layers,
    in_step,
    outputs_at,
    rows_of,
)
from gbp_ray.pruning.calibration import Calibration
from gbp_ray.pruning.continuations import Continuation, find_continuations
from gbp_ray.pruning.refit import is_mostly_kept, least_squares, solve_whole, sparsegpt
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import derive_seed

__all__ = [
    "MANY_SUPPORTS",
    "Moments",
    "check_reconstruction",
    "kind_of",
    "layers_to_refit",
    "reconstruct",
    "refit_some",
]

_TRIAL_EXAMPLES = 4
MANY_SUPPORTS = 8
"""So many sets that keep most inputs make the solution on all inputs worth its cost."""

Result = TypeVar("Result")
_Follows = Mapping[str, Continuation]


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of one layer.

    Attributes:
        inputs: sum x x^T, (K, C, C) float64.
        products: sum x y^T, (K, C, M) float64.
    """

    inputs: Tensor
    products: Tensor

    def check(self, name: str) -> None:
        """Checks that they are finite; raises PruneError that names the layer's weight."""
        if not all(bool(torch.isfinite(values).all()) for values in (self.inputs, self.products)):
            raise PruneError(
                f"reconstruction of '{name}': the layer's inputs or its outputs in the dense "
                "network are NaN or infinite on the calibration examples; check the data and the "
                "dense network"
            )


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    *,
    masks: Mapping[str, Tensor],
    masks_before: Mapping[str, Tensor] = MappingProxyType({}),
    kept_rows: Mapping[str, Tensor],
    dense_weights: Mapping[str, Tensor],
    seed: int = 0,
    on_progress: OnProgress = ignore_progress,
) -> dict[str, Tensor]:
    """Refits the weights of a pruned network in place, layer after layer. Communicates.

    Args:
        dense: The network before pruning, whose outputs are matched.
        masks: Of the network as it is, by parameter name; those of other layers keep all.
        masks_before: Those before the decision, by parameter name, without which sparsegpt may
            choose among all weights; what they prune stays pruned.
        kept_rows: Outputs of the dense network's layers that are left, bool by parameter name,
            where whole units have left the network.
        dense_weights: Weights of the dense network by parameter name, in the shapes of the network
            as it is.
        seed: Of the job; the examples are those of scoring.
        on_progress: Told of layers.

    Returns:
        The masks that sparsegpt chose, by parameter name, sharded like `masks`; as many weights are
        pruned in each. Empty for least_squares.

    Raises:
        PruneError: A layer's inputs are not finite.
    """
    calibration = Calibration(workload, config, seed, ranks)
    with ExitStack() as stack:
        plain, teacher = (stack.enter_context(unsharded_in_turn(net)) for net in (model, dense))
        for net in (plain, teacher):
            stack.enter_context(in_mode(net, is_training=False))
            stack.enter_context(isolated(net, derive_seed(seed, "reconstruct")))
        is_parted = is_sharded(model) or is_sharded(dense)
        refit = _Refit(plain, teacher, workload, calibration, ranks, config, seed, is_parted)
        # All ranks look at the same examples, as they must solve for each layer as often.
        examples = ranks.run_collectively(lambda: refit.read(0))
        layers, follows = refit.pass_through(partial(refit.look_through, examples))
        del examples
        if config.reconstruct == "least_squares":
            masks_before = {}
        return refit.refit_all(
            layers, follows, masks, masks_before, kept_rows, dense_weights, on_progress
        )


def check_reconstruction(model: nn.Module, workload: Workload, config: PruneConfig) -> None:
    """Refits a copy of a network on a few examples, to see before any training that it can.

    All passes stop at all layers. Of layers that are alike, the first one is solved for.

    Raises:
        ConfigError: The network has no layer that can be refitted.
        PruneError: Its passes cannot be stopped in step, or a layer cannot be solved for.
    """
    # So few examples say nothing of some inputs, which damping only has to bridge here.
    damping = max(config.reconstruct_damping, 0.01)
    sizes = {"calibration_examples": _TRIAL_EXAMPLES, "calibration_batch_size": 2}
    steps = min(config.reconstruct_relu_steps, 1)
    few = config.model_copy(
        update={**sizes, "reconstruct_damping": damping, "reconstruct_relu_steps": steps}
    )
    twin, ranks = copy_network(model), Ranks(device=next(model.parameters()).device)
    refit = _Refit(twin, model, workload, Calibration(workload, few, 0, ranks), ranks, few, 0)
    with in_mode(twin, is_training=False), in_mode(model, is_training=False), isolated(model, 0):
        layers, follows = refit.look_through(refit.read(0))
        if not layers:
            raise ConfigError(
                f"prune.reconstruct = {config.reconstruct}: the network has no linear layer or "
                "convolution that a pass calls once and that owns its weight; set it to none"
            )
        weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
        masks = {key: torch.ones_like(value, dtype=torch.bool) for key, value in weights.items()}
        first: dict[Hashable, str] = {}
        for name, layer in layers.items():
            after = follows[0].get(name)
            first.setdefault(name if after is None else kind_of(layer, after), name)
        refit.refit_all(layers, follows, masks, {}, {}, weights, only=first.values())


def kind_of(layer: PatchLayer, after: Continuation) -> Hashable:
    """Returns a key that is equal for layers that take the same steps to solve for."""
    geometry = layer.extra_repr(), tuple(layer.weight.shape), layer.weight.dtype
    return type(layer), *geometry, after.is_rectified, after.summand is None, len(after.steps)


def refit_some(
    model: nn.Module,
    dense: nn.Module,
    workload: Workload,
    config: PruneConfig,
    layers: Mapping[str, PatchLayer],
    follows: _Follows,
    masks: Mapping[str, Tensor],
    only: Collection[str],
    on_progress: OnProgress,
) -> None:
    """Refits some layers of a network in place, on one rank, in order to measure what that takes.

    Args:
        layers: All that `reconstruct` would refit, of `model`.
        follows: What follows them, in both networks.
        only: Names of those to refit. The passes end at the last of them.
    """
    ranks = Ranks(device=next(model.parameters()).device)
    refit = _Refit(
        model, dense, workload, Calibration(workload, config, 0, ranks), ranks, config, 0
    )
    dense_weights = dict(dense.named_parameters())
    with in_mode(model, is_training=False), in_mode(dense, is_training=False), isolated(model, 0):
        refit.refit_all(
            *(layers, [follows, follows], masks, {}, {}, dense_weights, on_progress),
            only=only,
            last=[name for name in layers if name in only][-1],
        )


def layers_to_refit(model: nn.Module, run: Callable[[], object]) -> dict[str, PatchLayer]:
    """Finds the layers that can be refitted: those that a pass calls, once, with one tensor.

    Args:
        run: Passes through the network.
    """
    layers = find_patch_layers(model)
    counts = dict.fromkeys(layers, 0)

    def count(name: str, module: nn.Module, given: tuple[object, ...]) -> None:
        is_tensor = len(given) == 1 and isinstance(given[0], Tensor)
        counts[name] += 1 if is_tensor else 2

    hooks = [m.register_forward_pre_hook(partial(count, name)) for name, m in layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if counts[name] == 1}


@dataclass(frozen=True)
class _Rows:
    """One batch's rows of a layer.

    Attributes:
        inputs: In the pruned network, (K, R, C).
        targets: Of its outputs, (R, O).
        summand: What is added to them behind the layer's norms, (R, O), where that is known.
    """

    inputs: Tensor
    targets: Tensor
    summand: Tensor | None

    def squares(self) -> Tensor:
        """Sums x x^T, (K, C, C)."""
        return self.inputs.mT @ self.inputs

    def products(self) -> Tensor:
        """Sums x y^T, (K, C, M)."""
        y = self.targets.unflatten(1, (len(self.inputs), -1))
        return self.inputs.mT @ y.transpose(0, 1)

    def free(self, weight: Tensor, after: Continuation) -> _Rows:
        """Gives up, of the targets, what ReLU hides with the weights as they are."""
        weights = weight.flatten(1).unflatten(0, (len(self.inputs), -1))  # (K, M, C)
        outputs = (self.inputs @ weights.mT).transpose(0, 1).flatten(1)
        targets = after.free_below_zero(self.targets, outputs, self.summand)
        return replace(self, targets=targets)


@dataclass(frozen=True)
class _Refit:
    model: nn.Module
    dense: nn.Module
    workload: Workload
    calibration: Calibration
    ranks: Ranks
    config: PruneConfig
    seed: int
    is_sharded: bool = False

    def read(self, item: int) -> Batch:
        with self.calibration.batch(self.model, item, self.ranks.device) as batch:
            return batch

    def run(self, network: nn.Module, batch: Batch) -> None:
        forward(network, self.workload, batch)

    def pass_through(self, action: Callable[[], Result]) -> Result:
        """Runs an action that passes through a network. Communicates."""
        return self.ranks.run_collectively(action, communicates=self.is_sharded)

    def seed_stretch(self, item: int, number: int) -> None:
        torch.manual_seed(derive_seed(self.calibration.draws(item), "reconstruct", number))

    def look_through(self, batch: Batch) -> tuple[dict[str, PatchLayer], list[_Follows]]:
        """Finds the layers, and what follows them in the network and in the dense one."""
        layers = layers_to_refit(self.model, partial(self.run, self.model, batch))
        return layers, [
            find_continuations(network, at, partial(self.run, network, batch))
            for network, at in ((self.model, layers), (self.dense, self.originals_of(layers)))
        ]

    def originals_of(self, layers: Mapping[str, PatchLayer]) -> dict[str, PatchLayer]:
        """Returns the same layers of the dense network."""
        found = find_patch_layers(self.dense)
        return {name: found[name] for name in layers}

    def refit_all(
        self,
        layers: Mapping[str, PatchLayer],
        follows: list[_Follows],
        masks: Mapping[str, Tensor],
        masks_before: Mapping[str, Tensor],
        kept_rows: Mapping[str, Tensor],
        dense_weights: Mapping[str, Tensor],
        on_progress: OnProgress = ignore_progress,
        *,
        only: Collection[str] | None = None,
        last: str | None = None,
    ) -> dict[str, Tensor]:
        """Refits layers in the order of a pass; returns new masks by parameter name.

        Args:
            only: Names of those that are solved for; the passes stop at the others, too.
            last: As of `in_step`.
        """
        originals = self.originals_of(layers)
        # A rank without a batch passes batch 0, to come to the layers like the others.
        turns = list(self.ranks.deal(len(self.calibration.batches)))
        items = [0 if item is None else item for item in turns]
        batches = self.ranks.run_collectively(lambda: [self.read(item) for item in items])
        summands = {after.summand for after in follows[0].values() if after.summand is not None}
        lanes = [
            Lane(
                at,
                partial(self.run, network, batch),
                partial(self.seed_stretch, item),
                {name: network.get_submodule(name) for name in summands},
            )
            for item, batch in zip(items, batches, strict=True)
            for network, at in ((self.model, layers), (self.dense, originals))
        ]
        done: set[str] = set()
        chosen: dict[str, Tensor] = {}

        def meet(name: str, inputs: list[Tensor]) -> None:
            layer, key = layers[name], f"{name}.weight"
            after, of_dense = (following[name] for following in follows)
            if only is not None and name not in only:
                for lane in lanes:
                    lane.kept.pop(after.summand or "", None)
                return
            steps = self.config.num_relu_steps * after.is_rectified
            rows: Iterable[_Rows] = (
                self._rows_of(
                    *(layer, originals[name], inputs[2 * turn : 2 * turn + 2], after, of_dense),
                    *(lanes[2 * turn : 2 * turn + 2], kept_rows.get(key)),
                    derive_seed(self.seed, "positions", name, items[turn]),
                )
                for turn in range(len(turns))
            )
            if steps:
                rows = list(rows)  # they are read again
            both = self._sum(turns, (torch.cat([of.squares(), of.products()], 2) for of in rows))
            moments = Moments(both[..., : both.shape[1]], both[..., both.shape[1] :])
            moments.check(key)
            weight = layer.weight.detach()
            everything = torch.ones_like(weight, dtype=torch.bool)
            kept = gather_whole(masks.get(key, everything))
            dense = gather_whole(dense_weights[key].detach())
            is_exact = True
            if self.config.reconstruct != "least_squares" and key in masks:
                before = gather_whole(masks_before.get(key, everything))
                begun = self._solve(moments, before, dense)
                solved, kept = self._choose(moments.inputs, kept, before, begun)
                chosen[key] = shard_like(kept, masks[key])
                is_exact = self.config.reconstruct != "sparsegpt"
            if is_exact:
                solved = self._solve(moments, kept, dense)
                for _ in range(steps):
                    found = solved.to(weight.dtype)
                    products = self._sum(turns, (of.free(found, after).products() for of in rows))
                    moments = replace(moments, products=products)
                    solved = self._solve(moments, kept, dense)
            weight.copy_(solved)
            done.add(name)
            on_progress(Progress("reconstruct", len(done), len(layers)))

        self.ranks.run_collectively(
            lambda: in_step(lanes, meet, last), communicates=self.ranks.world_size > 1
        )
        return chosen

    def _rows_of(
        self,
        layer: PatchLayer,
        original: PatchLayer,
        inputs: list[Tensor],
        after: Continuation,
        of_dense: Continuation,
        lanes: list[Lane],
        kept_rows: Tensor | None,
        seed: int,
    ) -> _Rows:
        most = self.config.reconstruct_positions
        x = rows_of(layer, inputs[0], most, seed)  # (R, K, C)
        x0 = rows_of(original, inputs[1], most, seed)
        groups = x0.shape[1]
        weight0 = original.weight.detach().flatten(1).unflatten(0, (groups, -1))
        y = torch.einsum("rkc,kmc->rkm", x0, weight0).flatten(1)
        kept = torch.ones_like(y[0], dtype=torch.bool) if kept_rows is None else kept_rows
        kept = kept.to(y.device)
        own: Tensor | None = None
        error: Tensor | None = None
        if after.summand is not None and after.summand == of_dense.summand:
            own, wanted = (
                outputs_at(net, follow.summand_of(lane.kept.pop(after.summand)), most, seed)
                for net, follow, lane in zip(
                    (layer, original), (after, of_dense), lanes, strict=True
                )
            )
            error = wanted[:, kept] - own
        y = after.targets(y[:, kept], (of_dense.scale[kept], of_dense.shift[kept]), error)
        return _Rows(x.transpose(0, 1), y, own)

    def _sum(self, turns: list[int | None], parts: Iterable[Tensor]) -> Tensor:
        """Sums a tensor of each batch in float64, in the order of batches. Communicates."""
        sums: OrderedSum | None = None
        for item, part in zip(turns, parts, strict=True):
            vector = part.reshape(-1).float()
            if sums is None:
                number = len(self.calibration.batches)
                sums = OrderedSum(self.ranks, len(vector), number, torch.float64)
            sums.add(None if item is None else vector)
        assert sums is not None
        return sums.result().view(part.shape)

    def _solve(self, moments: Moments, mask: Tensor, dense: Tensor) -> Tensor:
        """Solves for one layer, the outputs of equal supports dealt to ranks. Communicates."""
        num_groups, _, num_outputs = moments.products.shape
        kept = mask.reshape(num_groups, num_outputs, -1)
        jobs = [
            (group, columns)
            for group, kept_MC in enumerate(kept)
            for columns, _ in equal_supports(kept_MC)
        ]
        solved = torch.zeros(kept.shape, dtype=torch.float64, device=mask.device)
        dense = dense.reshape(kept.shape)
        damping = self.config.reconstruct_damping
        num_served = Counter(
            group for group, columns in jobs if is_mostly_kept(kept[group, columns[0]])
        )
        wholes: dict[int, tuple[Tensor, Tensor] | None] = {}
        for number in self.ranks.deal(len(jobs)):
            if number is not None:
                group, columns = jobs[number]
                sums = (moments.inputs[group], moments.products[group])
                if group not in wholes:
                    is_worth = num_served[group] >= MANY_SUPPORTS
                    wholes[group] = solve_whole(*sums, dense[group], damping) if is_worth else None
                solved[group, columns] = least_squares(
                    *(*sums, columns, kept[group, columns[0]], dense[group, columns], damping),
                    wholes[group],
                )
        return self.ranks.all_reduce_disjoint(solved).view(mask.shape)

    def _choose(
        self, inputs: Tensor, mask: Tensor, before: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prunes one layer by sparsegpt, its groups dealt to ranks. Communicates.

        Args:
            inputs: Of `Moments`.
            weights: The solution on those kept before.

        Returns:
            Weights and mask, shaped like `mask`, with as many weights pruned in each group.
        """
        num_groups = len(inputs)
        num_outputs = len(mask) // num_groups
        pruned = (~mask).view(num_groups, -1).sum(dim=1).tolist()
        # n:m groups are inputs of one place in the kernel.
        places = torch.arange(mask[0].numel()).view(mask.shape[1], -1)
        order = places.T.flatten() if self.config.pattern else None
        both = torch.zeros(2, *mask.flatten(1).shape, dtype=torch.float64, device=mask.device)
        for group in self.ranks.deal(num_groups):
            if group is not None:
                rows = slice(group * num_outputs, (group + 1) * num_outputs)
                both[0, rows], both[1, rows] = sparsegpt(
                    *(inputs[group], weights.flatten(1)[rows], before.flatten(1)[rows]),
                    int(pruned[group]),
                    self.config.reconstruct_damping,
                    pattern=self.config.pattern,
                    order=order,
                )
        solved, kept = self.ranks.all_reduce_disjoint(both)
        return solved.view(mask.shape), kept.view(mask.shape).bool()
