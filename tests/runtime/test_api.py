"""The verbs from Python: what comes back is on disk, and what is on disk is what was measured."""

from __future__ import annotations

import hashlib
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from user_files import USER_JOB, USER_MODULE, files_of_a_user

import gbp_ray
from gbp_ray.config.job import load_job, trial_id
from gbp_ray.errors import ConfigError, GbpError, StoreError, WorkloadError
from gbp_ray.results.store import Store
from gbp_ray.runtime import api, single
from gbp_ray.runtime.api import PruneResult, open_result, prune


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's module and job file, looked at from a working folder elsewhere."""
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with files_of_a_user(folder, monkeypatch):
        yield folder


def run(folder: Path, **changed: Any) -> PruneResult:
    overrides = {"storage": str(folder / "results")} | changed
    return prune(folder / "job.toml", overrides, is_quiet=True)


# -- the result ------------------------------------------------------------------------------------


def test_a_users_own_workload_is_found_beside_the_job_file(user_folder: Path) -> None:
    result = run(user_folder)
    assert Path(result.uri) == user_folder / "results/rings/trials" / result.record.trial_id
    assert [record.round for record in result.record.rounds] == [0, 1, 2]
    assert result.sparsity == pytest.approx(0.5)
    assert result.accuracy == result.record.final.accuracy
    assert result.record.num_workers == 0
    assert {"python", "torch", "ray", "gbp-ray"} <= set(result.record.versions)
    assert Store(user_folder / "results", "rings").read_trial(result.record.trial_id) == (
        result.record
    )


def test_the_default_job_prunes_the_digits(tmp_path: Path) -> None:
    quick = {
        "storage": str(tmp_path),
        "cluster.num_workers": 0,
        "pretrain.epochs": 0.2,
        "finetune.epochs": 0.1,
        "prune.rounds": 2,
        "workload.options.width": 4,
    }
    result = gbp_ray.prune(overrides=quick, is_quiet=True)
    assert result.record.job == load_job(None, quick)
    assert result.record.trial_id == trial_id(load_job(None, quick))
    assert result.sparsity == pytest.approx(0.9, abs=2e-3)


def test_overrides_may_be_texts_and_the_job_a_checked_one(user_folder: Path) -> None:
    by_path = run(user_folder, **{"prune.sparsity": 0.25})
    storage = f"storage={user_folder / 'other'}"
    by_text = prune(str(user_folder / "job.toml"), ["prune.sparsity=0.25", storage], is_quiet=True)
    by_job = prune(by_path.record.job, {"storage": str(user_folder / "third")}, is_quiet=True)
    digests = {r.record.final.mask_digest for r in (by_path, by_text, by_job)}
    assert len(digests) == 1
    assert len({r.record.trial_id for r in (by_path, by_text, by_job)}) == 1
    assert len({Path(r.uri) for r in (by_path, by_text, by_job)}) == 3


def test_the_model_of_each_round_has_the_accuracy_on_record(user_folder: Path) -> None:
    result = run(user_folder)
    module = sys.modules["rings_of_a_user"]
    inputs, targets = module.rings().test
    for number, record in enumerate(result.record.rounds):
        model = result.load_model(number)
        assert not model.training
        with torch.no_grad():
            outputs = model(inputs)
        right = int((outputs.argmax(dim=1) == targets).sum())
        assert right / len(targets) == record.accuracy
        loss = torch.nn.functional.cross_entropy(outputs, targets).item()
        assert loss == pytest.approx(record.loss, abs=1e-5)
    accuracies = {record.accuracy for record in result.record.rounds}
    assert len(accuracies) > 1, "rounds that all agree would hide a mix-up"


