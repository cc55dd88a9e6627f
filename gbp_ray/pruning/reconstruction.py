"""Reconstruction: the kept weights of each layer refitted to the dense network's outputs.

Layer after layer, from input to output: x are the rows of a layer's inputs in the pruned network,
whose earlier layers are refitted already, and y those of its outputs, without bias, in the dense
network. Least squares takes, for each output, the kept weights w that minimise

    sum over rows (w x - y)^2 + damping * mean(diag(H)) * |w - w0|^2,    H = sum of x x^T,

w0 being the dense network's weights. This needs no labels, no gradients and no training, only sums
over rows, added in batch order: so all ranks hold the same bits. Layer-wise refitting to the dense
network's outputs is the method of He et al. 2017 (arXiv 1707.06168), section 3.1, there for
channels.

Shape suffixes: R = rows, K = groups of a convolution, C = inputs of one group, M = outputs of one
group, S = kept inputs of one output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import copy_network, gather_whole, is_sharded, unsharded
from gbp_ray.distributed.sums import OrderedSum
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.activations import Lane, PatchLayer, find_patch_layers, in_step, rows_of
from gbp_ray.pruning.calibration import Calibration
from gbp_ray.training.network import load_rows
from gbp_ray.training.progress import OnProgress, Progress, ignore_progress
from gbp_ray.workloads.batch import Batch, forward
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import derive_seed

__all__ = ["Moments", "check_reconstruction", "layers_to_refit", "least_squares", "reconstruct"]

_TRIAL_EXAMPLES = 4


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of one layer.

    Attributes:
        inputs: sum x x^T, (K, C, C) float64.
        products: sum x y^T, (K, C, M) float64.
    """

    inputs: Tensor
    products: Tensor


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    *,
    masks: Mapping[str, Tensor],
    kept_rows: Mapping[str, Tensor],
    dense_weights: Mapping[str, Tensor],
    seed: int = 0,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Refits the weights of a pruned network in place, layer after layer. Communicates.

    Args:
        dense: The network before pruning, whose outputs are matched.
        masks: Of the network as it is, by parameter name; those of other layers keep all.
        kept_rows: Outputs of the dense network's layers that are left, bool by parameter name,
            where whole units have left the network.
        dense_weights: Weights of the dense network by parameter name, in the shapes of the network
            as it is.
        seed: Of the job; the examples are those of scoring.
        on_progress: Told of layers.

    Raises:
        PruneError: A layer's inputs are not finite.
    """
    calibration = Calibration(workload, config, seed, ranks)
    with ExitStack() as stack:
        plain, teacher = (stack.enter_context(unsharded(net)) for net in (model, dense))
        for net in (plain, teacher):
            stack.enter_context(in_mode(net, is_training=False))
            stack.enter_context(isolated(net, derive_seed(seed, "reconstruct")))
        refit = _Refit(plain, teacher, workload, calibration, ranks, config, seed)
        layers = layers_to_refit(plain, partial(refit.run, plain, refit.read(0)))
        keys = [f"{name}.weight" for name in layers]
        found = refit.refit_all(
            layers,
            {key: gather_whole(masks[key]) for key in keys if key in masks},
            kept_rows,
            {key: gather_whole(dense_weights[key].detach()) for key in keys},
            on_progress,
        )
    if is_sharded(model):
        load_rows(model, found)


def check_reconstruction(model: nn.Module, workload: Workload, config: PruneConfig) -> None:
    """Refits a copy of a network on a few examples, to see before any training that it can.

    Raises:
        ConfigError: The network has no layer that can be refitted.
        PruneError: Its passes cannot be stopped in step, or a layer cannot be solved for.
    """
    few = config.model_copy(
        update={"calibration_examples": _TRIAL_EXAMPLES, "calibration_batch_size": 2}
    )
    twin, ranks = copy_network(model), Ranks(device=next(model.parameters()).device)
    refit = _Refit(twin, model, workload, Calibration(workload, few, 0, ranks), ranks, few, 0)
    with in_mode(twin, is_training=False), in_mode(model, is_training=False), isolated(model, 0):
        layers = layers_to_refit(twin, partial(refit.run, twin, refit.read(0)))
        if not layers:
            raise ConfigError(
                f"prune.reconstruct = {config.reconstruct}: the network has no linear layer or "
                "convolution that a pass calls once and that owns its weight; set it to none"
            )
        weights = {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}
        refit.refit_all(layers, {}, {}, weights, ignore_progress)


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
class _Refit:
    model: nn.Module
    dense: nn.Module
    workload: Workload
    calibration: Calibration
    ranks: Ranks
    config: PruneConfig
    seed: int

    def read(self, item: int) -> Batch:
        with self.calibration.batch(self.model, item, self.ranks.device) as batch:
            return batch

    def run(self, network: nn.Module, batch: Batch) -> None:
        forward(network, self.workload, batch)

    def seed_stretch(self, item: int, number: int) -> None:
        torch.manual_seed(derive_seed(self.calibration.draws(item), "reconstruct", number))

    def refit_all(
        self,
        layers: Mapping[str, PatchLayer],
        masks: Mapping[str, Tensor],
        kept_rows: Mapping[str, Tensor],
        dense_weights: Mapping[str, Tensor],
        on_progress: OnProgress,
    ) -> dict[str, Tensor]:
        """Refits layers in the order of a pass; returns the new weights by parameter name."""
        found_dense = find_patch_layers(self.dense)
        originals = {name: found_dense[name] for name in layers}
        # A rank without a batch passes batch 0, to come to the layers like the others.
        turns = list(self.ranks.deal(len(self.calibration.batches)))
        items = [0 if item is None else item for item in turns]
        batches = self.ranks.run_collectively(lambda: [self.read(item) for item in items])
        lanes = [
            Lane(
                at,
                partial(self.run, network, batch),
                partial(self.seed_stretch, item),
            )
            for item, batch in zip(items, batches, strict=True)
            for network, at in ((self.model, layers), (self.dense, originals))
        ]
        found: dict[str, Tensor] = {}

        def meet(name: str, inputs: list[Tensor]) -> None:
            layer, key = layers[name], f"{name}.weight"
            sums: OrderedSum | None = None
            for turn, item in enumerate(turns):
                vector, shapes = self._moments_of(
                    *(layer, originals[name], inputs[2 * turn : 2 * turn + 2]),
                    *(derive_seed(self.seed, "positions", name, items[turn]), kept_rows.get(key)),
                )
                if sums is None:
                    sums = OrderedSum(
                        self.ranks, len(vector), len(self.calibration.batches), torch.float64
                    )
                sums.add(None if item is None else vector)
            assert sums is not None
            parts = sums.result().split([shape.numel() for shape in shapes])
            moments = Moments(*(p.view(s) for p, s in zip(parts, shapes, strict=True)))
            weight = layer.weight.detach()
            mask = masks.get(key, torch.ones_like(weight, dtype=torch.bool))
            solved = self._solve(key, moments, mask, dense_weights[key])
            weight.copy_(solved)
            found[key] = solved.to(weight.dtype)
            on_progress(Progress("reconstruct", len(found), len(layers)))

        self.ranks.run_collectively(
            lambda: in_step(lanes, meet), communicates=self.ranks.world_size > 1
        )
        return found

    def _moments_of(
        self,
        layer: PatchLayer,
        original: PatchLayer,
        inputs: list[Tensor],
        seed: int,
        kept_rows: Tensor | None,
    ) -> tuple[Tensor, tuple[torch.Size, torch.Size]]:
        """Computes one batch's part of the sums: a flat vector, and the shapes in it."""
        most = self.config.reconstruct_positions
        x = rows_of(layer, inputs[0], most, seed)  # (R, K, C)
        x0 = rows_of(original, inputs[1], most, seed)
        groups = x0.shape[1]
        weight0 = original.weight.detach().flatten(1).unflatten(0, (groups, -1))
        y = torch.einsum("rkc,kmc->rkm", x0, weight0).flatten(1)
        if kept_rows is not None:
            y = y[:, kept_rows.to(y.device)]
        y = y.unflatten(1, (x.shape[1], -1))
        x_K = x.transpose(0, 1)
        squares = x_K.mT @ x_K
        products = x_K.mT @ y.transpose(0, 1)
        flat = torch.cat([squares.reshape(-1), products.reshape(-1)]).float()
        return flat, (squares.shape, products.shape)

    def _solve(self, name: str, moments: Moments, mask: Tensor, dense: Tensor) -> Tensor:
        """Solves for one layer, the outputs of equal supports dealt to ranks. Communicates."""
        for values in (moments.inputs, moments.products):
            if not bool(torch.isfinite(values).all()):
                raise PruneError(
                    f"reconstruction of '{name}': the layer's inputs or its outputs in the dense "
                    "network are NaN or infinite on the calibration examples; check the data and "
                    "the dense network"
                )
        jobs = list(_by_support(moments.inputs.shape[0], mask.flatten(1)))
        solved = torch.zeros(mask.flatten(1).shape, dtype=torch.float64, device=mask.device)
        for number in self.ranks.deal(len(jobs)):
            if number is not None:
                group, rows = jobs[number]
                solved[rows] = least_squares(
                    moments.inputs[group],
                    moments.products[group],
                    rows - group * moments.products.shape[2],
                    mask.flatten(1)[rows[0]],
                    dense.flatten(1)[rows],
                    self.config.reconstruct_damping,
                )
        return self.ranks.all_reduce_disjoint(solved).view(mask.shape)


