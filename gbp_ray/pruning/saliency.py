"""Every criterion: the estimated loss change from removing a weight, lowest removed first.

A criterion is an additive statistic plus a finish. What a calibration batch adds is a function of
its gradients alone, weight by weight, and is folded into the sum as they arrive (`gradients`), or
it takes passes of its own and comes as one flat vector (`ranks.OrderedSum`). Either way the batches
are added in batch order over all workers, and only then comes anything non-linear. Models are
scored in eval mode and left as they were found.

Sums are float64; a batch's own part has the weights' precision. Scores are float32.

Each rank owns a slice of every layer's sum, and so of its scores (`slices`); nobody gathers them.
Of a sharded network criteria that take gradients alone never see more than one group's weights;
those with passes of their own need the whole network at once, and get it (`sharding.whole`).

Shape suffixes: N = prunable weights of the model in the order of the global flat index, S = those
that this rank owns, L = its slice of one layer.
Symbols of the formulas: w weight, g gradient of the mean loss over a batch, g_i of one example,
H Hessian, sum_b over batches, n_b examples in batch b, n in all, z random signs.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbp_ray.config import PruneConfig
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.gradients import GradientSums
from gbp_ray.pruning.masks import Prunable
from gbp_ray.pruning.ranks import OrderedSum, Ranks, buffer_slots, isolated
from gbp_ray.pruning.rules import Criterion, Probe, own_criterion
from gbp_ray.pruning.sharding import is_sharded, leaves, local, whole
from gbp_ray.pruning.slices import Layout, SlicedScores, owned
from gbp_ray.workload import (
    Workload,
    blaming_labels,
    cut_batches,
    derive_seed,
    num_examples,
    shuffled_indices,
    take_batch,
)

__all__ = [
    "CRITERIA",
    "Criterion",
    "Probe",
    "check_criterion",
    "criterion",
    "movement_statistic",
    "score",
]

_TRIAL_EXAMPLES = 8
"""Size of the batch that a criterion is tried on before anything is trained."""

_PER_EXAMPLE_BYTES = 256 * 2**20
"""Room for per-example gradients: bounds the chunk of `fisher`."""


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
    scores = ranks.together(lambda: _finish(rule, units, layout, statistic, total))
    ranks.together(lambda: _refuse_non_finite(scores, units, config.criterion, ranks))
    return scores


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
) -> tuple[Mapping[str, Tensor], int]:
    """Gives what a rule finishes, by layer this rank's slice (L,), and the number of examples."""
    if config.criterion == "random":
        return _draw_scores(layout, derive_seed(seed, "random", round_number)), 1
    if config.criterion == "movement":
        if movement is None:
            raise PruneError(
                "prune.criterion = movement: nothing was gathered; set finetune.epochs above 0"
            )
        return {piece.name: owned(movement[piece.name], piece) for piece in layout.own}, 1
    if config.criterion == "synflow":
        with whole(model) as plain:
            own = _units_of(plain, units)
            flow_N = ranks.together(lambda: _synaptic_flow(plain, own, workload))
        start, stop = layout.bounds[ranks.rank : ranks.rank + 2]
        return layout.split_own(layout.by_owner(flow_N)[start:stop]), 1
    calibration = _Calibration(workload, config, seed)
    if rule.of_gradients is not None:
        return _sum_gradients(rule, model, units, calibration, ranks, layout, tell)
    if not rule.passes:
        return {piece.name: torch.zeros(()) for piece in layout.own}, 1
    with whole(model) as plain:
        vector_S = _sum_over_batches(
            rule, plain, _units_of(plain, units), calibration, ranks, layout, tell
        )
    return layout.split_own(vector_S), calibration.num_examples


