"""Saliency: the estimated loss change from removing a weight, each rank for those it owns.

A criterion is an additive statistic plus a finish. What a calibration batch adds is a function of
its gradients alone, weight by weight, and is folded into the sum as they arrive (`folding`), or
it takes passes of its own and comes as one flat vector (`ranks.OrderedSum`). Either way the batches
are added in batch order over all workers, and only then comes anything non-linear. Models are
scored in eval mode and left as they were found.

Sums are float64; a batch's own part has the weights' precision. Scores are float32.

Each rank owns a slice of every layer's sum, and so of its scores (`slices`); nobody gathers them.
Of a sharded network criteria that take gradients alone never see more than one group's weights;
those with passes of their own need the whole network at once, and get it (`sharding.whole`).

Shape suffixes: N = prunable weights of the model in the order of the global flat index, S = those
that this rank owns, L = its slice of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks, isolated
from gbp_ray.distributed.sharding import (
    is_sharded,
    leaves,
    local,
    local_slice,
    only_requiring,
    unsharded,
)
from gbp_ray.distributed.sums import GradientReducer, OrderedSum
from gbp_ray.errors import PruneError, WorkloadError
from gbp_ray.pruning.criteria import Criterion, criterion
from gbp_ray.pruning.statistics import Probe
from gbp_ray.pruning.units import Layout, Prunable, SlicedScores
from gbp_ray.training.causes import why_not_finite
from gbp_ray.training.loss import counts_of
from gbp_ray.workloads.checks import blaming_labels, check_labels
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import cut_batches, derive_seed, shuffled_indices, take_batch
from gbp_ray.workloads.metrics import zero_loss

__all__ = [
    "check_criterion",
    "score",
    "score_prefixes",
]

_TRIAL_EXAMPLES = 8
"""Size of the batch that a criterion is tried on before anything is trained."""


def score(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    *,
    seed: int = 0,
    round_number: int = 1,
    movement: Mapping[str, Tensor] | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> SlicedScores:
    """Scores every prunable weight, each rank its slices; the bits do not depend on their number.

    Args:
        units: From `prunable_parameters(model)`.
        round_number: Distinguishes the draws of `random`.
        movement: What `training` gathered by parameter name, for the criterion movement alone.
        tell: Called with (batches done, batches in all) on this rank.

    Returns:
        This rank's slices of the scores, float32. Communicates.

    Raises:
        ConfigError: The criterion cannot be found.
        PruneError: A score is NaN or infinite (raised on every rank), or movement has no history.
    """
    rule = criterion(config.criterion)
    layout = Layout(units, ranks)
    with _scoring_mode(model, units):
        statistic, total = _statistic(
            rule, model, units, workload, config, ranks, layout, seed, round_number, movement, tell
        )
    scores = ranks.run_collectively(lambda: _finish(rule, units, layout, statistic, total))
    ranks.run_collectively(lambda: _refuse_non_finite(scores, units, config.criterion, ranks))
    return scores


def score_prefixes(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, SlicedScores]]:
    """Scores on growing numbers of calibration examples, each nested in the next; on one rank.

    The scores of each size have the bits that `score` gives for it. Where a criterion is one sum
    over batches, all sizes share one pass over the largest; where it is not, or a size ends inside
    a batch, the size gets a pass of its own.

    Args:
        sizes: Numbers of calibration examples; those beyond what the data has are cut to it.
        tell: Called with (batches done, batches in all) over all passes.

    Yields:
        (size, scores), by size, each size once.

    Raises:
        ConfigError: As `score`.
        PruneError: As `score`.
    """
    rule, alone = criterion(config.criterion), Ranks(device=units[0].parameter.device)
    available = num_examples(workload.train)
    wanted = sorted({min(size, available) for size in sizes})
    of_size = {n: config.model_copy(update={"calibration_examples": n}) for n in wanted}
    largest = _Calibration(workload, of_size[wanted[-1]], seed, alone)
    # Whether examples count alike may differ from size to size, and with it the last bits.
    is_one_sum = rule.of_gradients is not None or len(rule.passes) == 1
    is_one_sum = is_one_sum and largest.counts is None
    nested = [
        n
        for n in wanted
        if is_one_sum and (n % config.calibration_batch_size == 0 or n == wanted[-1])
    ]
    own = {n: of_size[n] for n in wanted if n not in nested}
    layout = Layout(units, alone)
    statistics: dict[int, Mapping[str, Tensor]] = {}

    def keep(num_batches: int, so_far: Callable[[], Mapping[str, Tensor]]) -> None:
        size = min(num_batches * config.calibration_batch_size, wanted[-1])
        if size in nested:
            statistics[size] = so_far()

    num_batches = {n: -(-n // config.calibration_batch_size) for n in wanted}
    total = sum(num_batches[n] * max(1, len(rule.passes)) for n in own)
    total += num_batches[wanted[-1]] if nested else 0
    before = 0

    def teller(done: int, of: int) -> None:
        tell(before + done, total)

    if nested:
        with _scoring_mode(model, units):
            _sum_in_one_pass(rule, model, units, largest, alone, layout, teller, keep)
        before = num_batches[wanted[-1]]
    for size in wanted:
        if size in own:
            scores = score(model, units, workload, own[size], alone, seed=seed, tell=teller)
            before += num_batches[size] * max(1, len(rule.passes))
        else:
            scores = _finish(rule, units, layout, statistics.pop(size), size)
            _refuse_non_finite(scores, units, config.criterion, alone)
        yield size, scores


def _sum_in_one_pass(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    calibration: _Calibration,
    ranks: Ranks,
    layout: Layout,
    tell: Callable[[int, int], None],
    keep: _Keep,
) -> None:
    if rule.of_gradients is not None:
        _sum_gradients(rule, model, units, calibration, ranks, layout, tell, keep)
        return
    with unsharded(model) as plain:
        own = _units_of(plain, units)
        _sum_over_batches(rule, plain, own, calibration, ranks, layout, tell, keep)


def _statistic(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    ranks: Ranks,
    layout: Layout,
    seed: int,
    round_number: int,
    movement: Mapping[str, Tensor] | None,
    tell: Callable[[int, int], None],
) -> tuple[Mapping[str, Tensor], float]:
    """Gives what a rule finishes, by layer this rank's slice (L,), and the number of items."""
    if rule.spec.reads == "nothing":
        return _draw_scores(layout, derive_seed(seed, "random", round_number)), 1
    if rule.spec.needs_history:
        if movement is None:
            raise PruneError(
                "prune.criterion = movement: nothing was gathered; set finetune.epochs above 0"
            )
        return {piece.name: local_slice(movement[piece.name], piece) for piece in layout.own}, 1
    if rule.of_network is not None:
        of_network = rule.of_network
        with unsharded(model) as plain:
            own = _units_of(plain, units)
            flow_N = ranks.run_collectively(lambda: of_network(plain, own, workload))
        start, stop = layout.bounds[ranks.rank : ranks.rank + 2]
        return layout.split_own(layout.by_owner(flow_N)[start:stop]), 1
    calibration = _Calibration(workload, config, seed, ranks)
    if rule.of_gradients is not None:
        return _sum_gradients(rule, model, units, calibration, ranks, layout, tell)
    if not rule.passes:
        return {piece.name: torch.zeros(()) for piece in layout.own}, 1
    with unsharded(model) as plain:
        vector_S = _sum_over_batches(
            rule, plain, _units_of(plain, units), calibration, ranks, layout, tell
        )
    return layout.split_own(vector_S), sum(calibration.items)