def test_weights_are_zero_where_the_mask_says_and_nowhere_else(user_folder: Path) -> None:
    result = run(user_folder)
    for number, record in enumerate(result.record.rounds):
        masks, model = result.load_masks(number), result.load_model(number)
        assert masks.digest == record.mask_digest
        parameters = dict(model.named_parameters())
        assert set(masks) == {"0.weight", "2.weight"}
        for name, mask in masks.items():
            assert torch.equal(parameters[name] != 0, mask)
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        assert record.sparsity == pytest.approx(pruned / total)
        assert record.cost.num_nonzero == sum(int((p != 0).sum()) for p in model.parameters())
    last = result.load_masks()
    assert last.digest == result.record.final.mask_digest
    for name, mask in last.items():
        assert not bool((mask & ~result.load_masks(1)[name]).any()), "what is gone stays gone"


def test_weights_and_masks_open_with_safetensors_alone(user_folder: Path) -> None:
    result = run(user_folder)
    folder = Path(result.uri) / "round_002"
    state = load_file(folder / "weights.safetensors")
    plain = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    plain.load_state_dict(state)
    inputs = torch.rand(5, 2)
    assert torch.equal(plain(inputs), result.load_model()(inputs))
    with safe_open(folder / "masks.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            bits = np.unpackbits(file.get_tensor(name), bitorder="little")
            assert bits.sum() == np.count_nonzero(state[name].numpy())
    for name, committed in result.record.final.files.items():
        data = (folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == committed.sha256


def test_a_users_own_criterion_decides_what_goes(user_folder: Path) -> None:
    result = run(
        user_folder,
        **{
            "prune.criterion": "rings_of_a_user:first_rows_first",
            "prune.rounds": 1,
            "prune.scope": "layer",
        },
    )
    assert result.record.trial_id.startswith("first_rows_first-s0.50-r1-")
    for mask in result.load_masks().values():
        flat = mask.reshape(-1)
        half = flat.numel() // 2
        assert not flat[:half].any()
        assert flat[half:].all()


# -- again -----------------------------------------------------------------------------------------


def test_a_finished_job_answers_without_any_work(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(user_folder)
    before = {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")}

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a finished job was worked on")

    for name in ("single.work_trial", "single.load_checked", "trial.load_workload"):
        monkeypatch.setattr(f"gbp_ray.runtime.{name}", fail)
    second = run(user_folder)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in Path(first.uri).rglob("*")} == before
    # Workers do not decide the result: the same trial under any number of them.
    assert run(user_folder, **{"cluster.num_workers": 3}) == first
    with pytest.raises(AssertionError, match="worked on"):
        run(user_folder, seed=1)


def test_a_stopped_job_goes_on_to_the_same_result(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(user_folder, storage=str(user_folder / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(
            api.ProgressBoard,
            "show_round",
            lambda self, name, record: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            run(user_folder)
    with pytest.raises(StoreError, match=r"has not finished \(round 0 is the last"):
        open_result(user_folder / "results")
    prune(user_folder / "job.toml", {"storage": str(user_folder / "results")})
    assert "goes on after round 0" in capsys.readouterr().err
    again = open_result(user_folder / "results")
    assert [r.mask_digest for r in again.record.rounds] == [
        r.mask_digest for r in whole.record.rounds
    ]
    for number in range(3):
        one = whole.load_model(number).state_dict()
        two = again.load_model(number, trust_code=["rings_of_a_user"]).state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_trials_of_one_job_share_its_folder(user_folder: Path) -> None:
    one, two = run(user_folder), run(user_folder, **{"prune.sparsity": 0.75})
    assert Path(one.uri).parent == Path(two.uri).parent
    assert one.record.dense.mask_digest == two.record.dense.mask_digest
    with pytest.raises(StoreError, match="holds 2 trials; name one of") as caught:
        open_result(user_folder / "results")
    assert str(Path(one.uri)) in str(caught.value)
    assert open_result(Path(one.uri)) == one
    assert open_result(Path(two.uri)).sparsity == pytest.approx(0.75)


# -- opening ---------------------------------------------------------------------------------------


def test_results_open_from_every_folder_above_and_after_a_move(user_folder: Path) -> None:
    result = run(user_folder)
    for uri in (Path(result.uri), user_folder / "results/rings", f"file://{user_folder}/results"):
        opened = open_result(uri)
        assert opened == result
        assert opened.load_masks() == result.load_masks()
    moved = user_folder / "archive"
    shutil.move(user_folder / "results", moved)
    assert open_result(moved).load_masks().digest == result.record.final.mask_digest


def test_the_model_of_an_opened_result_is_found_from_the_working_folder(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run(user_folder).uri)
    sys.modules.pop("rings_of_a_user")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(user_folder)])
    result = open_result(folder)
    assert result.load_masks()
    with pytest.raises(ConfigError, match="no module named 'rings_of_a_user'"):
        result.load_model(trust_code=["rings_of_a_user"])
    monkeypatch.chdir(user_folder)
    assert result.load_model(trust_code=["rings_of_a_user"])(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("named", ["rings_of_a_user", "rings_of_a_user:rings", "job.toml", "os"])
def test_code_that_a_record_names_runs_where_the_user_names_it(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    result = run(user_folder)
    monkeypatch.chdir(user_folder)
    opened = open_result(result.uri)
    with pytest.raises(ConfigError, match=r"--trust-code rings_of_a_user:rings") as caught:
        opened.load_model()
    assert caught.value.exit_code == 2
    assert f"'{result.uri}': its record names the code workload.factory" in str(caught.value)
    if named == "os":
        with pytest.raises(ConfigError, match="its record names the code"):
            opened.load_model(trust_code=[named])
        return
    assert result.load_model()(torch.zeros(1, 2)).shape == (1, 2)
    assert opened.load_model(trust_code=[named])(torch.zeros(1, 2)).shape == (1, 2)


def test_a_round_that_is_not_there_is_named(user_folder: Path) -> None:
    result = run(user_folder)
    assert result.load_masks(-3) == result.load_masks(0)
    for number in (3, -4, 99):
        with pytest.raises(StoreError, match=rf"has no round {number} \(allowed: 0 to 2"):
            result.load_masks(number)
        with pytest.raises(StoreError):
            result.load_model(number)


def test_damaged_files_of_a_finished_trial_are_refused(user_folder: Path) -> None:
    result = run(user_folder)
    for name in ("weights.safetensors", "masks.safetensors"):
        path = Path(result.uri) / "round_002" / name
        good = path.read_bytes()
        load = result.load_model if name.startswith("weights") else result.load_masks
        for bad in (good[:-1], good[:10] + b"?" + good[11:], b""):
            path.write_bytes(bad)
            with pytest.raises(StoreError) as caught:
                load()
            assert str(path) in str(caught.value)
        path.unlink()
        with pytest.raises(StoreError):
            load()
        path.write_bytes(good)
        load()


def test_a_workload_that_changed_under_its_results_is_noticed(user_folder: Path) -> None:
    result = run(user_folder)
    module = sys.modules["rings_of_a_user"]
    original = module.rings

    def wider(examples: int = 600) -> Any:
        workload = original(examples)
        return gbp_ray.Workload(
            build_model=lambda: torch.nn.Sequential(
                torch.nn.Linear(2, 33), torch.nn.Tanh(), torch.nn.Linear(33, 2)
            ),
            train=workload.train,
            test=workload.test,
        )

    module.rings = wider
    with pytest.raises(StoreError, match="was the workload changed"):
        result.load_model()


@pytest.mark.parametrize("uri", ["nowhere", ".", "file:///nowhere", ""])
def test_what_is_no_result_is_refused(user_folder: Path, uri: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_result(uri)
    assert "\n" not in str(caught.value)


def test_a_round_that_another_process_takes_away_makes_no_finished_trial(
    user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_trial = single.work_trial

    def work_and_lose(job: Any, *args: Any, **options: Any) -> None:
        work_trial(job, *args, **options)
        store = Store(job.storage, job.name)
        (Path(store.round_uri(trial_id(job), 2)) / "round.json").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(single, "work_trial", work_and_lose)
        with pytest.raises(StoreError, match="round 2 vanished"):
            run(user_folder)
    assert not list(user_folder.rglob("trial.json"))
    assert len(run(user_folder).record.rounds) == 3


# -- before anything starts ------------------------------------------------------------------------


def test_options_without_effect_warn(user_folder: Path) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        run(user_folder, **{"prune.hutchinson_probes": 9, "finetune.lr_gamma": 0.5})
    assert sorted(str(warning.message) for warning in caught) == [
        "finetune.lr_gamma has no effect with finetune.lr_schedule = cosine",
        "prune.hutchinson_probes has no effect with prune.criterion = taylor",
    ]
    assert caught[0].filename == __file__, "the warning points at the caller"


def test_a_module_of_the_same_name_from_elsewhere_is_pointed_out(
    user_folder: Path, tmp_path: Path
) -> None:
    run(user_folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "rings_of_a_user.py").write_text(USER_MODULE.replace("(2, 32)", "(2, 16)"))
    (other / "job.toml").write_text(USER_JOB)
    storage = {"storage": str(other / "results")}
    with pytest.warns(UserWarning, match=r"'rings_of_a_user' is .*mine.*, not '.*other") as seen:
        prune(other / "job.toml", storage, is_quiet=True)
    assert len(seen) == 1
    assert str(seen[0].message).startswith("workload.factory = rings_of_a_user:rings")


def test_a_job_taken_from_a_record_does_not_warn(user_folder: Path) -> None:
    job = open_result(Path(run(user_folder).uri)).record.job
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(job, {"prune.sparsity": 0.25}, is_quiet=True)


WRONG = [
    ({"prune.sparsity": 1.0}, ConfigError, "prune.sparsity"),
    ({"workload.factory": "rings_of_a_user:ring"}, ConfigError, "did you mean 'rings'"),
    ({"workload.options.exampels": 5}, ConfigError, "did you mean 'examples'"),
    ({"workload.options.examples": 0}, WorkloadError, "holds no examples"),
    ({"workload.options.examples": "many"}, WorkloadError, "raised TypeError"),
    ({"prune.criterion": "rings_of_a_user:nothing"}, ConfigError, "prune.criterion"),
    ({"prune.exclude": ["conv9.*"]}, ConfigError, "prune.exclude"),
    ({"prune.exclude": ["*"]}, ConfigError, "leaves nothing to prune"),
    ({"prune.layer_min_sparsity": {"conv9": 0.5}}, ConfigError, "prune.layer_min_sparsity"),
    ({"prune.granularity": "2:4"}, ConfigError, "'0.weight' has 2"),
    ({"cluster.use_gpu": True}, ConfigError, "cluster.use_gpu"),
    ({"storage": "~no-such-user-here/x"}, StoreError, "storage"),
]


@pytest.mark.parametrize(("changed", "kind", "part"), WRONG)
def test_bad_input_is_refused_before_anything_is_written(
    user_folder: Path, changed: dict[str, Any], kind: type[GbpError], part: str
) -> None:
    if "cluster.use_gpu" in changed and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(kind) as caught:
        run(user_folder, **changed)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(user_folder.glob("results/**/*.safetensors"))
    if "cluster.use_gpu" not in changed:
        assert not (user_folder / "results").exists()


def test_the_folder_of_another_job_is_not_touched(user_folder: Path) -> None:
    run(user_folder)
    before = sorted((user_folder / "results").rglob("*"))
    with pytest.raises(StoreError, match="holds results of another job"):
        prune(
            None,
            {
                "storage": str(user_folder / "results"),
                "name": "rings",
                "cluster.num_workers": 0,
            },
            is_quiet=True,
        )
    assert sorted((user_folder / "results").rglob("*")) == before


# -- names -----------------------------------------------------------------------------------------


def test_every_public_name_can_be_had() -> None:
    for name in gbp_ray.__all__:
        assert getattr(gbp_ray, name) is not None
    assert dir(gbp_ray) == sorted(gbp_ray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        gbp_ray.prunee  # noqa: B018 - reading it is the test
