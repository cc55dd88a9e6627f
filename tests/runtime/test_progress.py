"""What a person watching sees: plain lines in a log, bars on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from gbp_ray.config.metrics import ACCURACY, LOSS, MetricSpec
from gbp_ray.results.records import CostRecord, LayerRecord, RoundRecord
from gbp_ray.runtime import progress
from gbp_ray.runtime.progress import ProgressBoard, Screen, SweepBoard
from gbp_ray.training.progress import Progress

FOUR_STEPS = Progress(
    trial="taylor-x",
    round=1,
    num_rounds=3,
    phase="finetune",
    done=4,
    total=20,
    loss=0.5,
    share=0.25,
)


def make_round(number: int, accuracy_pruned: float | None = None) -> RoundRecord:
    layer = LayerRecord(
        name="a", shape=(100,), num_weights=100, num_nonzero=40, macs=1, macs_nonzero=1
    )
    cost = CostRecord(
        num_parameters=100,
        num_nonzero=40,
        macs=1,
        macs_nonzero=1,
        num_bytes=1,
        num_bytes_sparse=1,
        layers=(layer,),
    )
    return RoundRecord(
        round=number,
        sparsity_target=0.6,
        accuracy=0.875,
        loss=0.1,
        accuracy_pruned=accuracy_pruned,
        cost=cost,
        mask_digest="",
    )


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_at_the_start_of_each_phase(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with ProgressBoard() as board:
        board.show(FOUR_STEPS)
        board.show(replace(FOUR_STEPS, done=5))
        board.show(replace(FOUR_STEPS, phase="evaluate", done=1, total=2, loss=None))
        board.show(replace(FOUR_STEPS, round=2))
        board.show(replace(FOUR_STEPS, round=2, done=9))
    out, err = capsys.readouterr()
    assert out == "", "standard output belongs to results"
    assert err.splitlines() == [
        "taylor-x  round 1/3  finetune 4/20, loss 0.5000",
        "taylor-x  round 1/3  evaluate 1/2",
        "taylor-x  round 2/3  finetune 4/20, loss 0.5000",
    ]


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with ProgressBoard() as board:
        board.show(FOUR_STEPS)
        for second in range(1, 31):
            clock.now_s = 1000.0 + second
            board.show(replace(FOUR_STEPS, done=4 + second, share=0.25 + second / 100))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    # After 11 s another 0.11 was done; at that pace the missing 0.64 take 64 s.
    assert lines[1] == "taylor-x  round 1/3  finetune 15/20, loss 0.5000, 1:04 left"
    assert lines[2].endswith(", 0:53 left")


def test_trials_are_shown_apart(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with ProgressBoard() as board:
        board.show(FOUR_STEPS)
        board.show(replace(FOUR_STEPS, trial="other"))
        board.show(FOUR_STEPS)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_rounds_and_notes_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBoard() as board:
        board.note("goes on [bold]after[/x] " + "a long line " * 20)
        board.show_round("taylor-x", make_round(0))
        board.show_round("taylor-x", make_round(1, accuracy_pruned=0.5))
        board.show_round("taylor-x", make_round(2))
        board.show_round("taylor-x", make_round(3, accuracy_pruned=0.875))
    out, err = capsys.readouterr()
    assert out == ""
    note, dense, first, second, untrained = err.splitlines()
    assert note.startswith("goes on [bold]after[/x] a long"), "brackets are not markup"
    assert dense == "taylor-x  dense  accuracy 87.50%"
    assert first.split("  ")[1:] == [
        "round 1",
        "sparsity 0.6000",
        "accuracy 87.50%",
        "(50.00% before fine-tuning)",
    ]
    assert "before" not in second
    assert "before" not in untrained


def test_a_quiet_board_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBoard(is_quiet=True) as board:
        board.note("x")
        board.show(FOUR_STEPS)
        board.show_round("taylor-x", make_round(1))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_one_bar_for_each_trial_and_keeps_notes(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress,
        "Screen",
        lambda **options: Screen(file=screen, force_terminal=True, width=120, highlight=False),
    )
    with ProgressBoard() as board:
        board.show(FOUR_STEPS)
        clock.now_s += 10
        board.show(replace(FOUR_STEPS, done=12, share=0.75))
        board.show(replace(FOUR_STEPS, trial="other", share=0.5))
        tasks = board._bars.tasks
        assert [task.completed for task in tasks] == [0.75, 0.5]
        assert tasks[0].description == "taylor-x  round 1/3"
        assert tasks[0].fields["detail"] == "finetune 12/20, loss 0.5000, 0:05 left"
        board.show_round("taylor-x", make_round(1))
    assert not board._bars.live.is_started
    assert "accuracy 87.50%" in screen.getvalue()


def test_a_terminal_is_given_back_when_the_trial_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "Screen", lambda **options: Screen(file=screen, force_terminal=True)
    )
    board = ProgressBoard()

    def fail() -> None:
        with board:
            board.show(FOUR_STEPS)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not board._bars.live.is_started
    assert "\x1b[?25h" in screen.getvalue(), "the cursor is visible again"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (3599.7, "1:00:00"), (7325, "2:02:05")],
)
def test_time_left_reads_as_a_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text


# -- a sweep ---------------------------------------------------------------------------------------


def test_a_sweeps_log_gets_a_line_for_each_trial_with_count_and_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with SweepBoard() as board:
        board.begin(6, [("known", 0.5)])
        board.show(FOUR_STEPS)
        board.show_round("taylor-x", make_round(1))
        clock.now_s += 20
        board.end_trial("taylor-x", "finished", "accuracy 87.50%", 0.875)
        clock.now_s += 20
        board.end_trial("b", "failed", "ran [out] of luck")
        clock.now_s += 20
        board.end_trial("c", "stopped", "after round 1, accuracy 20.00%")
        clock.now_s += 20
        board.end_trial("d", "finished", "accuracy 50.00%", 0.5)
        clock.now_s += 20
        board.end_trial("e", "finished", "accuracy 60.00%", 0.6)
    out, err = capsys.readouterr()
    assert out == ""
    # The first trial pays for the start, so there is no guess before the second; what was known
    # took no time.
    assert err.splitlines() == [
        "2/6  taylor-x  finished  accuracy 87.50%",
        "3/6  b  failed  ran [out] of luck, 1:00 left",
        "4/6  c  stopped  after round 1, accuracy 20.00%, 0:40 left",
        "5/6  d  finished  accuracy 50.00%, 0:20 left",
        "6/6  e  finished  accuracy 60.00%",
    ]


def test_a_sweeps_log_says_what_runs_where_no_trial_ends_for_a_minute(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with SweepBoard() as board:
        board.begin(9, [])
        for trial in "abcdef":
            board.show(replace(FOUR_STEPS, trial=trial))
        clock.now_s += 61
        board.show(replace(FOUR_STEPS, trial="a", round=2, share=0.5))
        clock.now_s += 30
        board.show(FOUR_STEPS)
        board.end_trial("a", "finished", "accuracy 87.50%", 0.875)
        clock.now_s += 59
        board.show(replace(FOUR_STEPS, trial="b"))
        clock.now_s += 2
        board.end_trial("c", "failed", "out of luck")
        clock.now_s += 61
        board.show(replace(FOUR_STEPS, trial="b"))
    assert capsys.readouterr().err.splitlines() == [
        "0/9  6 running: a  round 2/3 (50%), b  round 1/3 (25%), c  round 1/3 (25%), "
        "d  round 1/3 (25%) and 2 more",
        "1/9  a  finished  accuracy 87.50%",
        "2/9  c  failed  out of luck, 8:52 left",
        "2/9  5 running: b  round 1/3 (25%), d  round 1/3 (25%), e  round 1/3 (25%), "
        "f  round 1/3 (25%) and 1 more, 12:26 left",
    ]


def test_a_sweep_of_unknown_length_promises_nothing(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with SweepBoard() as board:
        board.begin(None, [])
        for trial in "abc":
            clock.now_s += 20
            board.end_trial(trial, "finished", "accuracy 50.00%", 0.5)
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "1/?",
        "2/?",
        "3/?",
    ]


def test_a_quiet_sweep_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SweepBoard(is_quiet=True) as board:
        board.begin(2, [("known", 0.5)])
        board.show(FOUR_STEPS)
        board.end_trial("taylor-x", "finished", "accuracy 87.50%", 0.875)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        (ACCURACY, {"known": 0.5, "taylor-x": 0.875}, "best 87.50% by taylor-x"),
        (ACCURACY, {"known": 0.9, "taylor-x": 0.875}, "best 90.00% by known"),
        (LOSS, {"known": 0.5, "taylor-x": 0.875}, "best 0.5 by known"),
    ],
)
def test_a_terminal_shows_the_sweep_as_a_whole_and_what_runs(
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    metric: MetricSpec,
    values: dict[str, float],
    best: str,
) -> None:
    monkeypatch.setattr(
        progress, "Screen", lambda **options: Screen(file=io.StringIO(), force_terminal=True)
    )
    with SweepBoard() as board:
        board.begin(10, [("known", values["known"])], metric)
        for trial in ("taylor-x", "b", "c"):
            board.show(replace(FOUR_STEPS, trial=trial))
        clock.now_s += 30
        board.end_trial("b", "failed", "out of luck")
        board.end_trial("taylor-x", "finished", "", values["taylor-x"])
        whole, running = board._bars.tasks
        assert running.description == "c  round 1/3", "those that have ended keep no bar"
        assert whole.completed == pytest.approx(0.3)
        assert whole.description == "sweep 3/10: 2 done, 1 running, 1 failed"
        assert whole.fields["detail"] == f"1:45 left, {best}"
        board.end_trial("c", "stopped", "")
        assert whole.description == "sweep 4/10: 2 done, 0 running, 1 stopped, 1 failed"