def _finish(
    rule: Criterion,
    units: list[Prunable],
    layout: Layout,
    statistic: Mapping[str, Tensor],
    total: float,
) -> SlicedScores:
    values = []
    for unit, piece in zip(units, layout.own, strict=True):
        weights_L = local_slice(unit.parameter, piece)
        if piece.size == 0:
            values.append(weights_L.float())
            continue
        statistic_L = statistic[unit.name].to(weights_L.device).expand(piece.size)
        values.append(rule.finish(weights_L.double(), statistic_L, total).float())
    return SlicedScores(layout.own, tuple(values))


def check_criterion(
    model: nn.Module,
    units: list[Prunable],
    workload: Workload,
    config: PruneConfig,
    *,
    seed: int = 0,
) -> None:
    """Scores one small batch, so that what a criterion cannot do shows before any training.

    Whether the scores are finite is left open: training may change that.

    Raises:
        ConfigError: The criterion cannot be found.
        PruneError: It fails, or its result does not fit the model.
    """
    rule = criterion(config.criterion)
    size = min(_TRIAL_EXAMPLES, config.calibration_batch_size)
    # What one probe can do, all can.
    few = {"calibration_examples": size, "calibration_batch_size": size, "hutchinson_probes": 1}
    small = config.model_copy(update=few)
    if rule.spec.needs_history:
        return
    alone = Ranks(device=units[0].parameter.device)
    layout = Layout(units, alone)
    with _scoring_mode(model, units):
        statistic, total = _statistic(
            *(rule, model, units, workload, small, alone, layout, seed, 1, None),
            tell=lambda done, total: None,
        )
    _finish(rule, units, layout, statistic, total)


