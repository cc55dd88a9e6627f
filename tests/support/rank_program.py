"""What every rank computes in test_ranks: the same program alone and among 2, 3 or 4 processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from oracles import LAYER_CRITERIA
from small_networks import (
    UNEVEN,
    ConvNet,
    TanhNet,
    built,
    draw,
    images,
    in_float64,
    prune_config,
    regression,
    scores_of,
    uneven,
)
from techniques import EVERYWHERE, TECHNIQUES, case_of, digest, rounds_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.training import DistillationConfig, FinetuneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import local, shard_network
from gbp_ray.distributed.sums import OrderedSum
from gbp_ray.errors import ConfigError, PruneError, WorkloadError
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.pruning.scoring import score
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.units import Layout, SlicedScores, prunable_parameters
from gbp_ray.training.batchnorm import recalibrate_batchnorm
from gbp_ray.training.distillation import Teacher
from gbp_ray.training.evaluation import evaluate, measure_final_test
from gbp_ray.training.loop import Span, train_epochs
from gbp_ray.training.network import build_start, copy_frozen
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.contract import Workload

SUM_CASES = [
    (num_elements, num_items, dtype, wire)
    for num_elements in (1, 5, 18)
    for num_items in (1, 2, 5, 8)
    for dtype, wire in (
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    )
]

SETTINGS = [
    (rule, scope, granularity)
    for rule in CRITERIA
    for scope in ("global", "layer")
    for granularity in ("weight", "2:4")
]


def addends(num_elements: int, num_items: int) -> Tensor:
    """Vectors of very different sizes, whose sum in floating point depends on the order."""
    scales = 10.0 ** draw(num_items, 1, seed=3).mul(3).round()
    return (draw(num_items, num_elements, seed=4) * scales).double()


def report_of(ranks: Ranks, strategy: str = "replicated") -> dict[str, Any]:
    """Runs every case and reports what this rank got, of a network in one piece or in shards."""
    is_sharded = strategy == "fsdp"
    world = (ranks.world_size, strategy)
    report: dict[str, Any] = {"rank": ranks.rank}
    report["hard masks"] = hard_masks(ranks, is_sharded=is_sharded)
    for name, technique in TECHNIQUES.items():
        if world in technique.worlds or (world[0] == 1 and technique.worlds):
            report[name] = rounds_of(name, ranks, strategy, with_files=False)
    if world[0] > 1 and world not in EVERYWHERE:
        return report
    trained, movement = _train(ranks, is_sharded=is_sharded)
    report |= {
        "masks": _masks(ranks, trained, movement),
        "trained": digest(trained.state_dict()),
        "movement": digest(movement),
        "evaluated": evaluate(trained, images(), ranks, 4),
        "uneven": _uneven(ranks, is_sharded=is_sharded),
        "recalibrated": _recalibrated(ranks, trained),
        "held out": _held_out(ranks, strategy),
    }
    if is_sharded:
        return report
    return report | {
        "sums": [_sum_in_order(ranks, *case) for case in SUM_CASES],
        "float64 scores": _float64_scores(ranks),
        "progress": _progress(ranks, trained),
        "unruly model": _unruly_model(ranks),
        "filled in": _filled_in(ranks).tolist(),
        "shared": ranks.broadcast_object({"from": ranks.rank}),
        "together": _together(ranks),
        "failures": _failures(ranks, trained),
        "disagreement": _disagreement(ranks),
    }


def _sum_in_order(
    ranks: Ranks, num_elements: int, num_items: int, dtype: torch.dtype, wire: torch.dtype
) -> bytes:
    vectors = addends(num_elements, num_items)
    sums = OrderedSum(ranks, num_elements, num_items, dtype, wire)
    for item in ranks.deal(num_items):
        sums.add(None if item is None else vectors[item])
    return sums.result().numpy().tobytes()


def _train(
    ranks: Ranks, build: Callable[[], nn.Module] = ConvNet, *, is_sharded: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Trains with BatchNorm, dropout and augmentation; gathers movement on the way."""
    workload, model = images(build), built(build)
    if is_sharded:
        shard_network(model, ranks.device, ranks.world_size)
    recipe = FinetuneConfig(epochs=2, batch_size=14, microbatches=5, learning_rate=0.05)
    teacher = Teacher(copy_frozen(model), DistillationConfig(weight=0.5))
    return model, gather_movement(ranks, model, workload, recipe, 6, teacher)


