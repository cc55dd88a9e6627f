"""Masks of samples: nested sums have the bits of single ones, overlaps are counted right."""

from __future__ import annotations

import pytest
import torch
from oracles import LAYER_CRITERIA
from small_networks import ConvNet, built, images, job_config, prune_config, scores_of

from gbp_ray.cli.stability import _answer
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.analysis import Overlap, SizeStability, compare_samples, measure_overlap
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.scoring import score_prefixes
from gbp_ray.pruning.units import prunable_parameters
from gbp_ray.report.drawing import render
from gbp_ray.report.stability_figure import draw_stability
from gbp_ray.runtime.stability import Stability
from gbp_ray.training.progress import Progress

SIZES = (8, 12, 16, 32, 46)


@pytest.mark.parametrize(
    "criterion",
    ["taylor", "taylor_squared", "fisher", "obd", "grasp", "magnitude", "random", *LAYER_CRITERIA],
)
def test_scores_of_each_size_are_those_of_a_pass_of_its_own(criterion: str) -> None:
    model, workload = built(lambda: ConvNet(dropout=0.0)), images()
    config = prune_config(criterion, calibration_batch_size=8, hutchinson_probes=2)
    units = prunable_parameters(model)
    # Beyond the 46 examples that there are: cut, and counted once.
    found = dict(score_prefixes(model, units, workload, config, (*SIZES, 64), seed=5))
    assert list(found) == list(SIZES)
    for size, scores in found.items():
        alone = config.model_copy(update={"calibration_examples": size})
        expected = scores_of(model, workload, alone, seed=5)
        got = scores.gather(Ranks())
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_sizes_that_end_with_a_batch_share_one_pass() -> None:
    model, workload = built(ConvNet), images()
    config = prune_config("taylor_squared", calibration_batch_size=8)
    told: list[Progress] = []
    sizes = (8, 16, 32)
    list(
        score_prefixes(
            model,
            prunable_parameters(model),
            workload,
            config,
            sizes,
            on_progress=told.append,
        )
    )
    assert told == [Progress("score", done, 4) for done in range(1, 5)]


def masks_of(*rows: list[int]) -> list[MaskSet]:
    return [
        MaskSet({"a": torch.tensor(row[:4]).bool(), "b": torch.tensor(row[4:]).bool()})
        for row in rows
    ]


def test_overlaps_are_counted_by_pair_and_by_layer() -> None:
    one, other, third = masks_of([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1])
    found = measure_overlap([one, other, third])
    assert found.pairs == (2 / 4, 1 / 4, 1 / 4)
    assert found.by_layer["a"] == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert found.by_layer["b"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # Two of four and two of four: one is expected in both; one of two and one of two: a half.
    assert measure_overlap([one, other]).chance == pytest.approx(1.5 / (4 + 2 - 1.5))
    assert measure_overlap([one, one]).pairs == (1.0,)


def test_more_examples_make_samples_agree_more() -> None:
    workload = images(num_train=400)
    model = built(lambda: ConvNet(dropout=0.0))
    job = job_config(prune={"criterion": "taylor", "calibration_batch_size": 8})
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = compare_samples(job, workload, model, (8, 256), (0, 1, 2), Ranks(), is_evaluated=True)
    small, large = found
    assert (small.examples, large.examples) == (8, 256)
    assert len(small.between.pairs) == 3
    assert len(small.to_largest) == 6
    assert small.between.mean < large.between.mean < 1.0
    assert large.between.chance < large.between.mean
    assert large.to_largest == tuple(p for p in large.to_largest), "against the other samples"
    assert sorted(set(large.to_largest)) == sorted(set(large.between.pairs))
    assert len(large.scores) == len(large.accuracies) == 3
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("sizes", "overlaps", "enough", "words"),
    [
        ((8, 46), (0.5, 1.0), None, "two samples of 8 examples still give masks"),
        ((46,), (1.0,), None, "all 46 training examples, so nothing can be said about sampling"),
        ((8, 16), (0.5, 0.95), 16, "from 16 examples on"),
        ((8, 32), (0.5, 0.95), 32, "such samples share 70%, which makes them alike"),
    ],
)
def test_the_whole_of_the_data_is_no_sample(
    sizes: tuple[int, ...], overlaps: tuple[float, ...], enough: int | None, words: str
) -> None:
    samples = [
        SizeStability(size, Overlap((value,), 0.1, {"a": value}), (value,), ())
        for size, value in zip(sizes, overlaps, strict=True)
    ]
    found = Stability(job_config(), {"taylor": samples}, None, available=46)
    assert found.enough_examples("taylor") == enough
    one = found.to_dict()["samples"]["taylor"]
    assert words in _answer("taylor", one, 0.9, 0.8, 46)
    assert len(repr(found)) < 80
    assert render(lambda: draw_stability(found.to_dict()), "stability")