def _finish(
    rule: Criterion,
    units: list[Prunable],
    layout: Layout,
    statistic: Mapping[str, Tensor],
    total: int,
) -> SlicedScores:
    values = []
    for unit, piece in zip(units, layout.own, strict=True):
        weights_L = owned(unit.parameter, piece)
        if piece.size == 0:
            values.append(weights_L.float())
            continue
        statistic_L = statistic[unit.name].expand(piece.size)
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
    small = config.model_copy(update={"calibration_examples": size, "calibration_batch_size": size})
    if config.criterion == "movement":
        return
    alone = Ranks(device=units[0].parameter.device)
    layout = Layout(units, alone)
    with _scoring_mode(model, units):
        statistic, total = _statistic(
            *(rule, model, units, workload, small, alone, layout, seed, 1, None),
            tell=lambda done, total: None,
        )
    _finish(rule, units, layout, statistic, total)


def criterion(name: str) -> Criterion:
    """Finds a criterion by its name in a job; a user's own is "module:attr" (`own_criterion`).

    Raises:
        ConfigError: There is no such criterion.
    """
    if ":" in name:
        return own_criterion(name)
    if name not in CRITERIA:
        raise ConfigError(f"prune.criterion = '{name}': is not a criterion")
    return CRITERIA[name]


def movement_statistic(weight: Tensor, gradient: Tensor) -> Tensor:
    """Computes what one training step adds to the movement score: -w * g, shaped like w."""
    return -(weight.double() * gradient.double())


# -- passes over the data --------------------------------------------------------------------------


class _Calibration:
    """The calibration examples, cut into batches that depend on the job alone."""

    def __init__(self, workload: Workload, config: PruneConfig, seed: int) -> None:
        self.workload, self.config, self.seed = workload, config, seed
        available = num_examples(workload.train)
        self.num_examples = min(config.calibration_examples, available)
        order = shuffled_indices(available, derive_seed(seed, "calibration"))
        cuts = cut_batches(self.num_examples, config.calibration_batch_size)
        self.batches = [order[cut.start : cut.stop] for cut in cuts]

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


