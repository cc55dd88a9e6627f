"""Where the teacher of a fine-tuning comes from, and whether it answers once or each time.

The teacher is the dense network of the trial, or a checkpoint of the same network. It answers each
part of a batch anew, or, where that is the same and cheaper, once for every training example
beforehand. That takes examples that always look alike (nothing augments or mixes them), outputs
alone (features are too large to keep), a fine-tuning that meets each example at least once, and a
table of at most 256 MB. All of it is decided by the job and the workload, never by a machine, since
a network's outputs for an example may differ in the last bit with the batch it is part of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from gbp_ray.config import DistillationConfig, JobConfig
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checkpoint import load_rows
from gbp_ray.pruning.features import refuse_untappable
from gbp_ray.pruning.objective import Teacher
from gbp_ray.pruning.ranks import Ranks, isolated
from gbp_ray.pruning.sharding import is_sharded
from gbp_ray.pruning.training import num_steps
from gbp_ray.weight_files import read_weights
from gbp_ray.weights import TEACHER, find_misfits, fit_state, tensor_state
from gbp_ray.workload import Workload, cut_batches, derive_seed, num_examples, take_batch

__all__ = ["answer_bytes", "is_taught_once", "prepare_teacher", "refuse_unteachable"]

_SECTION = "finetune.distillation"
_MOST_BYTES = 2**28
_NUM_READ = 8


def prepare_teacher(
    teacher: Teacher,
    job: JobConfig,
    workload: Workload,
    ranks: Ranks,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Teacher:
    """Makes the dense network the teacher that a job asks for. Communicates.

    Args:
        teacher: The dense network, which teaches where the job names no checkpoint.
        tell: Called with (batches done, batches in all) where it answers beforehand.

    Raises:
        ConfigError: The checkpoint does not fit the network.
        WorkloadError: It cannot be read.
    """
    config = job.finetune.distillation
    if config.teacher:
        ranks.together(lambda: load_rows(teacher.model, _read_fitting(config, teacher.model)))
    if not is_taught_once(job, workload, teacher.model, ranks):
        return teacher
    known = _ask_once(teacher.model, workload, ranks, job.workload.eval_batch_size, tell)
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
    """Decides whether a teacher's answers are computed once for all; see the module's docstring.

    Communicates.
    """
    config, recipe = job.finetune.distillation, job.finetune
    looks_alike = workload.augment is None and recipe.mixup == 0 and recipe.cutmix == 0
    if config.weight == 0 or config.features or not looks_alike:
        return False
    total = num_examples(workload.train)
    stretches = job.prune.rounds + (job.prune.criterion == "movement")
    steps = stretches * num_steps(recipe, workload, recipe.epochs)
    if steps * min(recipe.batch_size, total) < total:
        return False
    ranks = ranks or Ranks()
    if not ranks.share_object(ranks.together(lambda: _are_drawn_alike(workload))):
        return False
    return answer_bytes(workload, model, ranks) <= _MOST_BYTES


def _are_drawn_alike(workload: Workload) -> bool:
    """Reads a few training examples under two seeds: a data set may augment its own items."""
    if isinstance(workload.train, tuple) and workload.prepare is None:
        return True
    few = torch.arange(min(_NUM_READ, num_examples(workload.train)))
    one, other = (take_batch(workload, workload.train, few, augment_seed=n)[0] for n in (0, 1))
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def answer_bytes(workload: Workload, model: nn.Module, ranks: Ranks | None = None) -> int:
    """Computes what a teacher's answers to all training examples take.

    Communicates where the network is sharded.
    """
    answer = _ask(model, workload, range(1), (ranks or Ranks()).device)
    return num_examples(workload.train) * answer[0].numel() * answer.element_size()


def _ask_once(
    model: nn.Module,
    workload: Workload,
    ranks: Ranks,
    batch_size: int,
    tell: Callable[[int, int], None],
) -> Tensor:
    """Computes a teacher's outputs for every training example, (examples, ...). Communicates."""
    total = num_examples(workload.train)
    batches = cut_batches(total, batch_size)
    table: list[Tensor] = []

    def ask_own() -> None:
        for turn, item in enumerate(ranks.deal(len(batches))):
            # All ranks need to know what an answer looks like, and pass through a sharded network.
            if item is not None or not table or is_sharded(model):
                batch = batches[item or 0]
                answers = _ask(model, workload, batch, ranks.device)
                if not table:
                    table.append(answers.new_zeros(total, *answers.shape[1:]))
                if item is not None:
                    table[0][batch.start : batch.stop] = answers
            tell(min((turn + 1) * ranks.world_size, len(batches)), len(batches))

    ranks.together(ask_own, communicates=is_sharded(model))
    return ranks.fill_in(table[0])


@torch.no_grad()
def _ask(model: nn.Module, workload: Workload, batch: range, device: torch.device) -> Tensor:
    indices = torch.arange(batch.start, batch.stop)
    inputs, _ = take_batch(workload, workload.train, indices, device=device)
    with isolated(model.eval(), derive_seed("teach", batch.start)):
        answers: Tensor = model(inputs)
    return answers


def refuse_unteachable(job: JobConfig, workload: Workload, model: nn.Module) -> None:
    """Refuses a distillation that this network cannot take part in.

    Raises:
        ConfigError: It gives no logits, lacks a module of `features`, or the teacher's weights do
            not fit it.
        WorkloadError: The teacher's file cannot be read.
    """
    config = job.finetune.distillation
    if not config.is_on:
        return
    inputs, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    with torch.no_grad(), isolated(model.eval(), 0):
        outputs = model(inputs)
        refuse_untappable(model, config.features, inputs, f"{_SECTION}.features")
    is_logits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim >= 2
    if config.weight > 0 and not is_logits:
        raise ConfigError(
            f"{_SECTION}.weight: needs a network that gives logits of shape (examples, classes); "
            "set it to 0"
        )
    if config.teacher:
        _read_fitting(config, model)
