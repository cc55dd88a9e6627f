"""Dense networks and scores that trials share: the bits of a trial alone, and one computation."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from quick_trials import quick_job, results_of

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning import rounds
from gbp_ray.results.maintenance import find_faults
from gbp_ray.results.store import Store
from gbp_ray.runtime.cache import dense_origin
from gbp_ray.runtime.trial import run_solo, work_trial

SHARING = {
    "cluster.num_workers": 1,
    "workload.options.width": 4,
    "pretrain.epochs": 0.3,
    "prune.batchnorm_examples": 64,
}


def sharing_job(storage: Path | str, **changed: Any) -> JobConfig:
    return quick_job(storage, **SHARING | changed)


def run(job: JobConfig) -> list[tuple[Any, ...]]:
    for _ in run_solo(job):
        pass
    return results_of(job)


def count_calls(patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what is computed from now on."""
    counts = {"score": 0, "dense": 0}
    score, train_dense = rounds.score, rounds._Run.train_dense

    def counting_score(*arguments: Any, **options: Any) -> Any:
        counts["score"] += 1
        return score(*arguments, **options)

    def counting_dense(run: Any) -> Any:
        counts["dense"] += 1
        return train_dense(run)

    patch.setattr(rounds, "score", counting_score)
    patch.setattr(rounds._Run, "train_dense", counting_dense)
    return counts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    return count_calls(monkeypatch)


def run_counted(job: JobConfig, ends: multiprocessing.Queue[tuple[int, int] | str]) -> None:
    """Runs a job in a process of its own, and hands over what it computed."""
    with pytest.MonkeyPatch.context() as patch:
        counts = count_calls(patch)
        try:
            run(job)
            ends.put((counts["score"], counts["dense"]))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting process
            ends.put(repr(error))


