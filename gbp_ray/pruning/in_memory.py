"""Pruning of a network in memory, without a job, storage or Ray: score, select, both at once.

    masks = gbp_ray.prune_model(model, loader, sparsity=0.8, criterion="taylor")

The functions are those of a job, so the masks are, too: to the bit those of the first round of a
job with the same settings. Where torch.distributed is initialised, every rank must call them with
the same network and data, and all get the masks that one process would.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from gbp_ray.config.prune import PruneConfig
from gbp_ray.config.schema import explain_faults, nearest_name
from gbp_ray.distributed.agreement import (
    check_same_start,
    digest_tensor,
    fingerprint,
    fingerprints_of_data,
    fingerprints_of_network,
)
from gbp_ray.distributed.ranks import Ranks, fixed_kernels, isolated
from gbp_ray.distributed.sharding import adopt_sharded, is_sharded
from gbp_ray.errors import ConfigError, GbpError, PruneError, WorkloadError
from gbp_ray.pruning import scoring
from gbp_ray.pruning.checkpoint import shard_masks
from gbp_ray.pruning.checks import warn_of_unusual_weights
from gbp_ray.pruning.criteria import criterion as find_criterion
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import (
    check_reachable,
    check_selectable,
    check_units,
    select_masks,
)
from gbp_ray.pruning.units import (
    Prunable,
    SlicedScores,
    Survey,
    num_to_prune,
    survey,
)
from gbp_ray.training.network import unused_on_all
from gbp_ray.workloads.batch import kind_of
from gbp_ray.workloads.checks import Checked, check_workload
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import without_loaders
from gbp_ray.workloads.loading import build_network
from gbp_ray.workloads.metrics import Metric
from gbp_ray.workloads.tying import unwrapped

__all__ = [
    "Scores",
    "as_in_a_job",
    "check_reached",
    "check_same_replicas",
    "check_whole",
    "config_of",
    "keeping_gradients",
    "make_workload",
    "network_in",
    "prune_model",
    "reword_reasons",
    "score",
    "select",
]

Loss = Callable[[Any, Any], Tensor]

_FIELDS = ("layer_min_sparsity", "layer_max_sparsity", "hutchinson_probes")
"""Fields of a job's [prune] that are taken beside those in the signatures."""

_UNJUDGED = Metric("unjudged", lambda outputs, targets: torch.zeros(1), lambda sums: 0.0)


