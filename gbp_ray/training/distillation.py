"""The teacher of a fine-tuning, its outputs and its loss.

The teacher is the dense network of the trial, or a checkpoint of the same network. It computes its
outputs for each part of a batch, or, where that is the same and cheaper, once for every training
example beforehand. That takes examples that always look alike (neither augmented nor mixed),
outputs only (features are too large to keep), a fine-tuning that meets each example at least once,
and a table of at most 256 MB. The job and the workload decide, never a machine: a network's outputs
for an example may differ in the last bit with the batch it is part of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.config.job import JobConfig
from gbp_ray.config.schema import nearest_name
from gbp_ray.config.training import DistillationConfig, Recipe
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import is_sharded
from gbp_ray.errors import ConfigError
from gbp_ray.training.network import load_rows
from gbp_ray.training.optimizer import num_steps
from gbp_ray.training.progress import OnProgress, deal_batches, ignore_progress
from gbp_ray.workloads.batch import Batch, forward, kind_of, logits_of, tensors_in
from gbp_ray.workloads.checks import Checked
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import compare_readings, cut_batches, derive_seed, take_batch
from gbp_ray.workloads.losses import cross_entropy_options
from gbp_ray.workloads.weight_files import read_weights
from gbp_ray.workloads.weights import TEACHER, find_misfits, fit_state, tensor_state

__all__ = [
    "Teacher",
    "TeacherOutputs",
    "answer_bytes",
    "capture_outputs",
    "check_distillation",
    "distillation_loss",
    "feature_distance",
    "is_taught_once",
    "prepare_teacher",
]

_SECTION = "finetune.distillation"
_MOST_BYTES = 2**28


def prepare_teacher(
    teacher: Teacher,
    job: JobConfig,
    workload: Workload,
    ranks: Ranks,
    on_progress: OnProgress = ignore_progress,
) -> Teacher:
    """Makes the dense network the teacher that a job asks for. Communicates.

    Args:
        teacher: The dense network, which teaches if the job names no checkpoint.
    """
    config = job.finetune.distillation
    if config.teacher:
        ranks.run_collectively(
            lambda: load_rows(teacher.model, _read_fitting(config, teacher.model))
        )
    if not is_taught_once(job, workload, teacher.model, ranks):
        return teacher
    known = _ask_once(teacher.model, workload, ranks, job.workload.eval_batch_size, on_progress)
    return replace(teacher, known=known)


def _read_fitting(config: DistillationConfig, model: nn.Module) -> dict[str, Tensor]:
    file = read_weights(config.teacher, TEACHER, config.teacher_digest)
    own = tensor_state(model)
    state = fit_state(file, own)
    if faults := find_misfits(state, own):
        raise ConfigError(
            f"{TEACHER} = '{config.teacher}': does not fit the network: {faults}; give a "
            "checkpoint of this very network"
        )
    return state


def is_taught_once(
    job: JobConfig, workload: Workload, model: nn.Module, ranks: Ranks | None = None
) -> bool:
    """Decides whether outputs are computed beforehand; see the module's docstring. Communicates."""
    config, recipe = job.finetune.distillation, job.finetune
    looks_alike = workload.augment is None and recipe.mixup == 0 and recipe.cutmix == 0
    if config.weight == 0 or config.features or not looks_alike:
        return False
    total = num_examples(workload.train)
    steps = job.num_finetunings * num_steps(recipe, workload, recipe.epochs)
    if steps * min(recipe.batch_size, total) < total:
        return False
    ranks = ranks or Ranks()
    if not ranks.broadcast_object(ranks.run_collectively(lambda: _are_drawn_alike(workload))):
        return False
    return answer_bytes(workload, model, ranks) <= _MOST_BYTES


def _are_drawn_alike(workload: Workload) -> bool:
    """Compares a few training examples under two seeds: a data set may augment its own items."""
    if isinstance(workload.train, tuple) and workload.prepare is None:
        return True
    return compare_readings(workload, workload.train, 0, 1)[0]


def answer_bytes(workload: Workload, model: nn.Module, ranks: Ranks | None = None) -> int:
    """Computes the size of a teacher's outputs for all examples. Communicates if it is sharded."""
    answer = _ask(model, workload, range(1), (ranks or Ranks()).device)
    return num_examples(workload.train) * answer[0].numel() * answer.element_size()


def _ask_once(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    on_progress: OnProgress,
) -> Tensor:
    """Computes a teacher's outputs for every training example, (examples, ...). Communicates."""
    total = num_examples(workload.train)
    batches = cut_batches(total, batch_size)
    table: list[Tensor] = []

    def ask_own() -> None:
        for item in deal_batches(ranks, len(batches), "teach", on_progress):
            # All ranks need to know what an answer looks like, and pass through a sharded network.
            if item is not None or not table or is_sharded(model):
                batch = batches[item or 0]
                answers = _ask(model, workload, batch, ranks.device)
                if not table:
                    table.append(answers.new_zeros(total, *answers.shape[1:]))
                if item is not None:
                    table[0][batch.start : batch.stop] = answers

    ranks.run_collectively(ask_own, communicates=is_sharded(model))
    return ranks.all_reduce_disjoint(table[0])


