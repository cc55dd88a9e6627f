"""Metrics by name equal their textbook formulas, whatever the batch size and the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from thread_ranks import ThreadRanks, on_threads
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import WorkloadError
from gbp_ray.training.evaluation import Evaluation, evaluate
from gbp_ray.workloads.checks import check_workload
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.metrics import Metric, metrics_of

NUM = 23
IGNORED = -100


class Answers(nn.Module):
    """Gives its inputs as outputs, so that a test knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class TogetherRanks(ThreadRanks):
    """Threads that add up what each has, as processes do."""

    def all_reduce_disjoint(self, values: Tensor) -> Tensor:
        self.calls.append(("all_reduce_disjoint", values.numel()))
        return torch.stack(self.meeting.swap(self.rank, values.clone())).sum(dim=0)

    def raise_on_all(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure


def workload_of(outputs: Tensor, targets: Tensor, metrics: Any, loss: Any = None) -> Workload:
    split = (outputs, targets)
    loss = loss or functional.mse_loss
    return Workload(build_model=Answers, train=split, test=split, loss=loss, metrics=metrics)


def measure(workload: Workload, batch_size: int) -> Evaluation:
    return evaluate(Answers(), workload, Ranks(), batch_size)


def measured(workload: Workload) -> dict[str, float]:
    """Measures by batches of 1, 7 and all, and on two ranks; all must agree."""
    found = [measure(workload, size) for size in (1, 7, NUM)]
    for other in found[1:]:
        # The loss of a batch, which a perplexity is made of, is of float32.
        digits = 1e-6 if "perplexity" in other.metrics else 1e-12
        assert other.metrics == pytest.approx(found[0].metrics, rel=digits)
    assert run_on_two(workload, 3) == measure(workload, 3)
    return found[0].metrics


def run_on_two(workload: Workload, batch_size: int) -> Evaluation:
    def program(ranks: ThreadRanks) -> Evaluation:
        own = TogetherRanks(ranks.rank, 2, meeting=ranks.meeting, calls=ranks.calls)
        return evaluate(Answers(), workload, own, batch_size)

    one, other = on_threads(2, program)
    assert one == other
    return one


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(*shape: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


# -- errors ----------------------------------------------------------------------------------------


def test_errors_of_regression_equal_their_formulas() -> None:
    outputs, targets = draw(NUM, 3), draw(NUM, 3, seed=1)
    found = measured(workload_of(outputs, targets, ["mse", "rmse", "mae", "r2"]))
    y, p = targets.double().numpy(), outputs.double().numpy()
    residual = ((y - p) ** 2).sum(axis=0)
    spread = ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    assert found == {
        "mse": pytest.approx(np.mean((y - p) ** 2)),
        "rmse": pytest.approx(np.sqrt(np.mean((y - p) ** 2))),
        "mae": pytest.approx(np.mean(np.abs(y - p))),
        # The mean over columns, as scikit-learn's "uniform_average".
        "r2": pytest.approx(np.mean(1 - residual / spread)),
    }


def test_an_error_does_not_depend_on_where_the_values_lie() -> None:
    # One pass of squares loses digits far from zero; these are what r2 must stand.
    outputs, targets = draw(NUM, 1) + 1000, draw(NUM, 1, seed=1) + 1000
    found = measured(workload_of(outputs, targets, ["r2"]))
    y, p = targets.double().numpy(), outputs.double().numpy()
    expected = 1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert found["r2"] == pytest.approx(expected, rel=1e-6)


# -- classes ---------------------------------------------------------------------------------------


def test_shares_of_right_classes_equal_counts() -> None:
    logits, labels = draw(NUM, 9), labels_of(NUM, classes=9)
    labels[3] = labels[11] = IGNORED
    found = measured(workload_of(logits, labels, ["accuracy", "top5"], functional.cross_entropy))
    asked = [(row, label) for row, label in zip(logits, labels.tolist(), strict=True) if label >= 0]
    first = [int(row.argmax()) == label for row, label in asked]
    # A label is among the best five where fewer than five classes score higher.
    top5 = [int((row > row[label]).sum()) < 5 for row, label in asked]
    assert found == {"accuracy": sum(first) / len(asked), "top5": sum(top5) / len(asked)}


def test_perplexity_is_of_the_words_that_are_not_ignored() -> None:
    logits, words = draw(NUM, 11, 4), labels_of(NUM, 4, classes=11)
    words[::3, 2:] = IGNORED
    words[5] = IGNORED
    found = measured(workload_of(logits, words, ["perplexity"], functional.cross_entropy))
    shares = logits.double().softmax(dim=1)
    surprise = [
        -math.log(shares[row, words[row, place], place])
        for row in range(NUM)
        for place in range(4)
        if words[row, place] >= 0
    ]
    assert found["perplexity"] == pytest.approx(math.exp(sum(surprise) / len(surprise)), rel=1e-6)


def test_an_endless_perplexity_is_infinite_and_no_error() -> None:
    logits = torch.zeros(NUM, 2)
    logits[:, 0] = 2000.0
    found = measured(
        workload_of(logits, torch.ones(NUM).long(), "perplexity", functional.cross_entropy)
    )
    assert found["perplexity"] == math.inf


def test_the_f1_of_classes_is_their_mean_over_those_that_are_there() -> None:
    logits, labels = draw(NUM, 5), labels_of(NUM, classes=3)
    logits[:, 4] = -99.0  # never answered and never asked for
    labels[7] = IGNORED
    found = measured(workload_of(logits, labels, "f1", functional.cross_entropy))
    y, p = labels.numpy(), logits.argmax(dim=1).numpy()
    y, p = y[y != IGNORED], p[y != IGNORED]
    scores = []
    for c in sorted({*y.tolist(), *p.tolist()}):
        right, wrong, missed = ((p == c) & (y == c)).sum(), ((p == c) & (y != c)).sum(), ((p != c) & (y == c)).sum()  # fmt: skip # noqa: E501
        scores.append(2 * right / (2 * right + wrong + missed))
    assert len(scores) == 4
    assert found["f1"] == pytest.approx(np.mean(scores))


def test_the_f1_of_labels_counts_all_together() -> None:
    logits, labels = draw(NUM, 6), (draw(NUM, 6, seed=1) > 0.5).float()
    found = measured(workload_of(logits, labels, "f1", functional.binary_cross_entropy_with_logits))
    y, p = labels.numpy() > 0.5, logits.numpy() > 0
    precision, recall = (y & p).sum() / p.sum(), (y & p).sum() / y.sum()
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_miou_is_the_mean_over_classes_that_are_there_without_ignored_pixels() -> None:
    logits, labels = draw(NUM, 4, 3, 3), labels_of(NUM, 3, 3, classes=3)
    logits[:, 3] = -99.0
    labels[:, 0] = IGNORED
    found = measured(workload_of(logits, labels, "mIoU", functional.cross_entropy))
    y, p = labels.numpy(), logits.argmax(dim=1).numpy()
    is_asked = y != IGNORED
    ratios = []
    for c in range(4):
        both = (is_asked & (y == c) & (p == c)).sum()
        either = (is_asked & ((y == c) | (p == c))).sum()
        if either:
            ratios.append(both / either)
    assert len(ratios) == 3
    assert found["mIoU"] == pytest.approx(np.mean(ratios))


# -- chance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chance"), [("accuracy", 1 / 9), ("top5", 5 / 9), ("perplexity", 9), ("f1", None)]
)
def test_chance_is_what_guesses_among_the_classes_reach(name: str, chance: float | None) -> None:
    workload = workload_of(draw(NUM, 9), labels_of(NUM, classes=9), name, functional.cross_entropy)
    found = measure(workload, 7)
    assert found.specs[0].chance == (None if chance is None else pytest.approx(chance))
    assert found.num_items == NUM
    if name == "perplexity":
        # All logits equal: a guess.
        guess = workload_of(torch.zeros(NUM, 9), labels_of(NUM, classes=9), name, functional.cross_entropy)  # fmt: skip # noqa: E501
        assert measure(guess, 7).score == pytest.approx(9)


def test_a_fault_of_an_own_chance_is_named() -> None:
    metric = Metric("own", lambda o, t: o.sum().view(1), lambda s: 0.0, chance=lambda o: 1 / 0)
    with pytest.raises(WorkloadError, match=r"own\.chance raised ZeroDivisionError"):
        measure(workload_of(draw(NUM, 1), draw(NUM, 1), [metric]), 7)


# -- torchmetrics and names ------------------------------------------------------------------------


def dim_zero_sum(values: Tensor) -> Tensor:
    return values.sum(dim=0)


def dim_zero_cat(values: Tensor) -> Tensor:
    return values


class Summed:
    """Has what torchmetrics' classes of version 1 have."""

    higher_is_better = False

    def __init__(self, reduction: Callable[[Tensor], Tensor] = dim_zero_sum) -> None:
        self._defaults = {"error": torch.tensor(0.0), "total": torch.tensor(0)}
        self._reductions = {"error": reduction, "total": dim_zero_sum}
        self.sync_on_compute = self._to_sync = True
        self.reset()

    @property
    def _update_called(self) -> bool:
        return self._update_count > 0

    def to(self, device: Any) -> Summed:
        return self

    def reset(self) -> None:
        self.error, self.total = self._defaults["error"].clone(), self._defaults["total"].clone()
        self._update_count = 0

    def add(self, error: Tensor, number: int) -> None:
        self.error, self.total = self.error + error, self.total + number
        self._update_count += 1

    def compute(self) -> Tensor:
        assert self._update_called
        # In a group of processes it would add the states of all of them.
        assert not self._to_sync
        return (self.error / self.total).mean()


class MeanAbsoluteError(Summed):
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        # The state takes its shape from the first batch, as that of R2Score.
        self.add((outputs - targets).abs().sum(dim=0), len(outputs))


class ShareOfOthers(Summed):
    """Takes outputs for shares where all of a batch lie in [0, 1], as torchmetrics does."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        if not bool(((outputs >= 0) & (outputs <= 1)).all()):
            outputs = outputs.softmax(dim=1)
        self.add((1 - outputs[torch.arange(len(targets)), targets]).sum(), len(targets))


def test_a_metric_of_torchmetrics_is_taken_as_it_is() -> None:
    outputs, targets = draw(NUM, 2), draw(NUM, 2, seed=1)
    workload = workload_of(outputs, targets, [MeanAbsoluteError(), "mae"])
    found = [measure(workload, size) for size in (1, 7, NUM)]
    for one in found:
        # Its own states are of float32.
        assert one.metrics["MeanAbsoluteError"] == pytest.approx(one.metrics["mae"], rel=1e-5)
    assert not found[0].specs[0].higher_is_better
    with pytest.raises(WorkloadError, match="state 'error' of torchmetrics' MeanAbsoluteError"):
        metrics_of(workload_of(outputs, targets, [MeanAbsoluteError(dim_zero_cat)]))
    undirected = MeanAbsoluteError()
    undirected.higher_is_better = None  # type: ignore[assignment]
    with pytest.raises(WorkloadError, match="does not say whether higher is better"):
        metrics_of(workload_of(outputs, targets, [undirected]))


def test_a_metric_that_takes_some_outputs_for_shares_is_refused() -> None:
    targets = torch.arange(NUM) % 3
    logits = draw(NUM, 3).sigmoid()
    few = workload_of(logits, targets, [ShareOfOthers()], functional.cross_entropy)
    assert measure(few, 4).score == pytest.approx(measure(few, NUM).score, rel=1e-5)
    logits[NUM // 2] = 3 * draw(3, seed=1)
    some = workload_of(logits, targets, [ShareOfOthers()], functional.cross_entropy)
    with pytest.raises(WorkloadError, match=r"ShareOfOthers takes .* of 19 examples do, and for"):
        measure(some, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unit": 3}, r"m\.unit = 3: input should be a valid string"),
        ({"chance": "none"}, r"m\.chance = 'none': input should be a valid number"),
        ({"higher_is_better": "maybe"}, r"m\.higher_is_better = 'maybe': input should be"),
    ],
)
def test_a_description_of_another_type_is_refused_before_training(
    fields: dict[str, Any], words: str
) -> None:
    metric = Metric("m", lambda o, t: torch.ones(1), lambda sums: 1.0, **fields)
    with pytest.raises(WorkloadError, match=words):
        check_workload(workload_of(draw(NUM, 1), draw(NUM, 1), [metric]), Answers(), 8)


def test_a_metric_named_accuracy_is_its_own_beside_a_count_of_right_answers() -> None:
    targets = torch.arange(NUM) % 3
    own = Metric("accuracy", lambda o, t: torch.tensor([1.0, 0, 0]) * len(t), lambda s: s[0].item())
    workload = workload_of(draw(NUM, 3), targets, [own], functional.cross_entropy)
    workload = replace(workload, count_correct=lambda o, t: (o.argmax(dim=1) == t).sum())
    check_workload(workload, Answers(), 8)
    assert measure(workload, 7).score == NUM


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["rsme"], "there is no 'rsme', did you mean 'rmse'?"),
        (["rmse", "rmse"], "'rmse' is there twice"),
        ([Metric("loss", lambda o, t: o, lambda s: 0.0)], "'loss' cannot name a metric"),
        ([Metric("rmse_pruned", lambda o, t: o, lambda s: 0.0)], "'rmse_pruned' cannot name"),
        ([Metric("dense_rmse", lambda o, t: o, lambda s: 0.0)], "'dense_rmse' cannot name"),
        ([Metric("done", lambda o, t: o, lambda s: 0.0)], "'done' cannot name"),
        ([Metric("a b", lambda o, t: o, lambda s: 0.0)], "'a b' cannot name"),
    ],
)
def test_names_that_would_be_mistaken_are_refused(metrics: list[Any], words: str) -> None:
    with pytest.raises(WorkloadError, match=words.replace("?", r"\?")):
        metrics_of(workload_of(draw(2, 1), draw(2, 1), metrics))


def test_a_share_that_is_none_is_refused() -> None:
    metric = Metric("share", lambda o, t: torch.ones(1), lambda sums: 1.5, unit="%")
    with pytest.raises(WorkloadError, match=r"share is 1\.5 on workload\.test"):
        measure(workload_of(draw(NUM, 1), draw(NUM, 1), [metric]), 7)