# -- passes over the data --------------------------------------------------------------------------


class _Calibration:
    """The calibration examples, cut into batches that depend on the job alone."""

    def __init__(self, workload: Workload, config: PruneConfig, seed: int, ranks: Ranks) -> None:
        self.workload, self.config, self.seed = workload, config, seed
        available = num_examples(workload.train)
        self.num_examples = min(config.calibration_examples, available)
        order = shuffled_indices(available, derive_seed(seed, "calibration"))
        cuts = cut_batches(self.num_examples, config.calibration_batch_size)
        self.batches = [order[cut.start : cut.stop] for cut in cuts]
        counts = counts_of(workload, order[: self.num_examples], ranks)
        self.counts = None if counts is None else counts.split([len(cut) for cut in cuts])
        # Over how many items the loss of each batch is a mean.
        self.items = [
            len(cut) if self.counts is None else self.counts[number].sum().item()
            for number, cut in enumerate(cuts)
        ]
        if sum(self.items) == 0:
            raise WorkloadError(
                f"workload.train: none of {self.num_examples} calibration examples has a label "
                "that counts; raise prune.calibration_examples, or leave such examples out"
            )

    def draws(self, item: int) -> int:
        return derive_seed(self.seed, "calibration", "augment", item)

    @contextmanager
    def batch(self, model: nn.Module, item: int, device: torch.device) -> Iterator[_Batch]:
        indices = self.batches[item]
        with blaming_labels(self.workload, model, "train", indices):
            yield take_batch(
                self.workload,
                self.workload.train,
                indices,
                device=device,
                augment_seed=self.draws(item) if self.config.calibration_augment else None,
            )


_Batch = tuple[Tensor, Tensor]
_Keep = Callable[[int, Callable[[], Mapping[str, Tensor]]], None]
"""(batches summed, () -> a copy of the sum so far, this rank's slice (L,) by layer)."""