@torch.no_grad()
def _ask(model: nn.Module, workload: Workload, batch: range, device: torch.device) -> Tensor:
    indices = torch.arange(batch.start, batch.stop)
    examples = take_batch(workload, workload.train, indices, device=device)
    with isolated(model.eval(), derive_seed("teach", batch.start)):
        answers: Tensor = logits_of(forward(model, workload, examples))
    return answers


def check_distillation(config: DistillationConfig, checked: Checked) -> None:
    """Refuses networks without logits or the named modules, and teachers that do not fit."""
    if not config.is_on:
        return
    _check_features(checked, config.features)
    outputs = logits_of(checked.outputs)
    is_logits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim >= 2
    targets, workload = checked.first_batch.targets, checked.workload
    is_named = outputs is not checked.outputs
    if config.weight > 0 and is_logits and outputs.ndim > 2 and (is_named or workload.collate):
        raise ConfigError(
            f"{_SECTION}.weight: outputs of positions ({kind_of(outputs)}) would count padding as "
            f"well; set it to 0, and name modules in {_SECTION}.features"
        )
    if isinstance(targets, Tensor) and targets.is_floating_point():
        # Shares of classes are targets of cross entropy only.
        is_logits = is_logits and cross_entropy_options(workload.loss) is not None
    if config.weight > 0 and not is_logits:
        raise ConfigError(
            f"{_SECTION}.weight: needs a network that gives logits of shape (examples, classes); "
            "set it to 0"
        )
    if config.teacher:
        _read_fitting(config, checked.model)


def _check_features(checked: Checked, names: Sequence[str]) -> None:
    """Refuses modules that the network does not have, or whose outputs are no tensors."""
    model, key = checked.model, f"{_SECTION}.features"
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if name not in paths:
            raise ConfigError(
                f"{key} = '{name}': the network has no such module{nearest_name(name, paths)}"
            )
    if not names:
        return
    with (
        torch.no_grad(),
        in_mode(model, is_training=False),
        isolated(model, 0),
        capture_outputs(model, names) as outputs,
    ):
        forward(model, checked.workload, checked.take_example())
    for name in names:
        if not isinstance(outputs.get(name), Tensor):
            raise ConfigError(
                f"{key} = '{name}': this module is not called, or gives something else than one "
                "tensor; name another"
            )


@contextmanager
def capture_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of modules by name; of a module called several times, the last one."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Computes the mean over modules of the mean squared difference of their outputs.

    Source:
        Romero et al. 2015 (1412.6550), eq. 3, between networks of one shape, without a regressor.
    """
    return torch.stack(
        [functional.mse_loss(found[name].float(), wanted[name].float()) for name in wanted]
    ).mean()


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs for some examples, None if only features count, and its features."""

    outputs: Tensor | None
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A network whose outputs the one in training learns to give; never trained itself.

    Attributes:
        known: Its outputs for every training example, (examples, ...), if computed beforehand.
    """

    model: nn.Module
    config: DistillationConfig
    known: Tensor | None = None

    def forward(
        self, workload: Workload, batch: Batch, indices: Tensor, draws: int, recipe: Recipe
    ) -> TeacherOutputs:
        """Computes its outputs for a prepared batch of the examples `indices`, (B,)."""
        if self.known is not None:
            device = next(tensors_in(batch.inputs)).device
            return TeacherOutputs(self.known[indices.to(self.known.device)].to(device))
        self.model.eval()
        with (
            torch.no_grad(),
            isolated(self.model, derive_seed(draws, "teacher")),
            capture_outputs(self.model, self.config.features) as features,
        ):
            outputs = logits_of(forward(self.model, workload, batch, recipe.precision))
        return TeacherOutputs(outputs if self.config.weight > 0 else None, features)

    def distilled_loss(
        self, loss: Tensor, outputs: Any, features: Mapping[str, Tensor], lesson: TeacherOutputs
    ) -> Tensor:
        """Adds the distance of outputs and features from the teacher's to a loss."""
        if lesson.outputs is not None:
            weight = self.config.weight
            imitation = distillation_loss(
                logits_of(outputs), lesson.outputs, self.config.temperature
            )
            loss = (1 - weight) * loss + weight * imitation
        if lesson.features:
            distance = feature_distance(features, lesson.features)
            loss = loss + self.config.features_weight * distance
        return loss


def distillation_loss(outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Computes T^2 * mean over examples of KL(softmax(taught / T) || softmax(outputs / T)).

    T^2 keeps its gradient of the size of the labels' own, whatever the temperature.

    Args:
        outputs: (B, classes, ...) logits of the network in training.
        taught: The teacher's, likewise.

    Source:
        Hinton, Vinyals and Dean 2015 (1503.02531), section 2.
    """
    divergence = functional.kl_div(
        functional.log_softmax(outputs / temperature, dim=1),
        functional.log_softmax(taught / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(dim=1).mean()
