"""The command line: results on standard output, one line for what is wrong, true exit codes."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from commands import Forked
from shell import Outcome, Shell
from user_files import USER_JOB, USER_MODULE

from gbp_ray.config.criteria import CRITERIA
from gbp_ray.config.job import describe_fields
from gbp_ray.results.records import RoundRecord, TrialRecord
from gbp_ray.results.store import Store, locate_trials

QUICK_DIGITS = [
    "--set=cluster.num_workers=0",
    "--set=workload.options.width=8",
    "--set=pretrain.epochs=0.2",
    "--set=prune.rounds=2",
]


class UserShell(Shell):
    """Runs commands in a user's folder."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
    ) -> None:
        super().__init__(patch, capture)
        self.folder = folder

    @property
    def storage(self) -> Path:
        return self.folder / "gbp-results"

    def prune(self, *arguments: str) -> Outcome:
        return self("prune", "job.toml", "-q", *arguments)


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[UserShell]:
    (tmp_path / "rings_of_a_user.py").write_text(USER_MODULE)
    (tmp_path / "job.toml").write_text(USER_JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield UserShell(tmp_path, monkeypatch, capsys)
    sys.modules.pop("rings_of_a_user", None)
    importlib.invalidate_caches()


def parse_json(text: str) -> Any:
    """Reads exactly one JSON value of the strict kind."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_refused(outcome: Outcome, code: int = 2) -> str:
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    return outcome.err.removeprefix("error: ").strip()


def assert_all_whole(storage: Path) -> None:
    """Makes sure that whatever lies in the storage is committed and undamaged."""
    files = [path for path in storage.rglob("*") if path.is_file()]
    for path in files:
        assert not path.name.startswith("."), f"{path} is a temporary file"
        if path.suffix in (".safetensors", ".pt"):
            assert (path.parent / "round.json").exists(), f"{path} belongs to no whole round"
    for path in files:
        if path.name == "round.json":
            trial = path.parent.parent
            store = Store(trial.parent.parent.parent, trial.parent.parent.name)
            record = store.read_rounds(trial.name)[int(path.parent.name.removeprefix("round_"))]
            for file in record.files:
                store.read_file(trial.name, record, file)


# -- prune -----------------------------------------------------------------------------------------


def test_prune_prints_tables_and_where_the_weights_are(shell: UserShell) -> None:
    outcome = shell("prune", "job.toml")
    assert outcome.code == 0
    ((store, name),) = locate_trials(shell.storage)
    assert f"{Path(store.trial_uri(name))}/round_002" in outcome.out
    assert "sparsity 50.00% of 128 prunable weights" in outcome.out
    for text in ("dense", "layers after round 2", "0.weight", "2.weight"):
        assert text in outcome.out
    assert "round 1  sparsity 0.2" in outcome.err, "progress goes to standard error"
    assert "round 1  sparsity" not in outcome.out


def test_prune_json_is_one_object_and_all_there_is(shell: UserShell) -> None:
    outcome = shell("prune", "job.toml", "--json")
    tree = parse_json(outcome.out)
    folder = Path(tree.pop("uri"))
    record = TrialRecord.model_validate(tree)
    assert Store(shell.storage, "rings").read_trial(record.trial_id) == record
    assert folder == shell.storage / "rings/trials" / record.trial_id
    assert tree["rounds"][-1]["sparsity"] == pytest.approx(0.5)
    again = shell("prune", "job.toml", "--json")
    assert (again.code, again.out) == (0, outcome.out), "a finished job is answered"
    assert again.err == f"{record.trial_id}  finished earlier: nothing was run\n"


@pytest.mark.filterwarnings("default")
def test_an_answer_of_code_that_has_changed_since_says_so(shell: UserShell) -> None:
    shell.prune()
    module = shell.folder / "rings_of_a_user.py"
    module.write_text(module.read_text() + "\n# edited\n")
    again = shell.prune()
    assert again.code == 0
    assert "'rings_of_a_user:" in again.err
    assert "has changed since trial" in again.err


def test_a_finished_trial_whose_round_is_gone_is_no_answer(shell: UserShell) -> None:
    uri = Path(parse_json(shell.prune("--json").out)["uri"])
    last = sorted(uri.glob("round_*"))[-1]
    (last / "round.json").unlink()
    outcome = shell.prune()
    assert outcome.code == 2
    assert "is gone, but its trial has finished" in outcome.err
    (uri / "trial.json").unlink()
    assert shell.prune().code == 0


def test_conditions_that_nothing_meets_are_named(shell: UserShell) -> None:
    shell.prune()
    outcome = shell("results", "gbp-results", "--where", "prune.criterion=fisher")
    assert outcome.code == 0
    assert outcome.err.endswith("rounds has prune.criterion=fisher\n")
    outcome = shell(
        *("results", "gbp-results", "--where", "prune.criterion=fisher"),
        *("--best", "accuracy@sparsity>=0.9"),
    )
    assert_refused(outcome)


def test_quiet_says_nothing_but_the_result(shell: UserShell) -> None:
    outcome = shell("prune", "job.toml", "-q", "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    parse_json(outcome.out)


def test_set_overrides_the_file(shell: UserShell) -> None:
    outcome = shell.prune("--json", "--set", "prune.sparsity=0.75", "--set", 'name="other"')
    tree = parse_json(outcome.out)
    assert tree["job"]["prune"]["sparsity"] == 0.75
    assert (shell.storage / "other").is_dir()
    assert not (shell.storage / "rings").exists()


def test_folders_with_brackets_are_printed_as_they_are(shell: UserShell) -> None:
    for storage in ("[red]x", "y[/bold]"):
        outcome = shell.prune(f"--set=storage={storage}", "--set=prune.rounds=1")
        assert outcome.code == 0
        assert f"/{storage}/rings/trials/" in outcome.out
    shell.prune("--set=storage=[red]x", "--set=prune.rounds=1", "--set=seed=1")
    # A long folder has a line of its own below the table.
    assert "/[red]x/rings/trials" in shell("show", "[red]x").out


@pytest.mark.filterwarnings("default")
def test_options_without_effect_warn_on_standard_error(shell: UserShell) -> None:
    outcome = shell.prune(
        "--json",
        "--set=pretrain.lr_gamma=0.5",
        "--set=pretrain.lr_schedule=cosine",
        "--set=prune.hutchinson_probes=5",
    )
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "warning: pretrain.lr_gamma has no effect with pretrain.lr_schedule = cosine",
        "warning: prune.hutchinson_probes has no effect with prune.criterion = taylor",
    ]
    parse_json(outcome.out)


# -- what is wrong ---------------------------------------------------------------------------------

BAD_INPUT = [
    ("prune.sparsty=0.5", ["prune.sparsty: no such key", "did you mean 'sparsity'"]),
    ("prunes.sparsity=0.5", ["prunes: no such key", "did you mean 'prune'"]),
    ("prune.schedule=cubik", ["prune.schedule = 'cubik'", "did you mean 'cubic'"]),
    ("prune.criterion=tailor", ["prune.criterion = 'tailor'", "did you mean 'taylor'"]),
    ("prune.sparsity=1.0", ["prune.sparsity = 1.0"]),
    ("prune.sparsity=-0.1", ["prune.sparsity = -0.1"]),
    ("prune.sparsity=nan", ["prune.sparsity = nan"]),
    ("prune.sparsity=most", ["prune.sparsity = 'most'"]),
    ("prune.sparsity", ["must read dotted.key=value"]),
    ("prune.sparsity.x=1", ["'sparsity' is a value, not a section"]),
    ("prune.granularity=2:4", ["prune.granularity = '2:4'", "'0.weight' has 2"]),
    ("prune.granularity=3:4", ["set prune.sparsity=0.25"]),
    ("prune.exclude=['conv.*']", ["prune.exclude = 'conv.*'", "matches no parameter"]),
    (
        "prune.layer_max_sparsity={'0.*'=0.0, '2.*'=0.0}",
        ["the layers may lose 0 at most", "'0.weight' 0 of 64"],
    ),
    ("workload.options.examples=0", ["workload.train: holds no examples"]),
    ("workload.options.examples=1", ["workload.train: holds no examples"]),
    ("workload.options.top=2", ["labels run from 0 to 2", "2 outputs (allowed: 0 to 1)"]),
    ("workload.options.top=-1", ["labels run from -1 to 0"]),
    ("workload.options.colour=1", ["workload.options.colour", "allowed: examples, top, classes"]),
    ("workload.factory=rings_of_a_user:cursed", ["raised ValueError: it is not to be"]),
    ("workload.factory=rings_of_a_user:netless", ["workload.build_model returned NoneType"]),
    (
        "prune.criterion=rings_of_a_user:cursed",
        ["prune.criterion = 'rings_of_a_user:cursed' raised TypeError"],
    ),
    ("workload.factory=rings_of_a_user:nothing", ["has no 'nothing'"]),
    ("workload.factory=rings_of_nobody:rings", ["no module named 'rings_of_nobody'"]),
    ("name=../escape", ["name = '../escape'"]),
    ("pretrain.learning_rate=1e30", ["pretrain", "lower pretrain.learning_rate = 1e+30"]),
    ("finetune.learning_rate=1e30", ["finetune", "lower finetune.learning_rate = 1e+30"]),
    ("storage=job.toml", ["storage", "job.toml"]),
    ("storage=/dev/null/x", ["storage", "/dev/null/x", "Not a directory"]),
    ("storage=/proc/nobody-writes-here", ["storage: cannot write '/proc/nobody-writes-here"]),
    ("storage=~nobody-has-this-name/x", ["storage", "no such home"]),
    ("storage=gs://bucket/x", ["storage = 'gs://bucket/x'"]),
]


@pytest.mark.parametrize(("override", "parts"), BAD_INPUT, ids=[case[0] for case in BAD_INPUT])
def test_bad_input_is_one_line_exit_2_and_nothing_half_written(
    shell: UserShell, override: str, parts: list[str]
) -> None:
    if "2:4" in override:
        outcome = shell.prune("--set", override, "--set=prune.sparsity=0.5")
    else:
        outcome = shell.prune("--set", override)
    text = assert_refused(outcome)
    for part in parts:
        assert part in text
    assert_all_whole(shell.folder)
    assert not list(shell.folder.rglob("trial.json"))
    assert not (shell.folder.parent / "escape").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist"),
        (b"", "name: is required; workload: is required; prune: is required"),
        (b"name = ", "is not TOML"),
        (b"\xff", "is not TOML"),
        (USER_JOB.encode().replace(b"rounds = 2", b"rounds = 0\nround = 2"), "prune.rounds = 0"),
    ],
)
def test_a_bad_job_file_is_one_line(shell: UserShell, content: bytes | None, part: str) -> None:
    if content is not None:
        (shell.folder / "bad.toml").write_bytes(content)
    assert part in assert_refused(shell("prune", "bad.toml"))
    assert not shell.storage.exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["prnue"], "Did you mean 'prune'?"),
        (["prune", "job.toml", "more.toml"], "unexpected extra argument"),
        (["prune", "--sparsity", "0.5"], "No such option"),
        (["prune", "--set"], "requires an argument"),
        (["show"], "Missing argument"),
        (["show", "nowhere"], "there is no such folder"),
        (["show", "."], "holds no results"),
        (["show", "job.toml"], "there is no such folder"),
        (["fields", "prunes"], "no such section (allowed: workload, pretrain"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    shell: UserShell, arguments: list[str], part: str
) -> None:
    assert part in assert_refused(shell(*arguments))


def test_without_a_verb_help_is_shown_and_the_code_says_so(shell: UserShell) -> None:
    outcome = shell()
    assert outcome.code == 2
    assert "Usage: gbp-ray" in outcome.out + outcome.err


def test_debug_adds_the_traceback_before_the_line(shell: UserShell) -> None:
    outcome = shell("prune", "--debug", "--set=prune.sparsity=2")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: prune.sparsity = 2")


def test_a_fault_of_ours_is_one_line_exit_1(
    shell: UserShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("gbp_ray.runtime.api.prune", fail)
    text = assert_refused(shell.prune(), code=1)
    assert text == "ZeroDivisionError: two lines (--debug shows where)"


def test_a_built_in_workload_names_what_does_not_suit_it(shell: UserShell) -> None:
    pattern = shell(
        "prune", "-q", *QUICK_DIGITS, "--set=prune.granularity='2:4'", "--set=prune.sparsity=0.5"
    )
    assert "'conv1.weight' has 1" in assert_refused(pattern)
    (shell.folder / "weights.safetensors").write_bytes(b"not a checkpoint")
    checkpoint = shell(
        "prune",
        "-q",
        "--set=cluster.num_workers=0",
        "--set=workload.factory=gbp_ray.zoo:cifar10_resnet20",
        "--set=workload.options={data='nowhere', checkpoint='weights.safetensors'}",
    )
    assert "workload.options." in assert_refused(checkpoint)
    assert not shell.storage.exists()


def test_the_results_of_another_job_are_left_alone(shell: UserShell) -> None:
    shell.prune()
    before = {path: path.stat().st_mtime_ns for path in shell.storage.rglob("*")}
    other = shell("prune", "-q", *QUICK_DIGITS, "--set=name=rings")
    assert "holds results of another job" in assert_refused(other)
    assert {path: path.stat().st_mtime_ns for path in shell.storage.rglob("*")} == before


def test_a_folder_that_is_not_ours_is_left_alone(shell: UserShell) -> None:
    (shell.storage / "rings").mkdir(parents=True)
    (shell.storage / "rings" / "letter.txt").write_text("Dear")
    assert "is not empty and not a results folder" in assert_refused(shell.prune())
    assert [path.name for path in shell.storage.rglob("*.*")] == ["letter.txt"]


def make_unfinished(shell: UserShell) -> tuple[Store, str, RoundRecord]:
    """Prunes, then takes the last round away, as a kill would have."""
    assert shell.prune().code == 0
    ((store, name),) = locate_trials(shell.storage)
    (Path(store.trial_uri(name)) / "trial.json").unlink()
    for path in Path(store.round_uri(name, 2)).iterdir():
        path.unlink()
    return store, name, store.read_rounds(name)[-1]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("weights.safetensors", "flipped"),
        ("masks.safetensors", "truncated"),
        ("state.pt", "empty"),
        ("state.pt", "missing"),
    ],
)
def test_a_damaged_file_on_resume_is_one_line_exit_2(
    shell: UserShell, file: str, kind: str
) -> None:
    """One of each; `results/test_store` and `runtime/test_trial` have every file's every fault."""
    store, name, record = make_unfinished(shell)
    path = Path(store.round_uri(name, record.round)) / file
    good = path.read_bytes()
    middle = len(good) // 2
    bad = {
        "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
        "truncated": good[:middle],
        "empty": b"",
    }
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(bad[kind])
    assert str(path) in assert_refused(shell.prune())
    assert not (Path(store.round_uri(name, 2)) / "weights.safetensors").exists()
    path.write_bytes(good)
    assert shell.prune().code == 0
    assert_all_whole(shell.storage)


@pytest.mark.parametrize("record", ["round_001/round.json", "round_000/round.json"])
def test_a_damaged_record_on_resume_is_one_line_exit_2(shell: UserShell, record: str) -> None:
    store, name, _ = make_unfinished(shell)
    path = Path(store.trial_uri(name)) / record
    path.write_text(path.read_text()[:100])
    text = assert_refused(shell.prune())
    assert str(path) in text
    assert "is damaged" in text


# -- show ------------------------------------------------------------------------------------------


def test_show_prints_one_trial_from_any_folder_above(shell: UserShell) -> None:
    shell.prune()
    ((store, name),) = locate_trials(shell.storage)
    outputs = [shell("show", str(uri)) for uri in (shell.storage, store.folder)]
    outputs.append(shell("show", str(Path(store.trial_uri(name)))))
    assert {outcome.code for outcome in outputs} == {0}
    assert len({outcome.out for outcome in outputs}) == 1
    assert name in outputs[0].out
    assert "layers after round 2" in outputs[0].out
    assert "sparsity 50.00%" in outputs[0].out
    tree = parse_json(shell("show", str(store.folder), "--json").out)
    assert tree["finished"] is True
    assert Path(tree["uri"]) == Path(store.trial_uri(name))
    assert TrialRecord.model_validate(tree) == store.read_trial(name)


def test_show_lists_the_trials_of_a_job(shell: UserShell) -> None:
    shell.prune()
    shell.prune("--set=prune.sparsity=0.25")
    names = [name for _, name in locate_trials(shell.storage)]
    outcome = shell("show", "gbp-results/rings")
    assert outcome.code == 0
    for name in names:
        assert name in outcome.out
    rows = parse_json(shell("show", "gbp-results/rings", "--json").out)["trials"]
    assert [row["trial"] for row in rows] == names
    assert [row["sparsity"] for row in rows] == [0.25, 0.5]
    assert all(row["finished"] for row in rows)
    assert all(Path(row["uri"]).is_dir() for row in rows)


def test_show_says_what_there_is_of_an_unfinished_trial(shell: UserShell) -> None:
    store, name, _ = make_unfinished(shell)
    outcome = shell("show", "gbp-results")
    assert outcome.code == 0
    assert f"{name}: not finished, round 1 is the last whole one" in outcome.out
    assert "layers after round 1" in outcome.out
    tree = parse_json(shell("show", "gbp-results", "--json").out)
    assert tree["finished"] is False
    assert [row["round"] for row in tree["rounds"]] == [0, 1]
    shell.prune("--set=seed=1")
    rows = parse_json(shell("show", "gbp-results", "--json").out)["trials"]
    assert {row["trial"]: row["finished"] for row in rows}[name] is False
    assert store.read_trial(name) is None


# -- criteria, fields, help ------------------------------------------------------------------------


def test_criteria_tells_all_of_them(shell: UserShell) -> None:
    outcome = shell("criteria")
    assert outcome.code == 0
    rows = parse_json(shell("criteria", "--json").out)["criteria"]
    assert {row["name"] for row in rows} == set(CRITERIA)
    for row in rows:
        assert row["name"] in outcome.out
        assert all(row[key] for key in ("formula", "summed", "cost", "source"))


def test_fields_tells_all_of_them(shell: UserShell) -> None:
    outcome = shell("fields")
    rows = parse_json(shell("fields", "--json").out)["fields"]
    assert [row["field"] for row in rows] == [row[0] for row in describe_fields()]
    for field in ("prune.sparsity", "cluster.num_workers", "[workload]", "conv1.*"):
        assert field in outcome.out
    part = parse_json(shell("fields", "prune", "--json").out)["fields"]
    assert {row["field"].split(".")[0] for row in part} == {"[prune]", "prune"}
    assert len(part) == sum(row["field"].startswith(("prune.", "[prune]")) for row in rows)


@pytest.mark.parametrize("verb", ["prune", "show", "criteria", "fields"])
def test_help_of_each_verb_gives_an_example(shell: UserShell, verb: str) -> None:
    outcome = shell(verb, "--help")
    assert outcome.code == 0
    assert f"Usage: gbp-ray {verb}" in outcome.out
    assert f"gbp-ray {verb}" in outcome.out.partition("Examples:")[2]
    assert verb in shell("--help").out


def test_version(shell: UserShell) -> None:
    assert shell("--version") == Outcome(0, f"gbp-ray {version('gbp-ray')}\n", "")


# -- as a process ----------------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_it_without_a_word(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gbp_ray", "fields", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_printed_is_an_error(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gbp_ray", "fields", "--json"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left" in done.stderr


@pytest.mark.slow
def test_a_stopped_command_says_so_and_goes_on_when_run_again(shell: UserShell) -> None:
    """Stopped twice: by Ctrl-C, and run again by SIGTERM in the same round."""
    arguments = ["prune", *QUICK_DIGITS, "--set=finetune.epochs=3", "--json"]
    for number, code, word in (
        (signal.SIGINT, 130, "stopped"),
        (signal.SIGTERM, 143, "terminated"),
    ):
        process = Forked(shell.folder, *arguments)
        errors = ""
        for line in process.errors:
            errors += line
            if "round 1/2  finetune" in line:
                break
        assert process.end_by(number) == code, errors
        errors += process.errors.read()
        assert process.out.read() == ""
        assert errors.splitlines()[-1] == f"error: {word}; run the same command again to go on"
        assert "Traceback" not in errors
        assert ("goes on after round 0" in errors) == (number == signal.SIGTERM)
        assert_all_whole(shell.storage)
        ((store, name),) = locate_trials(shell.storage)
        assert [record.round for record in store.read_rounds(name)] == [0]
    again = shell(*arguments)
    assert again.code == 0, again.err
    assert "goes on after round 0" in again.err
    assert "pretrain" not in again.err, "what was done is not done again"
    assert len(parse_json(again.out)["rounds"]) == 3