def _sum_gradients(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    calibration: _Calibration,
    ranks: Ranks,
    layout: Layout,
    tell: Callable[[int, int], None],
    keep: _Keep | None = None,
) -> tuple[Mapping[str, Tensor], float]:
    """Folds the gradients of each batch into this rank's slices of the sum."""
    assert rule.of_gradients is not None
    batches = calibration.batches
    differentiated = leaves(model)
    by_name = {unit.name: unit.parameter for unit in units}
    # In the order of the network, which is roughly that of the passes, and not of the names.
    names = [name for name in differentiated if name in by_name]
    places = {unit.name: number for number, unit in enumerate(units)}
    sums = GradientReducer(
        ranks,
        {name: by_name[name] for name in names},
        {name: differentiated[name] for name in names},
        {name: [pieces[places[name]] for pieces in layout.by_rank] for name in names},
        calibration.items,
        rule.of_gradients,
        torch.float64,
        is_sharded=is_sharded(model),
    )
    turns = -(-len(batches) // ranks.world_size)
    with only_requiring(model, names), sums.listening():
        for turn, item in enumerate(ranks.deal(len(batches))):
            with sums.turn():
                # All ranks pass through a sharded network; one without a batch for nothing.
                number = 0 if item is None and is_sharded(model) else item
                if number is not None:
                    with (
                        calibration.batch(model, number, ranks.device) as (inputs, targets),
                        isolated(model, derive_seed(calibration.draws(number), 0)),
                    ):
                        outputs, indices = model(inputs), batches[number]
                        check_labels(calibration.workload, "train", indices, outputs, targets)
                        has_items = calibration.items[number] > 0
                        loss = (
                            calibration.workload.loss(outputs, targets)
                            if has_items
                            else zero_loss(outputs)
                        )
                        if loss.requires_grad:
                            loss.backward()
            if keep is not None:
                keep(turn + 1, sums.so_far)
            tell(turn + 1, turns)
    return sums.owned(), sum(calibration.items)


def _sum_over_batches(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    calibration: _Calibration,
    ranks: Ranks,
    layout: Layout,
    tell: Callable[[int, int], None],
    keep: _Keep | None = None,
) -> Tensor:
    """Runs a rule's passes; returns what this rank owns of the last sum, (S,)."""
    batches = calibration.batches
    turns = -(-len(batches) // ranks.world_size)
    wire_dtype = reduce(torch.promote_types, (unit.parameter.dtype for unit in units))
    previous_N: Tensor | None = None
    sums: OrderedSum | None = None
    for number, statistic in enumerate(rule.passes):
        if sums is not None:
            # What the pass before summed may be a direction for this one, so all need all of it.
            previous_N = layout.by_layer(sums.result())
        sums = OrderedSum(
            ranks, layout.num_weights, len(batches), torch.float64, wire_dtype, layout.bounds
        )
        for turn, item in enumerate(ranks.deal(len(batches))):
            vector_N: Tensor | None = None
            if item is not None:
                probe = Probe(
                    *(model, units, calibration.workload.loss, calibration.config),
                    *(calibration.seed, item, previous_N),
                    None if calibration.counts is None else calibration.counts[item],
                )
                with (
                    sums.attempt(),
                    calibration.batch(model, item, ranks.device) as (inputs, targets),
                    isolated(model, derive_seed(calibration.draws(item), number)),
                ):
                    if calibration.items[item] > 0:
                        vector_N = statistic(probe, inputs, targets)
                    else:
                        vector_N = inputs.new_zeros(layout.num_weights, dtype=wire_dtype)
                    vector_N = layout.by_owner(vector_N)
            sums.add(vector_N)
            if keep is not None:
                keep(turn + 1, partial(_own_so_far, layout, sums))
            tell(number * turns + turn + 1, len(rule.passes) * turns)
    assert sums is not None
    return sums.owned()


def _own_so_far(layout: Layout, sums: OrderedSum) -> Mapping[str, Tensor]:
    return layout.split_own(sums.so_far())


def _units_of(model: nn.Module, units: list[Prunable]) -> list[Prunable]:
    """Looks the units up in another copy of their network."""
    return [replace(unit, parameter=model.get_parameter(unit.name)) for unit in units]


# -- criteria without a pass over the data ---------------------------------------------------------


def _draw_scores(layout: Layout, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Every rank draws for all, one layer at a time, and keeps its own.
    return {
        piece.name: torch.rand(math.prod(piece.shape), generator=generator)[
            piece.start : piece.stop
        ].clone()
        for piece in layout.own
    }


# -- modes and checks ------------------------------------------------------------------------------


@contextmanager
def _scoring_mode(model: nn.Module, units: list[Prunable]) -> Iterator[None]:
    """Switches to eval mode and to kernels that can be differentiated twice, then back.

    Weights that training leaves alone are scored like the others, so they take a gradient here.
    """
    differentiated = leaves(model)
    scored = [tensor for unit in units for tensor in (unit.parameter, differentiated[unit.name])]
    frozen = [parameter for parameter in scored if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with in_mode(model, is_training=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _refuse_non_finite(
    scores: SlicedScores, units: list[Prunable], rule: str, ranks: Ranks
) -> None:
    bad = [
        unit
        for unit, values in zip(units, scores.values, strict=True)
        if not bool(torch.isfinite(values).all())
    ]
    if not bad:
        return
    # One weight that is not finite spoils the gradients of all: name that one.
    culprit = next((u for u in units if not bool(torch.isfinite(local(u.parameter)).all())), bad[0])
    seen = f", seen by worker {ranks.rank}" if ranks.world_size > 1 else ""
    # This rank's rows, since the others may have nothing to say.
    rows = {unit.name: local(unit.parameter.detach()) for unit in units}
    why = why_not_finite(rows) or (
        "the weights diverged or the criterion overflowed; lower the learning rate, or try another "
        "criterion"
    )
    raise PruneError(
        f"scores of '{culprit.name}': NaN or infinite under prune.criterion = {rule}{seen}; {why}"
    )
