"""Early stopping keeps the best network there was, and what is held out is never trained on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_networks import ConvNet, built, images, job_config
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.config.metrics import ACCURACY, MetricSpec
from gbp_ray.config.training import FinetuneConfig, PretrainConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import ConfigError
from gbp_ray.pruning.checks import check_job
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.training.evaluation import Evaluation, evaluate
from gbp_ray.training.loop import train_until_stale
from gbp_ray.training.optimizer import make_optimizer
from gbp_ray.workloads.contract import Workload, judged_split, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.loading import hold_out

HELD_OUT = hold_out(images(num_train=60), 0.25, seed=3)


class Validate:
    """Returns prepared validations, and remembers the network at each one."""

    def __init__(self, model: nn.Module, validations: list[tuple[float, float]]) -> None:
        self.model, self.validations = model, list(validations)
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self) -> Evaluation:
        self.seen.append(copy.deepcopy(self.model.state_dict()))
        return as_evaluation(self.validations[len(self.seen) - 1])


def as_evaluation(found: tuple[float, float]) -> Evaluation:
    return Evaluation(*found, {"accuracy": found[0]})


def train_with(
    validations: list[tuple[float, float]],
    patience: int,
    every: int = 2,
    start: tuple[float, float] = (0.5, 1.0),
    metric: MetricSpec = ACCURACY,
) -> Any:
    model = built(ConvNet)
    optimizer = make_optimizer(model, FinetuneConfig())
    validate, steps_taken = Validate(model, validations), []

    def train(part: range) -> float:
        steps_taken.extend(part)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        model.get_buffer("norm1.running_mean").add_(1)
        return float(part.start)

    first = copy.deepcopy(model.state_dict())
    outcome = train_until_stale(
        model,
        optimizer,
        range(10, 19),
        every=every,
        patience=patience,
        train=train,
        validate=validate,
        start=as_evaluation(start),
        rank=metric.rank,
    )
    return outcome, model, optimizer, [first, *validate.seen], steps_taken


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_stops_when_nothing_better_came_for_a_while() -> None:
    found = [(0.6, 1.0), (0.7, 1.0), (0.7, 1.0), (0.6, 0.1), (0.9, 1.0)]
    outcome, model, _, states, steps = train_with(found, patience=2)
    assert steps == list(range(10, 18)), "two validations after the second brought nothing"
    assert (outcome.kept_step, outcome.validation) == (4, as_evaluation((0.7, 1.0)))
    assert same(model.state_dict(), states[2])
    assert not same(states[2], states[4])
    assert outcome.train_loss == 16.0


def test_of_equally_accurate_networks_the_one_with_less_loss_is_better() -> None:
    found = [(0.5, 0.9), (0.5, 0.8), (0.5, 0.8), (0.5, 0.85), (0.5, 0.8)]
    outcome, model, _, states, steps = train_with(found, patience=9)
    assert steps == list(range(10, 19)), "the last part is short and validated, too"
    assert outcome.kept_step == 4
    assert same(model.state_dict(), states[2])


@pytest.mark.parametrize(
    ("values", "kept_step"),
    [
        ([9.0, 8.0, 8.5, 9.0, 8.5], 4),
        # What is NaN or infinite is worse than any number.
        ([math.nan, 9.0, math.inf, 9.5, math.nan], 4),
        ([12.0, 11.0, 13.0, 14.0], 0),
    ],
)
def test_of_errors_the_lowest_is_kept(values: list[float], kept_step: int) -> None:
    rmse = MetricSpec(name="rmse", higher_is_better=False)
    found = [(value, 1.0) for value in values]
    outcome, model, _, states, _ = train_with(found, patience=4, start=(10.0, 1.0), metric=rmse)
    assert outcome.kept_step == kept_step
    assert same(model.state_dict(), states[kept_step // 2])


def test_the_start_is_kept_where_training_only_hurts() -> None:
    outcome, model, optimizer, states, _ = train_with([(0.4, 1.0), (0.5, 1.0)], patience=2)
    assert (outcome.kept_step, outcome.validation) == (0, as_evaluation((0.5, 1.0)))
    assert same(model.state_dict(), states[0])
    assert not optimizer.state, "momentum of steps that were taken back is gone with them"


def test_the_optimizer_goes_back_with_the_network() -> None:
    found = [(0.6, 1.0), (0.5, 1.0), (0.5, 1.0)]
    _, model, optimizer, _, _ = train_with(found, patience=2)
    momentum = optimizer.state[next(model.parameters())]["momentum_buffer"]
    # One step of gradient 1 and weight decay; three would have made 2.7 of it.
    assert float(momentum.mean()) == pytest.approx(1.0, abs=0.01)


def test_what_is_held_out_is_a_part_of_the_training_split_by_seed() -> None:
    whole = images(num_train=60)
    again, other = hold_out(whole, 0.25, seed=3), hold_out(whole, 0.25, seed=4)

    def inputs_of(workload: Workload, split: str) -> list[bytes]:
        data = getattr(workload, split)
        inputs, _ = take_batch(workload, data, torch.arange(num_examples(data)))
        return [row.numpy().tobytes() for row in inputs]

    kept, aside = inputs_of(HELD_OUT, "train"), inputs_of(HELD_OUT, "validation")
    assert (len(kept), len(aside)) == (45, 15)
    assert not set(kept) & set(aside)
    assert sorted(kept + aside) == sorted(inputs_of(whole, "train"))
    assert inputs_of(again, "validation") == aside
    assert inputs_of(other, "validation") != aside
    assert inputs_of(HELD_OUT, "test") == inputs_of(whole, "test")
    assert (judged_split(whole), judged_split(HELD_OUT)) == ("test", "validation")


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_a_split_empty_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"workload.validation = .* of 60 training examples"):
        hold_out(images(num_train=60), share, seed=0)


def test_a_workload_with_a_validation_split_of_its_own_is_not_cut() -> None:
    with pytest.raises(ConfigError, match="validation split of its own"):
        hold_out(HELD_OUT, 0.1, seed=0)


def job_of(**changed: Any) -> JobConfig:
    finetune = {"epochs": 3, "batch_size": 15, "patience": 1, "validate_every": 0.5}
    return job_config(
        pretrain=PretrainConfig(epochs=1, batch_size=15),
        finetune=FinetuneConfig(**(finetune | changed)),
        prune={"rounds": 3, "calibration_examples": 24, "batchnorm_examples": 24},
        workload={"validation": 0.25, "train_sample": 20},
    )


def rounds_of(job: JobConfig, workload: Workload) -> list[Any]:
    return [
        (state.record.model_dump(exclude={"seconds", "fingerprints"}), state.to_files())
        for state in run_rounds(job, workload, Ranks())
    ]


def test_a_trial_is_judged_by_what_was_held_out() -> None:
    records = [record for record, _ in rounds_of(job_of(), HELD_OUT)]
    assert {record["judged_on"] for record in records} == {"validation"}
    assert all(record["train_accuracy"] is not None for record in records)
    assert records[0]["kept_step"] is None
    assert any(record["kept_step"] < 9 for record in records[1:]), "some round stops early"


def test_the_accuracy_on_record_is_that_of_the_weights_that_were_kept() -> None:
    for state in run_rounds(job_of(), HELD_OUT, Ranks()):
        accuracy, loss = evaluate(state.model, HELD_OUT, Ranks(), 7, split="validation")[:2]
        assert state.record.accuracy == accuracy
        assert state.record.loss == pytest.approx(loss)


def test_the_test_split_decides_nothing() -> None:
    inputs, targets = HELD_OUT.test
    other = replace(HELD_OUT, test=(inputs + 1, targets.flip(0)))
    assert rounds_of(job_of(), HELD_OUT) == rounds_of(job_of(), other)


def test_the_sample_of_training_examples_is_plain_and_fixed() -> None:
    workload = replace(images(num_train=60), augment=lambda inputs: inputs * 0)
    job = job_config(workload={"train_sample": 1000})
    state = next(run_rounds(job, workload, Ranks()))
    accuracy = evaluate(state.model, workload, Ranks(), 8, split="train").score
    assert state.record.train_accuracy == accuracy
    none = job_config(workload={"train_sample": 0})
    assert next(run_rounds(none, workload, Ranks())).record.train_accuracy is None


def test_patience_needs_examples_to_judge_by() -> None:
    with pytest.raises(ConfigError, match=r"finetune.patience = 1: .* set workload.validation"):
        check_job(job_of(), images(num_train=60))
    check_job(job_of(), HELD_OUT)
