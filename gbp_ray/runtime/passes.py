"""What the passes of a job hold at their peaks, measured on a few examples (`footprint`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gbp_ray.config.attack import Perturbation
from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import cut_rows
from gbp_ray.distributed.sums import GradientReducer
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.training.adversarial import perturb
from gbp_ray.training.footprint import Footprint, measure_footprint
from gbp_ray.training.loss import training_loss
from gbp_ray.training.optimizer import trainable_parameters, training_mode
from gbp_ray.workloads.contract import Workload, num_examples
from gbp_ray.workloads.data import take_batch

__all__ = [
    "Passes",
]


class Passes:
    """A(b) of the passes of a job, from small real ones that leave the model as it was."""

    def __init__(self, job: JobConfig, workload: Workload, model: nn.Module) -> None:
        self._job, self._workload, self._model = job, workload, model
        self._units = prunable_parameters(model, job.prune.exclude)
        self._movement = {
            unit.name: torch.zeros(unit.parameter.shape, dtype=torch.float64)
            for unit in self._units
        }
        self._trainings: dict[tuple[object, ...], Footprint] = {}
        self.forward = self._measure(self._run_forward)
        self.scoring = self._measure(self._run_scoring)
        self.backward = self._measure(self._run_backward)

    def in_training(self, recipe: Recipe) -> Footprint:
        """Measures a training pass together with a sum over all parameters that it trains."""
        # What of a recipe changes its pass.
        adversarial = recipe.adversarial
        kind = (
            *(recipe.precision, recipe.label_smoothing > 0, recipe.mixup > 0, recipe.cutmix > 0),
            *(recipe.freeze, adversarial.kind, adversarial.weight < 1),
        )
        if kind not in self._trainings:
            # One step of an attack holds what many do.
            briefly = adversarial.model_copy(update={"steps": 1, "step_size": adversarial.step})
            short = recipe.model_copy(update={"adversarial": briefly})
            self._trainings[kind] = self._measure(partial(self._run_training, short))
        return self._trainings[kind]

    def _measure(self, run: Callable[[int], object]) -> Footprint:
        modes = {module: module.training for module in self._model.modules()}
        try:
            with isolated(self._model, 0):
                return measure_footprint(run)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        return take_batch(self._workload, self._workload.train, self._indices(size), augment_seed=0)

    def _indices(self, size: int) -> Tensor:
        return torch.arange(size) % num_examples(self._workload.train)

    @torch.no_grad()
    def _run_forward(self, size: int) -> object:
        self._model.eval()
        inputs, targets = self._batch(size)
        return self._workload.loss(self._model(inputs), targets)

    def _run_training(self, recipe: Recipe, size: int) -> object:
        trainable = trainable_parameters(self._model, recipe.freeze)
        pieces = {name: cut_rows(name, p.shape, 1) for name, p in trainable.items()}
        sums = GradientReducer(
            Ranks(), trainable, trainable, pieces, [1.0], lambda gradient, weight, share: gradient
        )
        device = next(self._model.parameters()).device
        with training_mode(self._model, recipe.freeze), sums.listening(), sums.turn():
            training_loss(
                self._model, self._workload, recipe, None, self._indices(size), 0, device
            ).backward()
        return sums

    def under_attack(self) -> Footprint:
        """Measures a step of the attack that the job's networks are measured under."""
        briefly = self._job.attack.model_copy(update={"steps": 1})
        return self._measure(partial(self._run_attack, briefly))

    def _run_attack(self, attack: Perturbation, size: int) -> object:
        self._model.eval()
        inputs, targets = self._batch(size)

        def loss_of(seen: Tensor) -> Tensor:
            return self._workload.loss(self._model(seen), targets)

        return perturb(self._model, loss_of, self._workload, inputs, attack, 0, "attack")

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
        # The second probe holds what all after it do.
        probes = min(self._job.prune.hutchinson_probes, 2)
        small = {"calibration_examples": size, "calibration_batch_size": size}
        small["hutchinson_probes"] = probes
        config = self._job.prune.model_copy(update=small)
        return score(
            self._model, self._units, self._workload, config, Ranks(), movement=self._movement
        )
