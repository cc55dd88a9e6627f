"""Workers killed in every phase and at any moment: the round is lost, never the result.

Processes over gloo stand for Ray's workers, and a new group of another size for a restart on what
is left of a cluster; `test_faults_on_ray` does a little of it on Ray itself.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hub_models import WORDS, write_models
from kill_program import (
    LANGUAGE,
    PHASES,
    UNITS,
    Death,
    end_group,
    make_job,
    start_group,
    wait_until_met,
)
from quick_trials import results_of

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.runtime.trial import work_trial

logger = logging.getLogger(__name__)

DEATHS = [
    *(Death(phase, 0, 1) for phase in ("build", "train", "write")),
    *(Death(phase, 1, 0) for phase in ("score", "decide", "train", "evaluate", "write", "written")),
    *(Death(phase, 2, 1) for phase in ("build", "score", "decide", "train")),
]
needs_kills = pytest.mark.skipif(
    "GBP_RAY_KILLS" not in os.environ,
    reason="other cases cover the most of it; set GBP_RAY_KILLS to a number of deaths to try it",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The rounds of a trial that nobody disturbed, of a replicated network in this very process."""
    job = make_job(tmp_path_factory.mktemp("whole"), "replicated")
    work_trial(job, Ranks())
    return results_of(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sizes", "deaths"),
    [
        pytest.param("replicated", (2,), DEATHS, id="replicated, 2 workers", marks=needs_kills),
        pytest.param(
            "replicated", (3, 2, 1, 4), DEATHS, id="replicated, 1 to 4 workers", marks=needs_kills
        ),
        pytest.param("fsdp", (3, 2, 1, 4), DEATHS, id="sharded, 1 to 4 workers", marks=needs_kills),
        # Among the files of a round that are there are then some of its shards.
        pytest.param("fsdp", (2, 3), [Death("write", 1, 1)], id="sharded, 2 and 3 workers"),
    ],
)
def test_a_worker_killed_in_any_phase_costs_its_round_alone(
    tmp_path: Path,
    whole: list[tuple[Any, ...]],
    strategy: str,
    sizes: tuple[int, ...],
    deaths: list[Death],
) -> None:
    job = make_job(tmp_path, strategy)
    for number, planned in enumerate(deaths):
        size = sizes[number % len(sizes)]
        # Of a replicated network the first rank writes alone, and it ends every round.
        is_writing = planned.phase == "written" or (
            planned.phase == "write" and strategy == "replicated"
        )
        death = Death(planned.phase, planned.round, 0 if is_writing else planned.rank % size)
        codes = end_group(start_group(job, size, death))
        assert codes[death.rank] == -signal.SIGKILL, f"nobody died of {death} among {size}"
        assert None not in codes, f"{death}: a survivor waits for the dead"
        assert 0 not in codes, f"{death}: a survivor went on alone"
        kept = death.round + (death.phase == "written")
        assert results_of(job) == whole[:kept], f"{death} among {size} took more than its round"
    assert end_group(start_group(job, sizes[-1])) == [0] * sizes[-1]
    assert results_of(job) == whole


def check_deaths(
    job: JobConfig, whole: list[tuple[Any, ...]], sizes: tuple[int, ...], deaths: list[Death]
) -> None:
    """Lets a worker die in groups of these sizes in turn; each death costs its round alone."""
    for number, planned in enumerate(deaths):
        size = sizes[number % len(sizes)]
        death = Death(planned.phase, planned.round, planned.rank % size)
        codes = end_group(start_group(job, size, death))
        assert codes[death.rank] == -signal.SIGKILL, f"nobody died of {death} among {size}"
        assert results_of(job) == whole[: death.round]


