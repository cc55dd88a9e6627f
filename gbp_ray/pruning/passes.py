"""What the passes of a job hold at their peaks, measured on a few examples (`footprint`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gbp_ray.config import JobConfig
from gbp_ray.pruning.folding import GradientSums
from gbp_ray.pruning.footprint import Footprint, measure_footprint
from gbp_ray.pruning.masks import prunable_parameters
from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.saliency import score
from gbp_ray.pruning.slices import cut_rows
from gbp_ray.workload import Workload, num_examples, take_batch

__all__ = ["Passes"]


class Passes:
    """A(b) of the passes of a job, from small real ones that leave the model as it was."""

    def __init__(self, job: JobConfig, workload: Workload, model: nn.Module) -> None:
        self._job, self._workload, self._model = job, workload, model
        self._units = prunable_parameters(model, job.prune.exclude)
        self._movement = {
            unit.name: torch.zeros(unit.parameter.shape, dtype=torch.float64)
            for unit in self._units
        }
        self.forward = self._measure(self._run_forward)
        self.training = self._measure(self._run_training) if self._trains() else None
        self.scoring = self._measure(self._run_scoring)
        self.backward = self._measure(self._run_backward)

    def _trains(self) -> bool:
        return self._job.pretrain.epochs > 0 or self._job.finetune.epochs > 0

    def _measure(self, run: Callable[[int], object]) -> Footprint:
        modes = {module: module.training for module in self._model.modules()}
        try:
            with isolated(self._model, 0):
                return measure_footprint(run)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        indices = torch.arange(size) % num_examples(self._workload.train)
        return take_batch(self._workload, self._workload.train, indices, augment_seed=0)

    @torch.no_grad()
    def _run_forward(self, size: int) -> object:
        self._model.eval()
        inputs, targets = self._batch(size)
        return self._workload.loss(self._model(inputs), targets)

    def _run_training(self, size: int) -> object:
        self._model.train()
        trainable = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        pieces = {name: cut_rows(name, p.shape, 1) for name, p in trainable.items()}
        sums = GradientSums(
            Ranks(), trainable, trainable, pieces, [1.0], lambda gradient, weight, share: gradient
        )
        inputs, targets = self._batch(size)
        with sums.listening(), sums.turn():
            self._workload.loss(self._model(inputs), targets).backward()
        return sums

    def _run_backward(self, size: int) -> object:
        """Takes the gradients of the prunable weights and drops them as they arrive."""
        self._model.eval()

        def drop(leaf: Tensor) -> None:
            leaf.grad = None

        frozen = [p for p in self._model.parameters() if p.requires_grad]
        hooks = []
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for unit in self._units:
                unit.parameter.requires_grad_(True)
                hooks.append(unit.parameter.register_post_accumulate_grad_hook(drop))
            inputs, targets = self._batch(size)
            self._workload.loss(self._model(inputs), targets).backward()
        finally:
            for hook in hooks:
                hook.remove()
            for unit in self._units:
                unit.parameter.requires_grad_(False)
            for parameter in frozen:
                parameter.requires_grad_(True)
        return None

    def _run_scoring(self, size: int) -> object:
        small = {"calibration_examples": size, "calibration_batch_size": size}
        config = self._job.prune.model_copy(update=small)
        return score(
            self._model, self._units, self._workload, config, Ranks(), movement=self._movement
        )