def _uneven(ranks: Ranks, *, is_sharded: bool = False) -> list[Any]:
    """Trains, scores and evaluates under losses that are means over other things than examples."""
    found: list[Any] = []
    for kind in ("positions", "own"):
        workload, model = uneven(kind), in_float64(UNEVEN[kind].build)
        workload = dataclasses.replace(workload, train=TensorDataset(*workload.train))
        if is_sharded:
            shard_network(model, ranks.device, ranks.world_size)
        recipe = FinetuneConfig(epochs=1, batch_size=14, microbatches=9, learning_rate=0.05)
        optimizer, span = make_optimizer(model, recipe), Span("finetune", range(3), range(3))
        found.append(train_epochs(model, workload, recipe, ranks, optimizer, span, seed=5))
        found.append(digest(model.state_dict()))
        for rule in ("taylor", "fisher", "obd", "grasp", *LAYER_CRITERIA):
            config = prune_config(rule, calibration_examples=23, calibration_batch_size=3)
            found.append(digest(scores_of(model, workload, config, ranks=ranks)))
        found.append(evaluate(model, workload, ranks, 4))
    return found


def gather_movement(
    ranks: Ranks,
    model: nn.Module,
    workload: Workload,
    recipe: FinetuneConfig,
    num_steps: int,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """Trains a model and adds up -w g of its prunable weights on the way."""
    units = prunable_parameters(model)
    gathered = {
        unit.name: torch.zeros_like(unit.parameter.detach(), dtype=torch.float64) for unit in units
    }

    def gather(gradients: Mapping[str, Tensor]) -> None:
        for unit in units:
            moved = local(unit.parameter.detach()) * local(gradients[unit.name])
            local(gathered[unit.name]).sub_(moved)

    span = Span("finetune", range(num_steps), range(num_steps))
    optimizer = make_optimizer(model, recipe)
    train_epochs(
        *(model, workload, recipe, ranks, optimizer, span),
        seed=5,
        teacher=teacher,
        movement=gather,
    )
    return gathered


HARD_VALUES = (0.0, -0.0, 1e-45, -1e-45, 3e-39, -3e-39, 1.0, -1.0, 3.4e38, -3.4e38)
"""Zeros of both signs, denormals, and the ends of float32."""


class HardNet(nn.Module):
    """Layers whose rows hardly suffice for each rank, or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 1)
        self.three = nn.Conv2d(4, 3, 2)
        self.seven = nn.Linear(12, 7)


def hard_masks(ranks: Ranks, *, is_sharded: bool = False) -> list[str]:
    """Decides twice over scores of few different values, and of such as floats end in."""
    model = HardNet()
    if is_sharded:
        shard_network(model, ranks.device, ranks.world_size)
    units = prunable_parameters(model)
    layout = Layout(units, ranks)
    found = []
    for seed in range(6):
        palette = torch.tensor(HARD_VALUES)
        if seed % 2:
            palette = torch.cat([palette, draw(20, seed=seed)])
        values = {}
        for unit, piece in zip(units, layout.own, strict=True):
            drawn = draw(unit.parameter.numel(), seed=100 + seed).mul(1e4).long()
            values[unit.name] = palette[drawn % len(palette)][piece.start : piece.stop]
        scores = SlicedScores(layout.own, tuple(values.values()))
        for scope, granularity in itertools.product(("global", "layer"), ("weight", "1:4")):
            config = prune_config(sparsity=0.75, scope=scope, granularity=granularity)
            early = select_masks(scores, MaskSet.dense(units), config, 0.3, ranks=ranks).masks
            final = select_masks(scores, early, config, 0.6, ranks=ranks).masks
            found.append(early.digest + final.digest)
    return found


def _masks(
    ranks: Ranks, model: nn.Module, movement: dict[str, Tensor]
) -> dict[tuple[str, str, str], str]:
    found = {}
    for rule in CRITERIA:
        config = prune_config(
            rule, exclude=("conv1.*",), calibration_examples=23, calibration_batch_size=5
        )
        units = prunable_parameters(model, config.exclude)
        scores = score(model, units, images(), config, ranks, seed=6, movement=movement)
        for _, scope, granularity in (case for case in SETTINGS if case[0] == rule):
            chosen = config.model_copy(update={"scope": scope, "granularity": granularity})
            axes = {unit.name: unit.input_dim for unit in units}
            early = select_masks(scores, MaskSet.dense(units), chosen, 0.2, axes, ranks).masks
            final = select_masks(scores, early, chosen, 0.5, axes, ranks).masks
            found[rule, scope, granularity] = early.digest + final.digest
    return found


def _float64_scores(ranks: Ranks) -> dict[str, str]:
    workload = regression(
        TanhNet, draw(11, 3, seed=1, dtype=torch.float64), draw(11, 2, seed=2, dtype=torch.float64)
    )
    found = {}
    for rule in ("taylor", "taylor_squared", "fisher", "obd", "grasp", *LAYER_CRITERIA):
        config = prune_config(rule, calibration_batch_size=3)
        found[rule] = digest(scores_of(in_float64(TanhNet), workload, config, ranks=ranks))
    return found


def _progress(ranks: Ranks, trained: nn.Module) -> list[tuple[int, int]]:
    told: list[Progress] = []
    evaluate(trained, images(), ranks, 4, on_progress=told.append)
    return [(one.done, one.total) for one in told]


def _recalibrated(ranks: Ranks, trained: nn.Module) -> str:
    model = copy_frozen(trained)
    recalibrate_batchnorm(model, images(), ranks, examples=31, batch_size=6, seed=1)
    return digest(model.state_dict())


class UnrulyNet(ConvNet):
    """Counts its calls, drifts in two buffers and draws random numbers, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("drift", torch.zeros(3))
        self.register_buffer("bound_anew", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.drift += inputs.detach().mean()
        self.bound_anew = self.bound_anew * 0.9 + self.drift
        noise = 0.1 * torch.randn_like(inputs)
        return super().forward(inputs + noise) + self.drift + self.bound_anew


def _unruly_model(ranks: Ranks) -> tuple[str, tuple[float, float], str]:
    workload, (model, _) = images(UnrulyNet), _train(ranks, UnrulyNet)
    assert model.calls == 6
    config = prune_config("taylor", calibration_examples=23, calibration_batch_size=5)
    scores = scores_of(model, workload, config, ranks=ranks)
    figures = evaluate(model, workload, ranks, 4)
    recalibrate_batchnorm(model, workload, ranks, examples=31, batch_size=6, seed=1)
    return digest(scores), figures, digest(model.state_dict())


def _held_out(ranks: Ranks, strategy: str) -> list[Any]:
    """Rounds judged by a validation split and stopped early, then the test split."""
    job, workload = case_of("stopped early", strategy)
    found: list[Any] = []
    stored = {}
    for state in run_rounds(job, workload, ranks):
        record = state.record.model_dump(exclude={"seconds"})
        found.append((record, digest(state.model.state_dict())))
        # Of a sharded network rank 0 alone has the whole file.
        weights = state.to_files().get("weights.safetensors", b"")
        stored[state.record.round] = ranks.broadcast_object(bytes(weights))
    model, *_ = build_start(workload, job.seed, ranks, strategy)
    tested = measure_final_test(job, workload, model, ranks, 1, lambda number: stored[number])
    return [*found, tested.model_dump()]


def _filled_in(ranks: Ranks) -> Tensor:
    values = torch.zeros(7)
    for item in ranks.deal(7):
        if item is not None:
            values[item] = 0.1 * item
    return ranks.all_reduce_disjoint(values)


def _together(ranks: Ranks) -> list[str]:
    """Fails on some ranks alone; reports what each rank was told."""

    def fail_from(first: int) -> int:
        if ranks.rank >= first:
            raise ConfigError(f"planted on rank {ranks.rank}", rank_of_fault=ranks.rank)
        return ranks.rank

    told = []
    for first in (0, 1, ranks.world_size):
        try:
            told.append(f"fine on {ranks.run_collectively(lambda first=first: fail_from(first))}")
        except ConfigError as error:
            told.append(f"{error} ({error.rank_of_fault})")
    return told


FAILING_STEPS = ("training", "scoring", "re-estimation", "evaluation", "anything together")


def _failures(ranks: Ranks, trained: nn.Module) -> dict[tuple[str, str], str]:
    """Fails on the last rank alone, in its first item; reports what each rank was told."""
    told = {}
    for step in FAILING_STEPS:
        for error in (WorkloadError("planted"), ZeroDivisionError("planted")):
            try:
                _fail_in(step, ranks, copy.deepcopy(trained), error)
            except Exception as raised:  # noqa: BLE001 - reported
                told[step, type(error).__name__] = f"{type(raised).__name__}: {raised}"
    return told


def _fail_in(step: str, ranks: Ranks, model: nn.Module, error: Exception) -> None:
    def fail_on_the_last(inputs: Any = None) -> Any:
        if ranks.rank == ranks.world_size - 1:
            raise error
        return inputs

    workload = images()
    # In the network: what prepare or a data set raises is an error of the workload.
    model.register_forward_pre_hook(lambda module, inputs: fail_on_the_last(inputs))
    if step == "training":
        recipe = FinetuneConfig(epochs=1, batch_size=14, microbatches=5)
        span, optimizer = Span("finetune", range(2), range(2)), make_optimizer(model, recipe)
        train_epochs(model, workload, recipe, ranks, optimizer, span, seed=5)
    elif step == "scoring":
        scores_of(model, workload, prune_config(calibration_batch_size=5), ranks=ranks)
    elif step == "re-estimation":
        recalibrate_batchnorm(model, workload, ranks, examples=31, batch_size=6, seed=1)
    elif step == "evaluation":
        evaluate(model, workload, ranks, 4)
    else:
        ranks.run_collectively(fail_on_the_last)


def _disagreement(ranks: Ranks) -> list[str]:
    """Plants a stray digest on the last rank, then on all but the first, then nowhere."""
    heard = []
    for first_stray in (ranks.world_size - 1, 1, ranks.world_size):
        is_stray = ranks.rank >= max(first_stray, 1)
        try:
            ranks.check_agreement("stray" if is_stray else "common", "the mask of round 3")
            heard.append("")
        except PruneError as error:
            heard.append(str(error))
    return heard


# -- starting the processes ------------------------------------------------------------------------


def reports_of_world(
    world_size: int, folder: Path, program: Callable[[Ranks], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Runs a program on `world_size` gloo processes; returns their reports, rank 0 first."""
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=_work, args=(rank, world_size, folder, program), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    return [_read(folder / f"rank-{rank}") for rank in range(world_size)]


def _work(
    rank: int, world_size: int, folder: Path, program: Callable[[Ranks], dict[str, Any]]
) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
        )
        report = program(Ranks.current())
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        report = {"failure": traceback.format_exc()}
        raise
    finally:
        (folder / f"rank-{rank}").write_bytes(pickle.dumps(report))


def _read(path: Path) -> dict[str, Any]:
    report = pickle.loads(path.read_bytes())
    assert "failure" not in report, report["failure"]
    return report