class Scores(dict[str, Tensor]):
    """Scores by parameter name, float32 on the CPU and shaped like the weights; the lowest go.

    Attributes:
        criterion: That made them.
        units: The parameters that were scored.
        unpruned: As of `MaskSet`.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        criterion: str,
        units: Iterable[Prunable],
        unpruned: Mapping[str, tuple[int, str]],
    ) -> None:
        super().__init__(scores)
        self.criterion, self.unpruned = criterion, unpruned
        self.input_dims: dict[str, int | None] = {unit.name: unit.input_dim for unit in units}
        self.num_groups = {unit.name: unit.num_groups for unit in units}

    def __repr__(self) -> str:
        number = sum(values.numel() for values in self.values())
        return f"<Scores of {number:,} weights in {len(self)} tensors by {self.criterion}>"


def prune_model(
    model: nn.Module,
    data: Any = None,
    *,
    sparsity: float,
    criterion: str = "taylor",
    loss: Loss = functional.cross_entropy,
    scope: str = "global",
    granularity: str = "weight",
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    masks: MaskSet | None = None,
    calibration_examples: int = 512,
    calibration_batch_size: int = 64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    count: Callable[[Any], float | Tensor] | None = None,
    seed: int = 0,
    num_threads: int = 1,
    **fields: Any,
) -> MaskSet:
    """Sets the weights with the lowest scores to zero, in place, and returns the masks.

    Training mode, gradients, buffers and `requires_grad` are as before. Communicates where
    torch.distributed is initialised.

    Args:
        model: On any one device, also wrapped by DDP or `torch.compile`, or sharded by FSDP2 over
            all ranks; names are those of the network inside. Of a sharded one layers that no pass
            reaches are not found and left out; name them in `exclude`.
        data: What a split of a `Workload` may be: `(inputs, targets)`, a map-style dataset, or a
            DataLoader, of which only dataset and collate function are used. Criteria that read no
            data need none.
        sparsity: Zero / prunable weights afterwards, in [0, 1).
        criterion: See `gbp-ray criteria`, or your own as "module:attr"; not movement, which
            `Pruner` gathers in training.
        loss: `(outputs, targets) -> scalar`, a mean; see `Workload`, as for `forward`, `collate`
            and `count`.
        scope: "global" or "layer".
        granularity: "weight", or "n:m".
        exclude: Name globs of parameters that are not pruned.
        include: Name globs of others that are, such as embeddings and recurrent weights.
        masks: From an earlier call: what is pruned stays so and counts towards the sparsity.
        calibration_examples: How many examples the seed draws to score on.
        num_threads: CPU threads, on which the order of additions depends; jobs take 1 by default.
        fields: `layer_min_sparsity`, `layer_max_sparsity` and `hutchinson_probes` of a job.

    Returns:
        The masks; `unpruned` names the weight matrices that were left alone, and why.

    Raises:
        GbpError: One line that names the argument, what is allowed and what to do.
    """
    with as_in_a_job(num_threads):
        config = config_of(
            fields,
            sparsity=sparsity,
            criterion=criterion,
            scope=scope,
            granularity=granularity,
            exclude=exclude,
            include=include,
            calibration_examples=calibration_examples,
            calibration_batch_size=calibration_batch_size,
        )
        task = _prepare(model, data, config, seed, loss, forward, collate, count)
        before = _checked_masks(masks, MaskSet.dense(task.units), config)
        check_units(task.units, config)
        if masks is not None:
            before.apply_(task.model)
            before = shard_masks(before, task.model)
        scores = task.score(before.round + 1)
        removal = select_masks(scores, before, config, sparsity, task.input_dims, task.ranks)
        task.ranks.check_agreement(removal.masks.digest, "the mask")
        removal.masks.apply_(task.model)
        return replace(removal.masks, unpruned=task.unpruned)


def score(
    model: nn.Module,
    data: Any = None,
    *,
    criterion: str = "taylor",
    loss: Loss = functional.cross_entropy,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    calibration_examples: int = 512,
    calibration_batch_size: int = 64,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    count: Callable[[Any], float | Tensor] | None = None,
    seed: int = 0,
    num_threads: int = 1,
    **fields: Any,
) -> Scores:
    """Scores every prunable weight and changes nothing; arguments as for `prune_model`.

    Returns:
        float32 tensors on the CPU by parameter name, for `select`.
    """
    with as_in_a_job(num_threads):
        config = config_of(
            fields,
            sparsity=0.0,
            criterion=criterion,
            exclude=exclude,
            include=include,
            calibration_examples=calibration_examples,
            calibration_batch_size=calibration_batch_size,
        )
        task = _prepare(model, data, config, seed, loss, forward, collate, count)
        scores = task.score(1).gather(task.ranks)
        return Scores(scores, criterion, task.units, task.unpruned)


def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    scope: str = "global",
    granularity: str = "weight",
    masks: MaskSet | None = None,
    **fields: Any,
) -> MaskSet:
    """Chooses the weights with the lowest scores; `masks.apply_(model)` sets them to zero.

    Communicates nothing.

    Args:
        scores: From `score`, or any tensors by name. Groups of n:m run along the inputs of what
            `score` gave; in other mappings along axis 1.
        masks: As for `prune_model`, as are the others.

    Raises:
        GbpError: As for `prune_model`.
    """
    with as_in_a_job(torch.get_num_threads()):
        if not isinstance(scores, Mapping) or not scores:
            raise ConfigError(
                f"scores: must be tensors by parameter name, as score() gives, not "
                f"{kind_of(scores)}"
            )
        for name, values in scores.items():
            is_fit = isinstance(values, Tensor) and values.is_floating_point()
            is_fit = is_fit and values.layout is torch.strided and not values.is_meta
            if not is_fit or not isinstance(name, str):
                raise ConfigError(
                    f"scores: {name!r} is {kind_of(values)}; give dense tensors of floating point "
                    "by parameter name"
                )
            if number := int((~torch.isfinite(values)).sum()):
                raise PruneError(
                    f"scores of '{name}': {number} are NaN or infinite, which have no order; "
                    "replace them"
                )
        if not isinstance(scores, Scores):
            scores = Scores(scores, "given scores", (), {})
        # The scores are made; any criterion stands for the one that made them.
        config = config_of(
            fields, sparsity=sparsity, criterion="magnitude", scope=scope, granularity=granularity
        )
        dense = {name: torch.ones_like(v, dtype=torch.bool) for name, v in scores.items()}
        before = _checked_masks(masks, MaskSet(dense), config)
        shapes = {name: tuple(values.shape) for name, values in scores.items()}
        check_selectable(shapes, config, scores.input_dims, scores.num_groups)
        check_reachable(shapes, config)
        found = select_masks(scores, before, config, sparsity, scores.input_dims).masks
        return replace(found, criterion=scores.criterion, unpruned=scores.unpruned)


# -- the arguments ---------------------------------------------------------------------------------


@contextmanager
def as_in_a_job(num_threads: int, split: str = "data") -> Iterator[None]:
    """Computes in the block as a job does, whatever surrounds it, and names arguments in errors.

    Gradients are on and autocast is off.

    Args:
        num_threads: See `fixed_kernels`.
        split: The argument that stands for a job's data.
    """
    check_whole("num_threads", num_threads, 1)
    with ExitStack() as stack:
        stack.enter_context(_naming_arguments(split))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(fixed_kernels(num_threads))
        yield


def check_whole(name: str, value: object, least: int, why: str = "") -> None:
    """Raises ConfigError for an argument that is no whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {value!r}: must be a whole number from {least} on{why}")


