from __future__ import annotations

from typing import Any

import pytest
from rank_program import MASK_CASES, report_of, reports_of_world, sharded_report_of

from gbp_ray.pruning.ranks import Ranks

World = list[dict[str, Any]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process computes with a replicated network."""
    return report_of(Ranks.current())


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{0}-ranks".format)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return reports_of_world(request.param, folder, sharded_report_of)


@pytest.mark.parametrize("case", MASK_CASES, ids="-".join)
def test_masks_of_a_sharded_network_are_those_of_a_replicated_one(
    case: tuple[str, str, str], alone: dict[str, Any], world: World
) -> None:
    assert {report["masks"][case] for report in world} == {alone["masks"][case]}


@pytest.mark.parametrize("result", ["trained", "movement", "evaluated", "recalibrated"])
def test_results_of_a_sharded_network_are_those_of_a_replicated_one(
    result: str, alone: dict[str, Any], world: World
) -> None:
    assert [report[result] for report in world] == [alone[result]] * len(world)


def test_whole_trials_of_sharded_networks_end_as_those_of_replicated_ones(
    alone: dict[str, Any], world: World
) -> None:
    for report in world:
        for expected, found in zip(alone["rounds"], report["rounds"], strict=True):
            assert found == expected