def _by_support(num_groups: int, mask: Tensor) -> Iterable[tuple[int, Tensor]]:
    """Yields (group of a convolution, its outputs with equal masks), in order of first outputs."""
    per_group = len(mask) // num_groups
    rows_of_support: dict[tuple[int, bytes], list[int]] = {}
    for row, kept in enumerate(mask.cpu().numpy()):
        key = (row // per_group, kept.tobytes())
        rows_of_support.setdefault(key, []).append(row)
    for (group, _), rows in rows_of_support.items():
        yield group, torch.tensor(rows, device=mask.device)


def least_squares(
    inputs: Tensor,
    products: Tensor,
    columns: Tensor,
    support: Tensor,
    start: Tensor,
    damping: float,
) -> Tensor:
    """Solves for outputs that keep the same inputs, exactly.

    Args:
        inputs: sum x x^T, (C, C) float64.
        products: sum x y^T, (C, M) float64.
        columns: Which of the M outputs.
        support: (C,) bool, the kept inputs.
        start: (outputs, C), the weights that damping draws to.
        damping: Relative to the mean of the diagonal of `inputs`.

    Returns:
        (outputs, C) float64, zero outside of the support.

    Raises:
        PruneError: The kept inputs are linearly dependent, and damping is 0.
    """
    start = start.double()
    solution = torch.zeros_like(start)
    (kept,) = support.nonzero(as_tuple=True)
    strength = damping * inputs.diagonal().mean()
    if len(kept) == 0:
        return solution
    system = inputs[kept][:, kept]
    system.diagonal().add_(strength)
    target = products[kept][:, columns] + strength * start[:, kept].T
    factor, fault = torch.linalg.cholesky_ex(system)
    if int(fault):
        if float(inputs.diagonal().max()) == 0:  # Nothing ever comes in, so nothing is known.
            solution[:, kept] = start[:, kept]
            return solution
        raise PruneError(
            "prune.reconstruct_damping: the kept inputs of a layer are linearly dependent; raise it"
        )
    solution[:, kept] = torch.cholesky_solve(target, factor).T
    return solution