def _sum_gradients(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    calibration: _Calibration,
    ranks: Ranks,
    layout: Layout,
    tell: Callable[[int, int], None],
) -> tuple[Mapping[str, Tensor], int]:
    """Folds the gradients of each batch into this rank's slices of the sum."""
    assert rule.of_gradients is not None
    batches = calibration.batches
    names = [unit.name for unit in units]
    differentiated = leaves(model)
    sums = GradientSums(
        ranks,
        {unit.name: unit.parameter for unit in units},
        {name: differentiated[name] for name in names},
        {name: [pieces[i] for pieces in layout.by_rank] for i, name in enumerate(names)},
        [len(batch) for batch in batches],
        rule.of_gradients,
        torch.float64,
        is_sharded=is_sharded(model),
    )
    turns = -(-len(batches) // ranks.world_size)
    with _only_requiring(differentiated, names), sums.listening():
        for turn, item in enumerate(ranks.deal(len(batches))):
            with sums.turn():
                # All ranks pass through a sharded network; one without a batch for nothing.
                number = 0 if item is None and is_sharded(model) else item
                if number is not None:
                    with (
                        calibration.batch(model, number, ranks.device) as (inputs, targets),
                        isolated(model, derive_seed(calibration.draws(number), 0)),
                    ):
                        loss = calibration.workload.loss(model(inputs), targets)
                        if loss.requires_grad:
                            loss.backward()
            tell(turn + 1, turns)
    return sums.owned(), calibration.num_examples


@contextmanager
def _only_requiring(leaves_by_name: Mapping[str, nn.Parameter], names: list[str]) -> Iterator[None]:
    """Spares the gradients of everything else."""
    required = {name: leaf.requires_grad for name, leaf in leaves_by_name.items()}
    wanted = set(names)
    for name, leaf in leaves_by_name.items():
        leaf.requires_grad_(name in wanted)
    try:
        yield
    finally:
        for name, leaf in leaves_by_name.items():
            leaf.requires_grad_(required[name])


def _sum_over_batches(
    rule: Criterion,
    model: nn.Module,
    units: list[Prunable],
    calibration: _Calibration,
    ranks: Ranks,
    layout: Layout,
    tell: Callable[[int, int], None],
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
                )
                with (
                    sums.attempt(),
                    calibration.batch(model, item, ranks.device) as (inputs, targets),
                    isolated(model, derive_seed(calibration.draws(item), number)),
                ):
                    vector_N = layout.by_owner(statistic(probe, inputs, targets))
            sums.add(vector_N)
            tell(number * turns + turn + 1, len(rule.passes) * turns)
    assert sums is not None
    return sums.owned()


def _units_of(model: nn.Module, units: list[Prunable]) -> list[Prunable]:
    """Looks the units up in another copy of their network."""
    return [replace(unit, parameter=model.get_parameter(unit.name)) for unit in units]


def _flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _zeros_like_flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Makes a running sum for tensors like these, in float32 or, where they are, in float64."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    total = sum(tensor.numel() for tensor in tensors)
    return torch.zeros(total, dtype=dtype, device=tensors[0].device)


def _summed_gradient(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * g: a sum over examples, so that a short batch counts with its true size."""
    return _flat(probe.gradients(inputs, targets)).mul_(len(targets))


def _squared_example_gradients(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """sum_i g_i^2 over the batch's examples, by vectorised per-example gradients in chunks."""
    prunable = {unit.name: unit.parameter.detach() for unit in probe.units}

    def example_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(probe.model, weights, (x.unsqueeze(0),))
        return probe.loss(outputs, y.unsqueeze(0))

    per_example = vmap(grad(example_loss), in_dims=(None, 0, 0))
    num_weights = sum(weight.numel() for weight in prunable.values())
    chunk = max(1, _PER_EXAMPLE_BYTES // (4 * num_weights))
    total_N = _zeros_like_flat(list(prunable.values()))
    slots = buffer_slots(probe.model)
    for start in range(0, len(targets), chunk):
        stop = start + chunk
        try:
            gradients = per_example(prunable, inputs[start:stop], targets[start:stop])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = _why_not_by_example(probe.model, slots, inputs[:1], error)
            raise PruneError(
                "prune.criterion = fisher: single examples of this model cannot be differentiated, "
                f"{reason}, or choose taylor_squared"
            ) from error
        total_N += _flat([gradients[unit.name].square().sum(dim=0) for unit in probe.units])
    return total_N


def _why_not_by_example(
    model: nn.Module,
    slots: list[tuple[dict[str, Tensor | None], str, Tensor]],
    inputs: Tensor,
    error: Exception,
) -> str:
    """Names the buffers that a forward pass writes in eval mode; else repeats what torch said."""
    # The failed pass may have left a tensor of its own in a buffer's place.
    for owner, name, buffer in slots:
        owner[name] = buffer
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with suppress(RuntimeError, ValueError), torch.no_grad():
        model(inputs)
    written = [
        f"'{name}'"
        for name, buffer in model.named_buffers()
        if buffer is not before[name][0]
        or not torch.allclose(buffer, before[name][1], rtol=0, atol=0, equal_nan=True)
    ]
    if written:
        return (
            f"it writes {'buffers' if len(written) > 1 else 'buffer'} {', '.join(written)} in eval "
            "mode; write such only while self.training"
        )
    text = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
    return f"torch says {text}; mend the model"


def _hessian_diagonal(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * mean over probes of z * (H z), an unbiased estimate of the batch's diag(H)."""
    gradients = probe.gradients(inputs, targets, create_graph=True)
    num_probes = probe.config.hutchinson_probes
    generator = torch.Generator().manual_seed(
        derive_seed(probe.seed, "hutchinson", probe.batch_index)
    )
    total_N = _zeros_like_flat(gradients)
    for number in range(num_probes):
        signs = [
            torch.randint(0, 2, g.shape, generator=generator).mul_(2).sub_(1).to(g)
            for g in gradients
        ]
        products = _hessian_product(
            gradients, signs, probe.parameters, keep_graph=number + 1 < num_probes
        )
        total_N += _flat(products) * _flat(signs)
    return total_N * (len(targets) / num_probes)


def _hessian_gradient(probe: Probe, inputs: Tensor, targets: Tensor) -> Tensor:
    """n_b * H G, with G the sum of gradients over all batches from the pass before."""
    assert probe.previous_N is not None
    gradients = probe.gradients(inputs, targets, create_graph=True)
    pieces = probe.previous_N.split([g.numel() for g in gradients])
    directions = [piece.view_as(g).to(g) for piece, g in zip(pieces, gradients, strict=True)]
    products = _hessian_product(gradients, directions, probe.parameters, keep_graph=False)
    return _flat(products) * len(targets)


def _hessian_product(
    gradients: tuple[Tensor, ...],
    directions: list[Tensor],
    parameters: list[nn.Parameter],
    keep_graph: bool,
) -> tuple[Tensor, ...]:
    # A gradient that does not depend on any weight, as in a linear model under a linear loss, has
    # no graph: its row of the Hessian is zero.
    pairs = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    return torch.autograd.grad(
        [g for g, _ in pairs],
        parameters,
        grad_outputs=[d for _, d in pairs],
        retain_graph=keep_graph,
        materialize_grads=True,
    )


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


def _synaptic_flow(model: nn.Module, units: list[Prunable], workload: Workload) -> Tensor:
    """|w * dR/dw| for R = sum of the outputs of the linearised network on an all-one input."""
    sample, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    if not sample.is_floating_point():
        raise PruneError(
            f"prune.criterion = synflow: needs inputs of floating point, not {sample.dtype}; "
            "choose another criterion for this model"
        )
    device = units[0].parameter.device
    flow_model_state = {
        name: _flow_value(name, value)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    weights = [flow_model_state[unit.name].requires_grad_() for unit in units]
    # Products of many layers leave the range of float32.
    ones = torch.ones_like(sample[:1], dtype=torch.float64, device=device)
    outputs = functional_call(model, flow_model_state, (ones,))
    gradients = torch.autograd.grad(outputs.sum(), weights, materialize_grads=True)
    scores_N = _flat([weight * g for weight, g in zip(weights, gradients, strict=True)]).abs()
    # Order is all that counts, and a common factor brings the scores back into float32.
    largest = scores_N.max()
    return scores_N / largest if largest > 0 else scores_N


def _flow_value(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.clone()
    # Biases and running means add flow from nowhere; without them flow is conserved.
    if name.rpartition(".")[2] in ("bias", "running_mean"):
        return torch.zeros_like(value, dtype=torch.float64)
    return value.detach().double().abs()


# -- modes and checks ------------------------------------------------------------------------------


@contextmanager
def _scoring_mode(model: nn.Module, units: list[Prunable]) -> Iterator[None]:
    """Switches to eval mode and to kernels that can be differentiated twice, then back.

    Weights that training leaves alone are scored like the others, so they take a gradient here.
    """
    modes = {module: module.training for module in model.modules()}
    differentiated = leaves(model)
    scored = [tensor for unit in units for tensor in (unit.parameter, differentiated[unit.name])]
    frozen = [parameter for parameter in scored if not parameter.requires_grad]
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
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
    raise PruneError(
        f"scores of '{culprit.name}': NaN or infinite under prune.criterion = {rule}{seen}; the "
        "weights diverged or the criterion overflowed; lower the learning rate, or try another "
        "criterion"
    )


# -- the registry ----------------------------------------------------------------------------------

_TAYLOR = Criterion(
    name="taylor",
    formula="|w * (1/n) sum_b n_b g_b|",
    summed="gradients, n_b * g_b",
    cost="1",
    source="Molchanov et al. 2017 (1611.06440), eq. 7, per weight",
    of_gradients=lambda gradient_L, weight_L, num_examples: gradient_L * num_examples,
    finish=lambda weights_N, statistic_N, total: (weights_N * statistic_N / total).abs(),
)

CRITERIA: dict[str, Criterion] = {
    rule.name: rule
    for rule in (
        Criterion(
            name="magnitude",
            formula="|w|",
            summed="nothing",
            cost="0",
            source="Han et al. 2015 (1506.02626), section 3",
            finish=lambda weights_N, statistic_N, total: weights_N.abs(),
        ),
        Criterion(
            name="random",
            formula="u, uniform in [0, 1)",
            summed="nothing",
            cost="0",
            source="the control of Blalock et al. 2020 (2003.03033)",
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        _TAYLOR,
        Criterion(
            name="snip",
            formula=_TAYLOR.formula + ", on untrained weights (pretrain.epochs = 0)",
            summed=_TAYLOR.summed,
            cost=_TAYLOR.cost,
            source="Lee et al. 2019 (1810.02340), eq. 5, without its normalising factor",
            of_gradients=_TAYLOR.of_gradients,
            finish=_TAYLOR.finish,
        ),
        Criterion(
            name="taylor_squared",
            formula="sum_b (w g_b)^2",
            summed="(w g_b)^2; depends on calibration_batch_size",
            cost="1",
            source="Molchanov et al. 2019 (1906.10771), eq. 8",
            of_gradients=lambda gradient_L, weight_L, num_examples: (
                gradient_L * weight_L
            ).square_(),
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        Criterion(
            name="fisher",
            formula="w^2 * (1/n) sum_i g_i^2",
            summed="squared gradients of single examples",
            cost="2 to 4",
            source="Theis et al. 2018 (1801.05787), eq. 6, per weight, empirical Fisher diagonal",
            passes=(_squared_example_gradients,),
            finish=lambda weights_N, statistic_N, total: weights_N.square() * statistic_N / total,
        ),
        Criterion(
            name="obd",
            formula="w^2 * h / 2, h = (1/n) sum_b n_b mean_z z * (H_b z)",
            summed="Hessian diagonals, by hutchinson_probes random probes per batch",
            cost="1 + 2 per probe",
            source="LeCun et al. 1990 (NIPS 2), eq. 5; diagonal by Hutchinson 1989",
            passes=(_hessian_diagonal,),
            finish=lambda weights_N, statistic_N, total: (
                weights_N.square() * statistic_N / (2 * total)
            ),
            is_signed=True,
        ),
        Criterion(
            name="grasp",
            formula="w * (H G), G = (1/n) sum_b n_b g_b, H likewise",
            summed="gradients, then n_b * (H_b G)",
            cost="4, two passes",
            source="Wang et al. 2020 (2002.07376), eq. 8; its sign turned so that low is removed",
            passes=(_summed_gradient, _hessian_gradient),
            finish=lambda weights_N, statistic_N, total: weights_N * statistic_N / total**2,
            is_signed=True,
        ),
        Criterion(
            name="synflow",
            formula="|w * dR/dw|, R = 1' prod_l |W_l| 1",
            summed="nothing; no data is read",
            cost="1 example",
            source="Tanaka et al. 2020 (2006.05467), eq. 4 and algorithm 1; biases taken as zero",
            finish=lambda weights_N, statistic_N, total: statistic_N,
        ),
        Criterion(
            name="movement",
            formula="-sum_t w_t g_t over fine-tuning steps t since the last prune",
            summed="-w g of each step, over the whole batch",
            cost="0, gathered while fine-tuning",
            source="Sanh et al. 2020 (2005.07683), eq. 4, without straight-through gradients",
            finish=lambda weights_N, statistic_N, total: statistic_N,
            is_signed=True,
        ),
    )
}