_ARGUMENTS = (
    (r"^workload: ", "data: "),
    (r",? in workload\.factory\b", ""),
    (r"\bworkload\.(?:build_model|factory)\b", "model"),
    (r"\b(?:prune|workload)\.(\w+)", r"\1"),
    (r"^prune: ", "model: "),
    (r"\b(give|to) Workload a\b", r"\1 a"),
)
"""Fields of a job, as its checks name them, and the arguments that take their place."""


def _reword(text: str, split: str = "data") -> str:
    text = re.sub(r"\bworkload\.(?:train|test)\b", split, text)
    for pattern, argument in _ARGUMENTS:
        text = re.sub(pattern, argument, text)
    return text


@contextmanager
def _naming_arguments(split: str) -> Iterator[None]:
    """Makes the errors and warnings of a job's checks name arguments."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except GbpError as error:
        error.args = (_reword(str(error), split),)
        raise
    finally:
        for warning in caught:
            # Where the caller of the public function is: above the generator and its block.
            warnings.warn(_reword(str(warning.message), split), warning.category, stacklevel=7)


def config_of(fields: Mapping[str, Any], **given: Any) -> PruneConfig:
    """Checks arguments as a job's [prune] is checked.

    Args:
        fields: Those beside the signature, of `_FIELDS`.

    Raises:
        ConfigError: One line that lists every fault.
    """
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(
                f"{name}: is no argument{nearest_name(name, [*given, *_FIELDS])} "
                f"(allowed: {', '.join([*given, *_FIELDS])})"
            )
    for name in ("exclude", "include"):
        if isinstance(globs := given.get(name, ()), str):
            given[name] = (globs,)
        elif isinstance(globs, Iterable):
            given[name] = tuple(globs)
    try:
        return PruneConfig(**given, **fields)
    except ValidationError as error:
        raise ConfigError("; ".join(explain_faults(error, PruneConfig))) from None


def network_in(model: nn.Module) -> nn.Module:
    """Returns the network inside wrappers, fit to be scored where it is. Communicates if sharded.

    Raises:
        WorkloadError: It is none, is spread over devices or has no weights yet, or would be
            trained by a backward pass.
    """
    if not isinstance(model, nn.Module):
        raise WorkloadError(f"model: must be a torch.nn.Module, not {kind_of(model)}")
    # Refuses what no job could prune, too.
    plain = build_network(Workload(lambda: unwrapped(model), None, None))
    devices = {str(tensor.device) for tensor in plain.parameters()}
    if len(devices) > 1 or "meta" in devices:
        where = " and ".join(sorted(devices))
        raise WorkloadError(
            f"model: its parameters are on {where}; move the network to one device, with weights"
        )
    for name, parameter in plain.named_parameters():
        if parameter.is_inference():
            raise WorkloadError(
                f"model: '{name}' was made under torch.inference_mode and has no gradients; make "
                "the network outside"
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise WorkloadError(
                f"model: '{name}' has a hook that runs when its gradient is there, such as an "
                "optimizer inside the backward pass, which scoring would set off; prune before the "
                "hook is registered"
            )
    adopt_sharded(plain)
    return plain


def make_workload(
    model: nn.Module,
    data: Any,
    loss: Loss,
    forward: Callable[[nn.Module, Any], Any] | None,
    collate: Callable[[list[Any]], Any] | None,
    count: Callable[[Any], float | Tensor] | None,
) -> Workload:
    """Makes a workload of the arguments, which nothing judges."""
    functions = {"loss": loss, "forward": forward, "collate": collate, "count": count}
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "loss"):
            raise ConfigError(f"{name}: must be a function, not {kind_of(function)}")
    workload = Workload(
        lambda: model, data, data, loss, forward=forward, collate=collate, count=count
    )
    workload = replace(workload, metrics=(_UNJUDGED,))
    if not isinstance(data, DataLoader):
        return workload
    usual = (SequentialSampler, RandomSampler, DistributedSampler)
    own = data.sampler if type(data.batch_sampler) is BatchSampler else data.batch_sampler
    with warnings.catch_warnings(action="ignore"):
        workload = without_loaders(workload)
    if own is not None and type(own) not in usual:
        warnings.warn(
            f"data: the DataLoader's {type(own).__name__} is not used, all examples of its dataset "
            "may be drawn; give a torch.utils.data.Subset to draw from some only",
            stacklevel=2,
        )
    # One split, which is checked and fingerprinted once.
    return replace(workload, test=workload.train)


def reword_reasons(unpruned: Mapping[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Makes the reasons of a `Survey` name arguments."""
    return {name: (number, _reword(why)) for name, (number, why) in unpruned.items()}


