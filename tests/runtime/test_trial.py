"""One trial in this very process: committed round by round, interrupted, and gone on with."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Forked
from quick_trials import QUICK, quick_job, results_of
from shell import Shell

from gbp_ray.config.job import JobConfig, trial_id
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.errors import GbpError, PruneError, StoreError
from gbp_ray.results.records import RoundRecord
from gbp_ray.results.store import Store
from gbp_ray.runtime.trial import work_trial
from gbp_ray.training.progress import Progress
from gbp_ray.workloads.loading import load_workload

FILES = ("weights.safetensors", "masks.safetensors", "state.pt")


def store_of(job: JobConfig) -> Store:
    return Store(job.storage, job.name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    job = quick_job(tmp_path_factory.mktemp("whole"))
    work_trial(job, Ranks())
    return job


def test_every_round_is_committed_with_its_files(whole: JobConfig) -> None:
    store, name = store_of(whole), trial_id(whole)
    records = store.read_rounds(name)
    assert [record.round for record in records] == [0, 1, 2]
    for record in records:
        assert set(record.files) == set(FILES)
        for file in FILES:
            assert store.read_file(name, record, file)
    digests = {record.mask_digest for record in records}
    assert len(digests) == 3, "every round has masks of its own"
    assert records[0].sparsity == 0.0
    assert records[-1].sparsity == pytest.approx(0.9, abs=1e-3)
    assert records[0].sparsity_target == 0.0
    assert records[0].accuracy_pruned is None
    assert records[1].accuracy_pruned is not None


def test_rounds_are_told_when_they_are_on_disk(tmp_path: Path) -> None:
    job = quick_job(tmp_path)
    seen = []

    def round_done(record: RoundRecord) -> None:
        on_disk = store_of(job).read_rounds(trial_id(job))
        assert on_disk[-1] == record
        seen.append(record.round)

    work_trial(job, Ranks(), round_done=round_done)
    assert seen == [0, 1, 2]
    work_trial(job, Ranks(), round_done=round_done)
    assert seen == [0, 1, 2], "a whole trial is not worked on again"


class BrokenOffError(Exception):
    """Ends a trial between two rounds."""


def interrupt_after(number: int) -> Callable[[RoundRecord], None]:
    def round_done(record: RoundRecord) -> None:
        if record.round == number:
            raise BrokenOffError

    return round_done


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prune.criterion": "movement", "finetune.optimizer": "adam"},
        {"prune.rewind": "weights", "prune.criterion": "magnitude"},
    ],
    ids=["plain", "movement, adam", "rewind weights"],
)
def test_a_trial_interrupted_after_each_round_ends_as_an_uninterrupted_one(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    """All that a checkpoint holds, by what is stored; `pruning/test_rounds` has every recipe."""
    straight = quick_job(tmp_path / "straight", **changed)
    work_trial(straight, Ranks())
    broken = quick_job(tmp_path / "broken", **changed)
    for number in (0, 1, 2):
        torch.manual_seed(number)
        with pytest.raises(BrokenOffError):
            work_trial(broken, Ranks(), round_done=interrupt_after(number))
        assert len(store_of(broken).read_rounds(trial_id(broken))) == number + 1
    work_trial(broken, Ranks())
    assert results_of(broken) == results_of(straight)


def test_a_round_lost_from_the_end_is_made_again(whole: JobConfig, tmp_path: Path) -> None:
    job = quick_job(tmp_path)
    with pytest.raises(BrokenOffError):
        work_trial(job, Ranks(), round_done=interrupt_after(1))
    (Path(store_of(job).round_uri(trial_id(job), 1)) / "round.json").unlink()
    work_trial(job, Ranks())
    assert results_of(job) == results_of(whole)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_file_is_named_and_nothing_is_written_over_it(
    tmp_path: Path, file: str, number: int
) -> None:
    job = quick_job(tmp_path, **{"pretrain.epochs": 0.05, "finetune.epochs": 0.05})
    with pytest.raises(BrokenOffError):
        work_trial(job, Ranks(), round_done=interrupt_after(number))
    path = Path(store_of(job).round_uri(trial_id(job), number)) / file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    for content in (bytes(damaged), bytes(damaged[:-7])):
        path.write_bytes(content)
        with pytest.raises(StoreError) as caught:
            work_trial(job, Ranks())
        assert str(path) in str(caught.value)
        assert path.read_bytes() == content
        assert len(store_of(job).read_rounds(trial_id(job))) == number + 1


def test_damaged_dense_weights_are_noticed_in_a_later_round(tmp_path: Path) -> None:
    job = quick_job(tmp_path, **{"pretrain.epochs": 0.05, "finetune.epochs": 0.05})
    with pytest.raises(BrokenOffError):
        work_trial(job, Ranks(), round_done=interrupt_after(1))
    path = Path(store_of(job).round_uri(trial_id(job), 0)) / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="round_000"):
        work_trial(job, Ranks())


def test_a_diverging_trial_keeps_the_rounds_before(tmp_path: Path) -> None:
    job = quick_job(tmp_path, **{"finetune.learning_rate": 1e30})
    with pytest.raises(PruneError, match=r"lower finetune\.learning_rate") as caught:
        work_trial(job, Ranks())
    assert "\n" not in str(caught.value)
    assert [r.round for r in store_of(job).read_rounds(trial_id(job))] == [0]
    assert not (Path(store_of(job).round_uri(trial_id(job), 1)) / "weights.safetensors").exists()


# -- what is left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_broken", [False, True])
def test_settings_of_the_process_are_put_back(tmp_path: Path, is_broken: bool) -> None:
    job = quick_job(tmp_path, **{"pretrain.epochs": 0.05, "finetune.epochs": 0.05})
    seen = set()

    def note(progress: Progress) -> None:
        seen.add((torch.get_num_threads(), torch.backends.cudnn.deterministic))
        if is_broken:
            raise BrokenOffError

    torch.set_num_threads(2)
    # An earlier test may have left two trials of one process to end in any order.
    torch.backends.cudnn.deterministic = False
    try:
        if is_broken:
            with pytest.raises(BrokenOffError):
                work_trial(job, Ranks(), on_progress=note)
        else:
            work_trial(job, Ranks(), on_progress=note)
        after = (torch.get_num_threads(), torch.backends.cudnn.deterministic)
    finally:
        torch.set_num_threads(1)
    assert seen == {(1, True)}
    assert after == (2, False)


def test_the_random_state_of_the_process_is_put_back(tmp_path: Path) -> None:
    job = quick_job(tmp_path, **{"pretrain.epochs": 0.05, "finetune.epochs": 0.05})
    torch.manual_seed(11)
    state = torch.get_rng_state()
    work_trial(job, Ranks())
    assert torch.equal(torch.get_rng_state(), state)


# -- progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prune.criterion": "movement"},
        {"prune.criterion": "magnitude", "finetune.epochs": 0, "pretrain.epochs": 0},
        {"finetune.epochs": 0, "pretrain.epochs": 0},
        {"prune.rounds": 1, "prune.criterion": "synflow"},
    ],
    ids=["plain", "movement", "nothing to train", "scoring alone", "one round"],
)
def test_progress_never_goes_back_and_ends_at_the_end(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    job = quick_job(tmp_path, **changed)
    reports: list[Progress] = []
    work_trial(job, Ranks(), on_progress=reports.append)
    shares = [report.share for report in reports]
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert all(before <= after for before, after in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1.0)
    assert shares[0] < 0.6
    for report in reports:
        assert 1 <= report.done <= report.total
        assert 0 <= report.round <= report.num_rounds == job.prune.rounds
        assert report.trial == trial_id(job)
        assert (report.loss is None) == (report.phase in ("score", "evaluate"))
    assert sorted({report.round for report in reports}) == list(range(job.prune.rounds + 1))


def test_progress_of_a_continued_trial_starts_where_it_stood(tmp_path: Path) -> None:
    job = quick_job(tmp_path)
    reports: list[Progress] = []
    with pytest.raises(BrokenOffError):
        work_trial(job, Ranks(), on_progress=reports.append, round_done=interrupt_after(1))
    stood = reports[-1].share
    reports.clear()
    work_trial(job, Ranks(), on_progress=reports.append)
    assert {report.round for report in reports} == {2}
    assert reports[0].share >= stood


def test_steps_told_are_the_steps_taken(tmp_path: Path) -> None:
    job = quick_job(tmp_path)
    reports: list[Progress] = []
    work_trial(job, Ranks(), on_progress=reports.append)
    num_examples = len(load_workload(job.workload).train[0])
    for phase, recipe in (("pretrain", job.pretrain), ("finetune", job.finetune)):
        expected = round(recipe.epochs * (num_examples // recipe.batch_size))
        for number in {report.round for report in reports if report.phase == phase}:
            told = [t for t in reports if (t.phase, t.round) == (phase, number)]
            assert [report.done for report in told] == list(range(1, expected + 1))
            assert {report.total for report in told} == {expected}


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_killed_at_any_moment_ends_with_the_same_mask(
    whole: JobConfig, tmp_path: Path, shell: Shell
) -> None:
    settings = [f"--set={key}={value}" for key, value in QUICK.items()]
    arguments = ["prune", *settings, f"--set=storage={tmp_path}"]
    job = quick_job(tmp_path)
    moments = random.Random(20240229)
    deaths = []
    for _ in range(3):
        process = Forked(tmp_path, *arguments)
        # Some lines of progress, and a little more.
        for _ in range(moments.randint(2, 6)):
            process.errors.readline()
        time.sleep(moments.uniform(0.0, 0.05))
        deaths.append(process.end_by(signal.SIGKILL))
        read_all(job)
    assert deaths[0] == -signal.SIGKILL, "killed too late to tell anything"
    has_begun = bool(store_of(job).read_rounds(trial_id(job)))
    done = shell(*arguments)
    assert done.code == 0, done.err
    assert "goes on after round" in done.err or not has_begun or 0 in deaths
    assert (Path(store_of(job).trial_uri(trial_id(job))) / "trial.json").exists()
    assert results_of(job) == results_of(whole)
    assert not [path for path in store_of(job).folder.rglob(".*") if path.is_file()]


def read_all(job: JobConfig) -> None:
    """Makes sure that what a reader finds of a broken trial is whole."""
    store, name = store_of(job), trial_id(job)
    try:
        for record in store.read_rounds(name):
            for file in FILES:
                store.read_file(name, record, file)
    except GbpError as error:
        pytest.fail(f"a kill left a broken round: {error}")
