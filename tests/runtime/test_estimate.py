"""The plan of a job against what the job then does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_networks import ConvNet, TanhNet, draw, images, job_config, regression
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import DistillationConfig, FinetuneConfig, PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning import activations, reconstruction, rounds
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.runtime.estimate import CostEstimate, make_plan
from gbp_ray.runtime.memory import Phase
from gbp_ray.training.footprint import count_live_bytes
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.contract import Workload


def phase_of(plan: CostEstimate, name: str) -> Phase:
    (phase,) = [phase for phase in plan.phases if phase.name == name]
    return phase


def whole_job(criterion: str = "taylor", **sections: Any) -> JobConfig:
    recipe = {"epochs": 1, "batch_size": 20, "microbatches": 4}
    prune = {
        "criterion": criterion,
        "sparsity": 0.5,
        "rounds": 2,
        "calibration_examples": 40,
        "calibration_batch_size": 16,
        "batchnorm_examples": 40,
    }
    return job_config(
        pretrain=PretrainConfig(**recipe),
        finetune=FinetuneConfig(**recipe, **sections.pop("finetune", {})),
        prune=prune | sections.pop("prune", {}),
        workload={"eval_batch_size": 16},
        **sections,
    )


class WideNet(nn.Sequential):
    """Weights enough that they, too, count beside the activations."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 3),
        )


class DeepNet(nn.Sequential):
    """Equal layers, of which only the first of each kind is solved for in a plan."""

    def __init__(self) -> None:
        blocks = [part for _ in range(3) for part in (nn.Linear(48, 48), nn.ReLU())]
        super().__init__(
            *(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 48), nn.Tanh()),
            *(*blocks, nn.Linear(48, 48, bias=False), nn.Tanh(), nn.Linear(48, 3)),
        )


# -- memory ----------------------------------------------------------------------------------------

WATCHED: dict[str, Callable[..., str]] = {
    "score": lambda *args: "score",
    "evaluate": lambda *args: "evaluate",
    "recalibrate_as_asked": lambda *args: "batchnorm",
    "train_epochs": lambda *args: args[5].phase,
}