def _checked_masks(masks: MaskSet | None, dense: MaskSet, config: PruneConfig) -> MaskSet:
    if masks is None:
        return dense
    if not isinstance(masks, MaskSet):
        raise ConfigError(f"masks: must be a MaskSet, as prune_model returns, not {kind_of(masks)}")
    if config.pattern is not None:
        raise ConfigError(
            f'masks with granularity = "{config.granularity}": leave no whole groups to choose '
            'from; leave them out, or set granularity to "weight"'
        )
    dense.check_alike(masks)
    if num_to_prune(config.sparsity, masks.num_units) < masks.num_pruned:
        raise ConfigError(
            f"sparsity = {config.sparsity:g}: is below the {masks.sparsity:.4f} of masks, and "
            "masks only ever remove; raise it"
        )
    device = next(iter(dense.values())).device
    return masks.to(device)


@dataclass(frozen=True)
class _Task:
    """A network in memory and what its weights are scored on."""

    model: nn.Module
    found: Survey
    workload: Workload
    config: PruneConfig
    ranks: Ranks
    seed: int

    @property
    def units(self) -> list[Prunable]:
        return self.found.units

    @property
    def unpruned(self) -> dict[str, tuple[int, str]]:
        return reword_reasons(self.found.unpruned)

    @property
    def input_dims(self) -> dict[str, int | None]:
        return {unit.name: unit.input_dim for unit in self.units}

    def score(self, round_number: int) -> SlicedScores:
        with keeping_gradients(self.model):
            return scoring.score(
                self.model,
                self.units,
                self.workload,
                self.config,
                self.ranks,
                seed=self.seed,
                round_number=round_number,
            )