@pytest.mark.parametrize(
    "changed",
    [
        {"prune.criterion": "taylor_squared"},
        {"prune.criterion": "fisher", "prune.rewind": "weights"},
        {"prune.criterion": "magnitude", "finetune.distillation.weight": 0.5},
        {"prune.criterion": "movement"},
        {"prune.criterion": "random"},
        {"prune.criterion": "taylor", "prune.exclude": ["linear.*"]},
    ],
    ids=str,
)
def test_a_trial_that_shares_ends_with_the_bits_of_one_alone(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    # Three that have met what the others left, against one that never met anything.
    for sparsity in (0.5, 0.7):
        run(sharing_job(tmp_path, **changed, **{"prune.sparsity": sparsity}))
    third = run(sharing_job(tmp_path, **changed, **{"prune.sparsity": 0.9}))
    alone = sharing_job(tmp_path / "alone", **changed, **{"prune.sparsity": 0.9})
    work_trial(alone, Ranks())
    assert third == results_of(alone)


def test_many_one_shot_sparsities_cost_one_dense_network_and_one_scoring_pass(
    tmp_path: Path, counted: dict[str, int]
) -> None:
    one_shot = {"prune.rounds": 1, "finetune.epochs": 0, "prune.batchnorm_examples": 0}
    for number in range(6):
        run(sharing_job(tmp_path, **one_shot, **{"prune.sparsity": 0.5 + number / 20}))
    assert counted == {"score": 1, "dense": 1}


def test_trials_store_one_copy_of_their_dense_network(tmp_path: Path) -> None:
    for sparsity in (0.5, 0.7, 0.9):
        run(sharing_job(tmp_path, **FIRST | {"prune.sparsity": sparsity}))
    stored = [*tmp_path.glob("*/trials/*/round_000/weights.safetensors")]
    stored += tmp_path.glob("*/dense/*/weights.safetensors")
    assert len(stored) == 4
    assert len({path.stat().st_ino for path in stored}) == 1
    assert not find_faults(str(tmp_path)).faults


FIRST = {"prune.rounds": 1, "prune.sparsity": 0.5}


@pytest.fixture(scope="module")
def first_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage in which one trial has computed what others may share."""
    storage = tmp_path_factory.mktemp("first")
    run(sharing_job(storage, **FIRST))
    return storage


@pytest.mark.parametrize(
    ("changed", "dense", "score"),
    [
        ({"prune.sparsity": 0.6}, 1, 1),
        ({"finetune.epochs": 0.4}, 1, 1),
        ({"prune.criterion": "fisher"}, 1, 2),
        ({"prune.calibration_examples": 128}, 1, 2),
        ({"prune.calibration_augment": False}, 1, 2),
        ({"prune.exclude": ["linear.*"]}, 2, 2),
        ({"seed": 1}, 2, 2),
        ({"pretrain.epochs": 0.4}, 2, 2),
        ({"workload.options.width": 6}, 2, 2),
        ({"cluster.threads_per_worker": 2, "prune.sparsity": 0.6}, 2, 2),
    ],
    ids=str,
)
def test_shared_is_only_what_would_be_the_same(
    first_done: Path,
    tmp_path: Path,
    counted: dict[str, int],
    changed: dict[str, Any],
    dense: int,
    score: int,
) -> None:
    """What the first trial computed counts as well."""
    storage = shutil.copytree(first_done, tmp_path / "copy")
    run(sharing_job(storage, **FIRST | changed))
    assert counted == {"dense": dense - 1, "score": score - 1}


def test_movement_has_a_dense_network_of_its_own(tmp_path: Path) -> None:
    assert dense_origin(sharing_job(tmp_path, **{"prune.criterion": "movement"})) is None


def test_of_two_trials_at_once_one_computes(tmp_path: Path) -> None:
    # Processes, as on a cluster: threads would share the generators that seeds are planted in. Not
    # forked from this one, in which torch may have threads.
    clean = multiprocessing.get_context("forkserver")
    ends: multiprocessing.Queue[tuple[int, int] | str] = clean.Queue()
    jobs = [sharing_job(tmp_path, **{"prune.rounds": 1, "prune.sparsity": s}) for s in (0.5, 0.7)]
    processes = [clean.Process(target=run_counted, args=[job, ends]) for job in jobs]
    for process in processes:
        process.start()
    found = [ends.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(0, 0), (1, 1)]


@pytest.mark.parametrize("kind", ["dense", "scores"])
def test_what_is_damaged_is_computed_anew(
    tmp_path: Path, counted: dict[str, int], kind: str
) -> None:
    first = sharing_job(tmp_path, **{"prune.rounds": 1, "prune.sparsity": 0.5})
    run(first)
    (path,) = (tmp_path / first.name / kind).glob(
        "*/*s.safetensors" if kind == "scores" else "*/weights.safetensors"
    )
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    second = sharing_job(tmp_path, **{"prune.rounds": 1, "prune.sparsity": 0.7})
    with pytest.warns(UserWarning, match="does not match its checksum.*computed anew"):
        found = run(second)
    alone = sharing_job(tmp_path / "alone", **{"prune.rounds": 1, "prune.sparsity": 0.7})
    work_trial(alone, Ranks())
    assert found == results_of(alone)
    # Mended on the way.
    run(sharing_job(tmp_path, **{"prune.rounds": 1, "prune.sparsity": 0.8}))
    assert counted["dense"] == (3 if kind == "dense" else 2)
    assert counted["score"] == (2 if kind == "dense" else 3)


def test_a_trial_broken_off_while_it_shares_is_gone_on_with(tmp_path: Path) -> None:
    job = sharing_job(tmp_path, **{"prune.sparsity": 0.9})
    steps = run_solo(job)
    assert [next(steps).record.round for _ in range(2)] == [0, 1]
    steps.close()
    again = list(run_solo(job))
    assert [(step.record.round, step.is_old) for step in again] == [
        (0, True),
        (1, True),
        (2, False),
    ]
    alone = sharing_job(tmp_path / "alone", **{"prune.sparsity": 0.9})
    work_trial(alone, Ranks())
    assert results_of(job) == results_of(alone)
    assert all(step.is_old for step in run_solo(job))


def test_time_is_on_record_where_it_was_spent(tmp_path: Path) -> None:
    for sparsity in (0.5, 0.7):
        run(sharing_job(tmp_path, **{"prune.sparsity": sparsity}))
    store = Store(tmp_path, "digits")
    spent = [
        "pretrain"
        in store.read_rounds(trial_id(sharing_job(tmp_path, **{"prune.sparsity": s})))[0].seconds
        for s in (0.5, 0.7)
    ]
    assert spent == [True, False]


def test_trials_share_on_an_object_store_alike(
    moto_storage: str, tmp_path: Path, counted: dict[str, int]
) -> None:
    first = {"prune.rounds": 1, "prune.sparsity": 0.5}
    run(sharing_job(moto_storage, **first))
    found = run(sharing_job(moto_storage, **first | {"prune.sparsity": 0.7}))
    assert counted == {"score": 1, "dense": 1}
    alone = sharing_job(tmp_path, **first | {"prune.sparsity": 0.7})
    work_trial(alone, Ranks())
    assert found == results_of(alone)


def test_whole_units_share_a_dense_network_among_themselves_only(
    tmp_path: Path, counted: dict[str, int]
) -> None:
    units = {"prune.granularity": "channel", "prune.criterion": "taylor"}
    alone = run(sharing_job(tmp_path / "alone", **units, **{"prune.sparsity": 0.5}))
    counted["dense"] = 0
    together = tmp_path / "together"
    run(sharing_job(together, **{"prune.criterion": "taylor"}))
    run(sharing_job(together, **units, **{"prune.sparsity": 0.25}))
    assert counted["dense"] == 2
    assert run(sharing_job(together, **units, **{"prune.sparsity": 0.5})) == alone
    assert counted["dense"] == 2
    kinds = [{}, units, {**units, "prune.compact": False}]
    origins = [dense_origin(sharing_job(together, **kind)) for kind in kinds]
    assert all(one != other for i, one in enumerate(origins) for other in origins[:i])


def test_units_of_initial_masks_are_a_part_of_what_is_recorded_of_a_dense_network(
    tmp_path: Path,
) -> None:
    def origin(cost: str, digest: str) -> Any:
        fields = {"prune.granularity": "channel", f"prune.target.{cost}": 0.5}
        given = {"prune.initial_masks": "masks", "prune.initial_masks_digest": digest}
        return dense_origin(sharing_job(tmp_path, **fields, **(given if digest else {})))

    assert origin("macs", "") == origin("bytes", "")
    assert origin("macs", "a1") != origin("bytes", "a1")
