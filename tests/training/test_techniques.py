"""All that a recipe offers at once: the same bits on any number of ranks, in shards or not."""

from __future__ import annotations

from typing import Any

import pytest
from rank_program import reports_of_world
from technique_program import technique_program, technique_rounds

from gbp_ray.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {
        precision: technique_rounds(Ranks(), "replicated", precision)
        for precision in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_techniques_do_not_depend_on_the_number_of_ranks_nor_on_shards(
    world_size: int, alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("techniques")
    for report in reports_of_world(world_size, folder, technique_program):
        for (strategy, precision), found in report.items():
            assert found == alone[precision], (strategy, precision)


def test_precisions_differ(alone: dict[str, Any]) -> None:
    assert alone["float32"] != alone["bfloat16"]
