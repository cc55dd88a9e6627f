"""What goes to a cluster with a job, what it is called there, and what is refused before."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from user_files import USER_JOB, USER_MODULE

import gbp_ray
from gbp_ray.config.job import JobConfig, load_job, trial_id
from gbp_ray.errors import ConfigError
from gbp_ray.runtime.submission import PYTHONS, Submission, prepare_submission

ROOT = Path(__file__).resolve().parents[2]
STORAGE = {"storage": "s3://bucket/prefix"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.toml").write_text(USER_JOB)
    (tmp_path / "rings_of_a_user.py").write_text(USER_MODULE)
    return tmp_path


def prepare(job: Any = None, settings: dict[str, Any] | None = None, **options: Any) -> Submission:
    options.setdefault("environment", {})
    return prepare_submission(job, STORAGE | (settings or {}), **options)


def unpack(submission: Submission) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(submission.package.data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_job_arrives_as_it_was_resolved(folder: Path) -> None:
    settings = {"prune.sparsity": 0.7, "prune.layer_max_sparsity": {"0.*": 0.9}}
    submission = prepare(folder / "job.toml", settings)
    sent = JobConfig.model_validate(tomllib.loads(unpack(submission)[".gbp-ray-job.toml"].decode()))
    wanted = load_job(folder / "job.toml", STORAGE | settings)
    assert sent.cluster.address == "auto"
    assert trial_id(sent) == trial_id(wanted)
    assert submission.base_id == f"rings-{trial_id(wanted)}"
    assert submission.uri == "s3://bucket/prefix/rings"
    assert sent.model_dump(exclude={"cluster"}) == wanted.model_dump(exclude={"cluster"})


def test_the_archive_runs_where_there_is_nothing_of_ours(folder: Path, tmp_path: Path) -> None:
    """The package in the archive, and no other, imports and knows the job."""
    submission = prepare(folder / "job.toml")
    there = tmp_path / "there"
    for name, data in unpack(submission).items():
        path = there / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    code = (
        "import gbp_ray.config.job as c; print(c.__file__); print(c.load_job('.gbp-ray-job.toml'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=there,
        env={"PYTHONPATH": str(there)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(there / "gbp_ray"))
    assert (there / "rings_of_a_user.py").read_text() == USER_MODULE
    sent = {name for name in submission.package.sizes if name.startswith("gbp_ray/")}
    installed = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gbp_ray").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert sent == installed


def test_an_installed_package_stays_here(folder: Path) -> None:
    files = unpack(prepare(folder / "job.toml", is_installed=True))
    assert sorted(files) == [
        ".gbp-ray-facts.json",
        ".gbp-ray-job.toml",
        ".gbp-ray-start.py",
        "job.toml",
        "rings_of_a_user.py",
    ]
    assert json.loads(files[".gbp-ray-facts.json"])["version"] == gbp_ray.__version__


def test_the_name_tells_jobs_apart_and_clusters_not(folder: Path) -> None:
    job = folder / "job.toml"
    base = prepare(job).base_id
    assert prepare(job, {"storage": "/shared", "cluster.num_workers": 2}).base_id == base
    # There it joins the cluster.
    sent = prepare(job, {"storage": "/shared", "cluster.launcher": "local"})
    assert (sent.base_id, sent.job.cluster.launcher, sent.job.cluster.address) == (
        *(base, "auto"),
        "auto",
    )
    assert prepare(job, {"seed": 1}).base_id != base
    assert prepare(job, {"name": "other"}).base_id != base
    # Names are part of addresses.
    assert prepare(job, {"prune.criterion": "rings_of_a_user:first_rows_first"}).base_id.isascii()


def test_a_space_makes_a_sweep_of_a_job(folder: Path) -> None:
    job = folder / "job.toml"
    assert prepare(job).kind == "prune"
    assert prepare(job, is_sweep=True).kind == "sweep"
    assert prepare(job, {"sweep.target.max_drop": 0.01}).kind == "sweep"
    sweeps = [
        prepare(job, {"sweep.space": {"prune.sparsity": values}}) for values in ([0.1, 0.2], [0.1])
    ]
    assert [sweep.kind for sweep in sweeps] == ["sweep", "sweep"]
    assert sweeps[0].base_id.startswith("rings-sweep-")
    assert sweeps[0].base_id != sweeps[1].base_id
    facts = json.loads(unpack(sweeps[0])[".gbp-ray-facts.json"])
    assert facts["arguments"] == ["sweep", ".gbp-ray-job.toml"]
    with pytest.raises(ConfigError, match=r"sweep.space: 1 of 2 trials are refused"):
        prepare(job, {"sweep.space": {"prune.sparsity": [0.1, 1.5]}})


HARMLESS = {
    "PWD": "/home/me/resnet50_cifar10",
    "OMP_NUM_THREADS": "1",
    "MODEL": "meta-llama/Llama-3.1-8B-Instruct",
    "RUN_ID": "550e8400-e29b-41d4-a716-446655440000",
    "DATA": "s3://bucket/cifar10_resnet20_distillation/2026-01-05",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


def test_storage_settings_and_named_variables_go_along() -> None:
    environment = {
        "AWS_ENDPOINT_URL": "http://storage:9000",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_SECRET_ACCESS_KEY": "the-secret-of-a-test",
        "AWS_ACCESS_KEY_ID": "the-key-of-a-test",
        "AWS_PROFILE": "of-this-machine",
        "HF_HOME": "/shared/hub",
        "TOKENIZERS_PARALLELISM": "false",
        "OTHER": "stays",
    } | HARMLESS
    names = ["HF_HOME", "TOKENIZERS_PARALLELISM", *HARMLESS]
    submission = prepare(env_names=names, environment=environment)
    assert submission.env_vars == {
        "AWS_ENDPOINT_URL": "http://storage:9000",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "HF_HOME": "/shared/hub",
        "TOKENIZERS_PARALLELISM": "false",
        **HARMLESS,
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    told = json.dumps([submission.metadata, submission.env_vars, submission.entrypoint])
    told += json.dumps(submission.describe())
    everything = told.encode() + b"".join(unpack(submission).values())
    assert b"the-secret-of-a-test" not in everything
    assert b"the-key-of-a-test" not in everything


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hidden"),
        ("AWS_ACCESS_KEY_ID", "hidden"),
        ("AWS_SESSION_TOKEN", "hidden"),
        ("WANDB_API_KEY", "hidden"),
        ("DB_PASSWORD", "hidden"),
        ("DATABASE_URL", "postgres://me:hidden@host/db"),
        ("SETTINGS", "AKIAIOSFODNN7EXAMPLE hidden"),
        ("CERTIFICATE", "-----BEGIN RSA PRIVATE KEY----- hidden"),
        ("PGPASSWORD", "hidden"),
        ("MYSQL_PWD", "hidden"),
        ("JWT", "hidden"),
        ("STRIPE", "hidden"),
        ("CONNECTION_STRING", "hidden"),
        ("AZURE_STORAGE", "AccountName=a;AccountKey=hidden;"),
        ("BROKER", "amqp://hidden@host"),
        ("SESSION", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.hidden"),
        ("BILLING", "sk_live_0123456789hidden"),
        ("WORD", "hidden8f5f167f44f4964e6c998dee827110c"),
    ],
)
def test_secrets_are_refused_and_not_repeated(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        prepare(env_names=[name], environment={name: value})
    assert "hidden" not in str(caught.value)
    assert "instance profile" in str(caught.value)


def test_an_endpoint_with_credentials_is_refused_and_not_repeated() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://me:hidden@storage:9000"}
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: holds credentials") as caught:
        prepare(environment=environment)
    assert "hidden" not in str(caught.value)


REFUSED = [
    ({"storage": "gbp-results"}, {}, r"storage = 'gbp-results': is a folder of this machine"),
    ({}, {"env_names": ["NOWHERE"]}, r"--env NOWHERE: is not set here"),
    ({}, {"env_names": ["A=secret"]}, r"--env 'A': give only the name of a variable"),
    ({}, {"folder": "nowhere"}, r"--folder = 'nowhere': is not a folder"),
    ({"prune.sparsity": 2}, {}, r"prune.sparsity"),
    ({"workload.options": {"a": None}}, {}, r"cannot be written as TOML"),
    (
        {"storage": "s3://bucket/x?endpoint_override=localhost:9000&scheme=http"},
        {"address": "http://head:8265"},
        r"storage = http://localhost:9000: means this machine here",
    ),
    (
        {},
        {"address": "http://head:8265", "environment": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}},
        r"AWS_ENDPOINT_URL = http://127.0.0.1:9: means this machine here",
    ),
]


@pytest.mark.parametrize(("settings", "options", "expected"), REFUSED)
def test_what_could_not_work_there_is_refused_here(
    settings: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        prepare(None, settings, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_secrets_in_the_folder_stay_and_those_in_the_job_are_refused(folder: Path) -> None:
    (folder / "id_rsa").write_text("hidden")
    (folder / "LICENSE").write_text("free")
    with pytest.warns(UserWarning, match=r"left out: 1 that look like secrets \(id_rsa\); --incl"):
        submission = prepare(folder / "job.toml")
    assert set(submission.left_out) == {"id_rsa", "LICENSE"}
    assert submission.describe()["left_out"] == submission.left_out
    assert not {"id_rsa", "LICENSE"} & submission.package.sizes.keys()
    sent = prepare(folder / "job.toml", include=["id_rsa"])
    assert unpack(sent)["id_rsa"] == b"hidden"
    options = {"workload.options.token": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"}
    with pytest.raises(ConfigError, match=r"'token' of the job holds what .* Hugging Face") as e:
        prepare(folder / "job.toml", options, include=["id_rsa"])
    assert "hf_abc" not in str(e.value)
    (folder / "rings_of_a_user.py").unlink()
    (folder / "rings_of_a_user.py").symlink_to(Path(__file__))
    with pytest.raises(ConfigError, match=r"linked from elsewhere; give --include 'rings_of_a_us"):
        prepare(folder / "job.toml", include=["id_rsa"])


def test_a_server_on_this_machine_will_do_for_a_head_on_it() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}
    for address in ("http://localhost:8265", "http://127.0.0.1:8265"):
        prepare(address=address, environment=environment)
    prepare(None, {"storage": "/shared"}, address="http://head:8265", environment=environment)


def test_code_that_does_not_go_or_is_no_python_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, module = folder / "job.toml", folder / "rings_of_a_user.py"
    (folder / ".rayignore").write_text("rings_*\n")
    with pytest.raises(ConfigError, match=r"rings_of_a_user.py' would not be sent"):
        prepare(job)
    (folder / ".rayignore").unlink()
    module.write_text("def rings(:\n")
    with pytest.raises(ConfigError, match=r"rings_of_a_user.py:1 is not Python: invalid syntax"):
        prepare(job)
    (folder / "sub").mkdir()
    job.rename(folder / "sub" / "job.toml")
    module.write_text(USER_MODULE)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"is here and not in the folder .*give --folder"):
        prepare("sub/job.toml")
    assert prepare("sub/job.toml", folder=".").num_user_files == 2
    # What is neither here nor there may be installed on the cluster.
    prepare("sub/job.toml", {"workload.factory": "of_the_cluster:rings"})


def test_the_pythons_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.13"
    assert PYTHONS == ("3.11", "3.12")


def test_what_is_looked_for_on_the_head_is_what_the_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {"pillow": "PIL", "tomli-w": "tomli_w"}
    names = [text.partition("[")[0].partition(">")[0] for text in project["dependencies"]]
    facts = json.loads(unpack(prepare())[".gbp-ray-facts.json"])
    assert sorted(facts["modules"]) == sorted([modules.get(n, n) for n in names] + ["gbp_ray"])