def measured_peaks(job: JobConfig, workload: Workload, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Runs a job; returns the peak of what each phase allocated beyond what was there before it."""
    peaks: dict[str, int] = {}

    def watch(name: str, phase_by: Callable[..., str]) -> None:
        original = getattr(rounds, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            phase = phase_by(*args)
            live = count_live_bytes(lambda: results.append(original(*args, **kwargs)))
            peaks[phase] = max(peaks.get(phase, 0), *live)
            return results[0]

        patch.setattr(rounds, name, watched)

    for name, phase_by in WATCHED.items():
        watch(name, phase_by)
    for _ in run_rounds(job, workload, Ranks()):
        pass
    return peaks


TECHNIQUES: list[dict[str, Any]] = [
    {"ema_decay": 0.9},
    {"max_gradient_norm": 0.1, "optimizer": "adam"},
    {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    {"precision": "bfloat16"},
    {"distillation": {"weight": 0.5}},
    {"adversarial": {"kind": "fgsm", "epsilon": 0.02, "weight": 0.5}, "freeze": ["0*"]},
]


@pytest.mark.parametrize("recipe", TECHNIQUES, ids=lambda recipe: "-".join(recipe))
def test_a_technique_of_training_holds_what_the_plan_says(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = whole_job("magnitude", finetune=recipe)
    workload = dataclasses.replace(images(WideNet), input_range=(-6.0, 6.0))
    plan = make_plan(job, workload)
    held = phase_of(plan, "finetune").held
    predicted = sum(size for part, size in held.items() if part not in STANDING - {"optimizer"})
    measured = measured_peaks(job, workload, monkeypatch)["finetune"]
    assert predicted == pytest.approx(measured, rel=0.1)
    # What clipping and mixing hold is less than the peak of the pass, and changes nothing.
    if recipe.keys() & {"ema_decay", "precision"}:
        plain = whole_job("magnitude")
        assert held != phase_of(make_plan(plain, workload), "finetune").held


STANDING = {"model", "masks", "dense weights", "dense network", "teacher", "its answers"}
STANDING |= {"movement", "optimizer"}


@pytest.mark.parametrize("criterion", [rule for rule in CRITERIA if rule != "snip"])
def test_a_phase_holds_what_the_plan_says(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job, workload = whole_job(criterion), images(WideNet)
    plan = make_plan(job, workload)
    peaks = measured_peaks(job, workload, monkeypatch)
    assert set(peaks) == {"score", "evaluate", "batchnorm", "pretrain", "finetune"}
    for name, measured in peaks.items():
        held = phase_of(plan, name).held
        # Training makes the optimizer's state; what else stands was made before.
        made = held.get("optimizer", 0) if name in ("pretrain", "finetune") else 0
        predicted = made + sum(size for part, size in held.items() if part not in STANDING)
        assert predicted == pytest.approx(measured, rel=0.1), name


def count_in_threads(patch: pytest.MonkeyPatch) -> None:
    """Counts what passes make that run in threads of their own."""
    go_on, work = activations._Pass.go_on, activations._Pass._work
    counters: dict[activations._Pass, TorchDispatchMode | None] = {}

    def going(self: activations._Pass) -> None:
        counters[self] = _get_current_dispatch_mode()
        go_on(self)

    def working(self: activations._Pass, num_threads: int) -> None:
        with counters[self] or nullcontext():
            work(self, num_threads)

    patch.setattr(activations._Pass, "go_on", going)
    patch.setattr(activations._Pass, "_work", working)


@pytest.mark.parametrize(
    ("build", "prune"),
    [
        (WideNet, {"calibration_batch_size": 40}),
        (WideNet, {"calibration_batch_size": 5, "sparsity": 0.2, "schedule": "one_shot"}),
        (ConvNet, {}),
        (ConvNet, {"granularity": "channel", "sparsity": 0.05}),
        (DeepNet, {}),
        (DeepNet, {"reconstruct": "sparsegpt", "calibration_batch_size": 5}),
    ],
    ids=str,
)
def test_refitting_holds_what_the_plan_says(
    build: Callable[[], nn.Module], prune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refit = {"reconstruct": "least_squares", "reconstruct_positions": 9}
    job, workload = whole_job("magnitude", prune={**refit, **prune}), images(build)
    plan = make_plan(job, workload)
    held = phase_of(plan, "reconstruct").held
    assert held["dense network"] == held["model"]
    assert "dense network" not in phase_of(plan, "pretrain").held
    count_in_threads(monkeypatch)
    monkeypatch.setitem(WATCHED, "reconstruct", lambda *args: "reconstruct")
    measured = measured_peaks(job, workload, monkeypatch)["reconstruct"]
    predicted = sum(size for part, size in held.items() if part not in STANDING)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_a_plan_solves_for_one_layer_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[str] = []
    monkeypatch.setattr(reconstruction.Moments, "check", lambda moments, name: solved.append(name))
    job = whole_job("magnitude", prune={"reconstruct": "least_squares"})
    make_plan(job, images(DeepNet))
    # Over two and over four examples; of the equal layers one that ReLU follows, one that does not.
    assert solved == 2 * [f"{name}.weight" for name in ("0", "2", "4", "10", "12")]


def test_what_stands_through_all_phases_is_told_by_name() -> None:
    workload = images(WideNet)
    model = WideNet()
    parameters = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    prunable = sum(m.weight.numel() for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    plain = phase_of(make_plan(whole_job(), workload), "score").held
    assert plain["model"] == parameters + buffers
    assert plain["masks"] == prunable
    assert plain["optimizer"] == parameters
    assert plain["statistic"] == 8 * prunable
    assert not {"dense weights", "teacher", "movement"} & set(plain)
    rewound = make_plan(whole_job(prune={"rewind": "weights"}), workload)
    assert phase_of(rewound, "score").held["dense weights"] == parameters + buffers
    assert "optimizer" not in phase_of(rewound, "score").held
    taught = whole_job(finetune={"distillation": DistillationConfig(weight=0.5)})
    assert phase_of(make_plan(taught, workload), "score").held["teacher"] == parameters + buffers
    adam = make_plan(whole_job(finetune={"optimizer": "adam"}), workload)
    assert phase_of(adam, "finetune").held["optimizer"] == 2 * parameters
    moved = make_plan(whole_job("movement"), workload)
    assert phase_of(moved, "decide").held["movement"] == 8 * prunable


def test_more_workers_hold_smaller_shares_of_the_scores() -> None:
    one, four = (
        make_plan(whole_job(cluster={"num_workers": workers}), images(WideNet))
        for workers in (1, 4)
    )
    shares = [phase_of(plan, "score").held["statistic"] for plan in (one, four)]
    assert shares[1] == pytest.approx(shares[0] / 4, rel=0.05)
    assert phase_of(four, "decide").num_bytes < phase_of(one, "decide").num_bytes


def test_a_plan_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    """The network is built anew under the job's seed, so the workload alone is shared."""
    built_models: list[nn.Module] = []

    def build() -> nn.Module:
        built_models.append(ConvNet())
        return built_models[-1]

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    make_plan(whole_job(), images(build))
    assert torch.equal(torch.rand(3), expected)
    (model,) = built_models
    assert int(model.norm1.num_batches_tracked) == 0
    assert bool((model.norm1.running_mean == 0).all())


# -- steps, passes, storage ------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["taylor", "grasp", "magnitude", "movement"])
def test_a_job_takes_the_steps_and_the_passes_of_its_plan(criterion: str) -> None:
    job = whole_job(criterion)
    plan = make_plan(job, images())
    told: list[Progress] = []
    for _ in run_rounds(job, images(), Ranks(), on_progress=told.append):
        pass
    steps = [one for one in told if one.phase in ("pretrain", "finetune")]
    assert len(steps) == plan.num_steps
    assert sum(one.phase == "pretrain" for one in steps) == plan.pretrain_steps
    scored = [one for one in told if (one.phase, one.round) == ("score", 1)]
    assert len(scored) == plan.num_passes * 3  # 40 examples in batches of 16
    assert plan.num_passes == {"taylor": 1, "grasp": 2, "magnitude": 0, "movement": 0}[criterion]


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_job_stores_what_its_plan_says(criterion: str, optimizer: str) -> None:
    class LargeNet(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(72, 700), nn.Tanh(), nn.Linear(700, 3))

    job, workload = whole_job(criterion, finetune={"optimizer": optimizer}), images(LargeNet)
    plan = make_plan(job, workload)
    stored = [sum(map(len, s.to_files().values())) for s in run_rounds(job, workload, Ranks())]
    assert plan.round_bytes == pytest.approx(stored[-1], rel=0.05)
    assert plan.stored_bytes == pytest.approx(sum(stored), rel=0.05)


def test_one_worker_sends_nothing() -> None:
    for workers in (0, 1):
        plan = make_plan(whole_job(cluster={"num_workers": workers}), images())
        assert plan.sent_bytes_per_round == 0
        assert {phase.sent_bytes for phase in plan.phases} == {0}


def test_what_is_sent_follows_from_sizes_alone() -> None:
    """A linear network of 20 weights without a bias: every figure can be counted by hand."""
    inputs, targets = draw(32, 4), draw(32, 5)
    workload = regression(lambda: nn.Linear(4, 5, bias=False), inputs, targets)
    recipe = {"epochs": 1, "batch_size": 8, "microbatches": 4}
    job = job_config(
        prune={"calibration_examples": 32, "calibration_batch_size": 4, "batchnorm_examples": 0},
        finetune=FinetuneConfig(**recipe),
        cluster={"num_workers": 2},
    )
    plan = make_plan(job, workload)
    # 8 batches in 4 turns, each with half of the weights to the other rank, in float32.
    assert phase_of(plan, "score").sent_bytes == 4 * 12 * 4
    # 4 steps of 2 turns and a gathering of the sum: 3 of 5 rows, and half of a loss.
    assert phase_of(plan, "finetune").sent_bytes == 4 * 3 * (12 * 4 + 2)
    # Sent and received: for each of two ranks 3 rows, of which the last rank has 2.
    assert phase_of(plan, "score").held["in flight"] == 2 * 2 * 12 * 4
    grasp = job.model_copy(update={"prune": job.prune.model_copy(update={"criterion": "grasp"})})
    assert phase_of(make_plan(grasp, workload), "score").sent_bytes == 2 * 4 * 12 * 4 + 8 * 12
    # A number of rows and 4 squares lie on one rank, which tells the others of its 20 weights.
    wanda = job.model_copy(update={"prune": job.prune.model_copy(update={"criterion": "wanda"})})
    planned = phase_of(make_plan(wanda, workload), "score")
    assert planned.sent_bytes == 4 * 5 * 4 + 8 * 20
    assert planned.held["statistic"] == 8 * 5


def test_examples_in_memory_are_counted_once() -> None:
    inputs, targets = draw(10, 3), draw(10, 2)
    plan = make_plan(job_config(), regression(TanhNet, inputs, targets))
    assert plan.data_bytes == 4 * (30 + 20)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher", "synflow", "movement"])
def test_a_sharded_network_takes_less_of_each_rank_and_more_of_the_wire(criterion: str) -> None:
    """What the ranks really hold is compared in tests/benchmarks/sharded_memory.py."""
    workload = images(WideNet)

    def plan_of(strategy: str, num_workers: int) -> CostEstimate:
        cluster = {"strategy": strategy, "num_workers": num_workers}
        return make_plan(whole_job(criterion, cluster=cluster), workload)

    sharded, wider, replicated = plan_of("fsdp", 2), plan_of("fsdp", 4), plan_of("replicated", 2)
    assert [p.name for p in sharded.phases] == [p.name for p in replicated.phases]
    assert (sharded.num_steps, sharded.num_passes) == (replicated.num_steps, replicated.num_passes)
    for name in ("finetune", "evaluate", "write"):
        parts = [phase_of(plan, name).held for plan in (sharded, wider)]
        assert parts[1]["rows of the model"] < parts[0]["rows of the model"]
        assert parts[1]["optimizer"] < parts[0]["optimizer"]
    assert phase_of(sharded, "decide").num_bytes < phase_of(replicated, "decide").num_bytes
    for name in ("evaluate", "finetune"):
        assert phase_of(sharded, name).sent_bytes > phase_of(replicated, name).sent_bytes
    # The weights are stored as shards, too.
    weights = sum(p.numel() * 4 for p in (*WideNet().parameters(), *WideNet().buffers()))
    assert sharded.round_bytes - replicated.round_bytes == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize(
    ("pretrain", "norm"), list(itertools.product([True, False], [True, False]))
)
def test_phases_that_will_not_happen_are_not_listed(pretrain: bool, norm: bool) -> None:
    job = whole_job(prune={"batchnorm_examples": 40 if norm else 0})
    if not pretrain:
        job = job.model_copy(update={"pretrain": PretrainConfig(), "finetune": FinetuneConfig()})
    names = [phase.name for phase in make_plan(job, images()).phases]
    expected = ["build", "pretrain", "score", "decide", "batchnorm", "finetune", "evaluate"]
    missing = ({"pretrain", "finetune"} if not pretrain else set()) | (
        set() if norm else {"batchnorm"}
    )
    assert names == [*(name for name in expected if name not in missing), "write"]