def _prepare(
    model: nn.Module,
    data: Any,
    config: PruneConfig,
    seed: int,
    *functions: Any,
) -> _Task:
    """Checks network, data and loss; see `prune_model`. Communicates."""
    check_whole("seed", seed, 0)
    plain = network_in(model)
    rule = find_criterion(config.criterion)
    if rule.spec.needs_history:
        raise ConfigError(
            f"criterion = {config.criterion}: is gathered while training; use gbp_ray.Pruner in "
            "your training loop, or another criterion"
        )
    ranks = Ranks.current(next(plain.parameters()).device)
    workload = make_workload(plain, data, *functions)
    start = fingerprints_of_network(plain, is_blank=False)
    checked: Checked | None = None
    unused: frozenset[str] = frozenset()
    if rule.spec.needs_data or rule.of_network is not None:
        if data is None:
            raise ConfigError(
                f"data: criterion = {config.criterion} reads examples; give (inputs, targets), a "
                "dataset or a DataLoader"
            )
        # Of a sharded network a pass without its backward pass would leave weights gathered.
        if not is_sharded(plain):
            size = min(8, config.calibration_batch_size)
            checked = ranks.run_collectively(lambda: _check_data(workload, plain, size))
        if ranks.world_size > 1:
            start |= fingerprints_of_data(replace(workload, test=None))
    check_same_start(ranks, start)
    check_same_replicas(plain, ranks)
    if data is not None and not is_sharded(plain):
        unused = unused_on_all(workload, plain, ranks)
    found = survey(plain, config.exclude, config.include, unused)
    if checked is not None:
        check_reached(found.units, checked.unreached)
        warn_of_unusual_weights(checked, found)
    return _Task(plain, found, workload, config, ranks, seed)


def _check_data(workload: Workload, model: nn.Module, size: int) -> Checked:
    with isolated(model, 0):
        return check_workload(workload, model, size)


def check_reached(units: Iterable[Prunable], unreached: Iterable[str]) -> None:
    """Raises WorkloadError if a loss depends on none of the weights."""
    if {unit.name for unit in units} <= set(unreached):
        raise WorkloadError(
            "loss: depends on no prunable weight, so that all scores would be 0; let model, "
            "forward and loss keep the graph (no detach, no torch.no_grad)"
        )


def check_same_replicas(model: nn.Module, ranks: Ranks) -> None:
    """Checks that all ranks of a replicated network have the same weights. Communicates.

    Raises:
        PruneError: On every rank, naming those that differ from rank 0.
    """
    if ranks.world_size == 1 or is_sharded(model):
        return
    digests = {name: digest_tensor(parameter) for name, parameter in model.named_parameters()}
    everyone = ranks.all_gather_objects(fingerprint(digests))
    if strays := [rank for rank, other in enumerate(everyone) if other != everyone[0]]:
        raise PruneError(
            f"model: its weights on ranks {strays} are not those on rank 0; wrap it in "
            "DistributedDataParallel or shard it, so that all train one network"
        )


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Puts `grad` of each parameter back after the block."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