CUTS = [Death("cut", 1, 1), Death("write", 1, 0), Death("evaluate", 2, 1), Death("cut", 2, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sizes", "deaths"),
    [
        ("replicated", (2,), CUTS[:1]),
        ("fsdp", (2, 3), CUTS[2:]),
        pytest.param("replicated", (3, 2, 1, 4), CUTS, marks=needs_kills, id="all, replicated"),
        pytest.param("fsdp", (3, 2, 4), CUTS, marks=needs_kills, id="all, sharded"),
    ],
)
def test_a_worker_killed_while_units_leave_costs_its_round_alone(
    tmp_path: Path, strategy: str, sizes: tuple[int, ...], deaths: list[Death]
) -> None:
    calm = make_job(tmp_path / "calm", "replicated", UNITS)
    work_trial(calm, Ranks())
    whole = results_of(calm)
    job = make_job(tmp_path / "killed", strategy, UNITS)
    check_deaths(job, whole, sizes, deaths)
    assert end_group(start_group(job, sizes[-1])) == [0] * sizes[-1]
    assert results_of(job) == whole


REFITS = [Death("score", 1, 0), Death("reconstruct", 1, 1), Death("write", 2, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sizes", "deaths"),
    [
        ("replicated", (1, 2, 1), REFITS),
        pytest.param("fsdp", (2, 3), REFITS, marks=needs_kills, id="sharded"),
    ],
)
def test_a_worker_killed_while_a_language_model_is_refitted_costs_its_round_alone(
    tmp_path: Path, strategy: str, sizes: tuple[int, ...], deaths: list[Death]
) -> None:
    pytest.importorskip("transformers", reason="needs the extra hf, which is not installed")
    write_models(tmp_path)
    text = " ".join(WORDS[(3 * i * i + i) % 20] for i in range(600))
    (tmp_path / "text.txt").write_text(text)
    options = {"workload.options": {"folder": str(tmp_path)}, "prune.sparsity": 0.5}
    calm = make_job(tmp_path / "calm", "replicated", options, LANGUAGE)
    work_trial(calm, Ranks())
    whole = results_of(calm)
    job = make_job(tmp_path / "killed", strategy, options, LANGUAGE)
    check_deaths(job, whole, sizes, deaths)
    assert end_group(start_group(job, 2)) == [0] * 2
    assert results_of(job) == whole


def test_workers_are_killed_in_every_phase() -> None:
    assert {death.phase for death in (*DEATHS, *CUTS, *REFITS)} == set(PHASES)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicated", pytest.param("fsdp", marks=needs_kills)])
def test_workers_killed_at_random_moments_lose_nothing(
    tmp_path: Path, whole: list[tuple[Any, ...]], strategy: str
) -> None:
    """A random rank of a group of random size; GBP_RAY_KILLS asks for more than three deaths."""
    draws = random.Random(os.environ.get("GBP_RAY_KILL_SEED", "5"))
    job = make_job(tmp_path / "first", strategy)
    group = start_group(job, 2)
    wait_until_met(job, group)
    started = time.monotonic()
    assert end_group(group) == [0, 0]
    length = time.monotonic() - started
    num_deaths, num_trials = 0, 0
    while num_deaths < int(os.environ.get("GBP_RAY_KILLS", "3")):
        if len(results_of(job)) == len(whole):
            assert results_of(job) == whole
            num_trials += 1
            job = make_job(tmp_path / f"trial{num_trials}", strategy)
        size, before = draws.randint(1, 4), len(results_of(job))
        group = start_group(job, size)
        victim = group[draws.randrange(size)]
        wait_until_met(job, group)
        victim.join(draws.random() * length)
        victim.kill()
        codes = end_group(group)
        assert None not in codes, "a survivor waits for the dead"
        if -signal.SIGKILL not in codes:
            assert codes == [0] * size
            continue
        num_deaths += 1
        after = results_of(job)
        assert len(after) >= before
        assert after == whole[: len(after)]
        logger.info("death %d among %d: %d whole rounds", num_deaths, size, len(after))
    assert end_group(start_group(job, 3)) == [0, 0, 0]
    assert results_of(job) == whole
