from __future__ import annotations

import itertools
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_program import FAILING_STEPS, SETTINGS, SUM_CASES, addends, report_of, reports_of_world
from techniques import TECHNIQUES, WORLDS

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sums import OrderedSum

World = list[dict[str, Any]]
OF_EACH_RANK = {"rank", "sums", "progress", "shared", "together", "failures", "disagreement"}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process computes without torch.distributed."""
    return report_of(Ranks.current())


@cache
def reports(size: int, strategy: str) -> World:
    """Starts the ranks of a world once, and returns what each reports."""
    with tempfile.TemporaryDirectory() as folder:
        return reports_of_world(size, Path(folder), partial(report_of, strategy=strategy))


@pytest.fixture(scope="module", params=[2, 3, 4], ids="{0}-ranks".format)
def world(request: pytest.FixtureRequest) -> World:
    """Ranks that each hold the whole network."""
    return reports(request.param, "replicated")


@pytest.mark.parametrize(("size", "strategy"), WORLDS)
def test_results_do_not_depend_on_the_number_of_ranks_nor_on_shards(
    size: int, strategy: str, alone: dict[str, Any]
) -> None:
    """Masks of every setting, whole trials of every technique, and what they are made of."""
    techniques = {name for name, t in TECHNIQUES.items() if (size, strategy) in t.worlds}
    for report in reports(size, strategy):
        names = report.keys() - OF_EACH_RANK
        assert techniques <= names
        for name in names:
            assert report[name] == alone[name], name


def test_precisions_differ(alone: dict[str, Any]) -> None:
    assert alone["everything"] != alone["everything in bfloat16"]


@given(num_items=st.integers(0, 40), world_size=st.integers(1, 9))
def test_each_item_is_dealt_to_one_rank_in_as_many_turns_on_all(
    num_items: int, world_size: int
) -> None:
    hands = [list(Ranks(rank, world_size).deal(num_items)) for rank in range(world_size)]
    assert len({len(hand) for hand in hands}) == 1
    by_turn = [item for turn in zip(*hands, strict=True) for item in turn]
    assert by_turn[:num_items] == list(range(num_items))
    assert set(by_turn[num_items:]) <= {None}
    assert len(by_turn) < num_items + world_size


def test_the_first_rank_alone_speaks() -> None:
    assert [Ranks(rank, 3).is_first for rank in range(3)] == [True, False, False]


def test_one_rank_communicates_nothing() -> None:
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert ranks.broadcast_object("x") == "x"
    assert ranks.run_collectively(lambda: 7) == 7
    ranks.check_agreement("anything", "a mask")


def sum_one_after_another(vectors: np.ndarray, dtype: type, wire: type) -> np.ndarray:
    """Adds in Python, one element and one item at a time."""
    total = [dtype(0)] * vectors.shape[1]
    for row in vectors:
        total = [dtype(sum_ + dtype(wire(x))) for sum_, x in zip(total, row, strict=True)]
    return np.array(total, dtype=dtype)


NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def test_the_addends_depend_on_their_order() -> None:
    """Otherwise the tests of bitwise sums could not fail."""
    vectors = addends(18, 5).float().numpy()
    sums = {
        sum_one_after_another(vectors[list(order)], np.float32, np.float32).tobytes()
        for order in itertools.permutations(range(5))
    }
    assert len(sums) > 20


@pytest.mark.parametrize("where", ["alone", "world"])
def test_an_ordered_sum_has_the_bits_of_adding_one_after_another(
    where: str, alone: dict[str, Any], world: World
) -> None:
    reports = [alone] if where == "alone" else world
    for case, *found in zip(SUM_CASES, *(report["sums"] for report in reports), strict=True):
        num_elements, num_items, dtype, wire = case
        vectors = addends(num_elements, num_items).numpy()
        expected = sum_one_after_another(vectors, NUMPY[dtype], NUMPY[wire])
        assert found == [expected.tobytes()] * len(reports), case


def test_an_ordered_sum_refuses_to_end_early() -> None:
    sums = OrderedSum(Ranks(), 2, 2, torch.float32)
    sums.add(torch.ones(2))
    with pytest.raises(AssertionError):
        sums.result()


def test_the_mask_cases_differ(alone: dict[str, Any]) -> None:
    """Equal digests prove little where all choose alike; only snip is taylor, on purpose."""
    for *_, scope, granularity in SETTINGS[:4]:
        by_rule = {rule: alone["masks"][rule, scope, granularity] for rule in CRITERIA}
        assert len(set(by_rule.values())) == len(CRITERIA) - 1
        assert by_rule["snip"] == by_rule["taylor"]
    # Random scores take the same share of every layer in any scope, give or take chance.
    for rule in set(CRITERIA) - {"random"}:
        weight = {alone["masks"][rule, scope, "weight"] for scope in ("global", "layer")}
        pattern = {alone["masks"][rule, scope, "2:4"] for scope in ("global", "layer")}
        assert len(weight) == 2
        assert weight.isdisjoint(pattern)


def test_progress_of_an_evaluation_ends_at_its_end(alone: dict[str, Any], world: World) -> None:
    assert alone["progress"] == [(done, 8) for done in range(1, 9)]
    for report in world:
        expected = [(min(done, 8), 8) for done in range(len(world), 8 + len(world), len(world))]
        assert report["progress"] == expected


def test_each_element_is_filled_in_by_its_rank(alone: dict[str, Any]) -> None:
    assert alone["filled in"] == pytest.approx([0.1 * item for item in range(7)])


def test_an_object_is_shared_by_the_first_rank(world: World) -> None:
    assert [report["shared"] for report in world] == [{"from": 0}] * len(world)


def test_a_failure_reaches_all_ranks_as_that_of_the_lowest(world: World) -> None:
    for report in world:
        everywhere, from_one, nowhere = report["together"]
        assert everywhere == "planted on rank 0 (0)"
        assert from_one == "planted on rank 1 (1)"
        assert nowhere == f"fine on {report['rank']}"


@pytest.mark.parametrize("step", FAILING_STEPS)
def test_a_rank_that_fails_alone_leaves_no_other_waiting(step: str, world: World) -> None:
    """Every rank went on to report, so none was left in a collective."""
    last = len(world) - 1
    for rank, report in enumerate(world):
        assert report["failures"][step, "WorkloadError"] == "WorkloadError: planted"
        own = "ZeroDivisionError: planted"
        others = f"TrialError: worker {last} failed with {own}"
        assert report["failures"][step, "ZeroDivisionError"] == (own if rank == last else others)


def test_one_rank_raises_what_it_met(alone: dict[str, Any]) -> None:
    for (_, kind), told in alone["failures"].items():
        assert told == f"{kind}: planted"
    assert len(alone["failures"]) == 2 * len(FAILING_STEPS)


def test_a_planted_divergence_is_named_on_every_rank(world: World) -> None:
    size = len(world)
    for report in world:
        last, all_but_first, none = report["disagreement"]
        assert last.startswith(f"the mask of round 3 differs between workers: ranks [{size - 1}] ")
        assert f"ranks {list(range(1, size))} disagree with rank 0" in all_but_first
        assert none == ""
