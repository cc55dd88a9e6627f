"""What of a folder goes to a cluster, against what git itself would take, and how it is packed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gbp_ray.config.job import load_job
from gbp_ray.errors import ConfigError
from gbp_ray.results.store import Store
from gbp_ray.runtime import packaging
from gbp_ray.runtime.packaging import (
    SECRET,
    choose_files,
    describe_left_out,
    find_files,
    pack_files,
)

KEPT = ["model.py", "sub/data.py", "sub/keep.log", ".rayignore", "link.py"]
# As results are laid out, but nobody's claim.
KEPT += ["search/job.json", "search/trials/model.py"]
LEFT_OUT = [
    ".git/config",
    ".venv/bin/python",
    "my-env/pyvenv.cfg",
    "my-env/lib/module.py",
    "__pycache__/model.cpython-311.pyc",
    "sub/__pycache__/data.cpython-311.pyc",
    ".mypy_cache/3.11/x.json",
    "gbp-results/digits/job.json",
    "kept/dense/0123abcd/weights.safetensors",
    "node_modules/x/index.js",
    ".env",
    ".env.local",
    ".aws/credentials",
    "huge.bin",
    "sub/some.log",
]


def write(folder: Path, name: str, text: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_nobody_means_to_send_stays(tmp_path: Path) -> None:
    Store(tmp_path, "kept").claim(load_job())
    for name in [*KEPT, *LEFT_OUT]:
        write(tmp_path, name)
    write(tmp_path, ".rayignore", "*.bin\n*.log\n!keep.log\n")
    (tmp_path / "link.py").unlink()
    (tmp_path / "link.py").symlink_to(tmp_path / "model.py")
    assert list(find_files(tmp_path)) == sorted(KEPT)


SENT = ["job.toml", "model.py", "sub/labels.json", "net/__init__.py", "net/vocabulary", "data.csv"]
SENT += ["secrets.py", "images/1.png", "weights.pt"]
SECRETS = ["id_rsa", "sub/id_ed25519", "credentials.json", ".git-credentials", ".npmrc", ".pypirc"]
SECRETS += [".docker/config.json", ".kube/config", "server.pem", "store.p12", "sub/store.jks"]
SECRETS += ["secrets.yaml", "terraform.tfstate", ".huggingface/token", ".bash_history", "core"]
SECRETS += [".python_history", "core.4711", "net/id_ecdsa", "PROD.PEM", "hub/client_secret_1.json"]
SECRETS += ["my_credentials.json", "prod.env", "deploy.key", "linked.json"]
TALKATIVE = {
    "settings.yaml": "key: AKIAIOSFODNN7EXAMPLE",
    "sub/config.json": '{"token": "ghp_0123456789abcdefghijklmnopqrstuvwxyz"}',
    "notes.txt": "one\n-----BEGIN OPENSSH PRIVATE KEY-----\n",
    "hub.ini": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "chat.cfg": "xoxb-123456789012-abcdef",
    "llm.md": "sk-proj-abcdefghijklmnopqrstuvwxyz",
    "net/plain": "-----BEGIN PRIVATE KEY-----",
}
OTHERS = [".vscode/settings.json", ".idea/workspace.xml", "LICENSE", "a.log", "mine.docx"]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    for name in [*SENT, *SECRETS, *OTHERS]:
        write(folder, name)
    for name, text in TALKATIVE.items():
        write(folder, name, text)
    (folder / "llm.md").write_bytes(TALKATIVE["llm.md"].encode("utf-16"))
    write(tmp_path, "elsewhere/key.json")
    write(tmp_path, "elsewhere/.ssh/config")
    (folder / "away.json").symlink_to(tmp_path / "elsewhere" / "key.json")
    (folder / "far").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "linked.json").unlink()
    (folder / "linked.json").symlink_to(folder / "credentials.json")
    return folder


def test_only_what_a_job_needs_goes_and_secrets_are_named(full: Path) -> None:
    chosen, left = choose_files(full)
    assert list(chosen) == sorted(SENT)
    assert {name for name, why in left.items() if why == SECRET} == {*SECRETS, *TALKATIVE}
    others = {name for name, why in left.items() if why != SECRET}
    assert others == {*OTHERS, "away.json", "far/key.json"}
    told = describe_left_out(left)
    assert "\n" not in told
    assert "2 linked from elsewhere (away.json, far/key.json)" in told
    assert told.endswith("--include PATH sends one")
    assert describe_left_out({}) == ""


def test_what_is_included_by_name_goes(full: Path, tmp_path: Path) -> None:
    chosen, left = choose_files(full, ["id_rsa", "far", ".vscode/", "settings.yaml", "./LICENSE"])
    added = {"id_rsa", "far/key.json", ".vscode/settings.json", "settings.yaml", "LICENSE"}
    assert set(chosen) == {*SENT, *added}
    assert not added & left.keys()
    # A folder is no name for the secrets in it.
    assert choose_files(full, ["."])[1].keys() == {*SECRETS, *TALKATIVE}
    write(full, ".rayignore", "*.csv\n")
    assert "data.csv" not in choose_files(full)[0]
    assert "data.csv" in choose_files(full, ["data.csv"])[0]
    for name in ("nowhere", "../elsewhere/key.json"):
        with pytest.raises(ConfigError, match=rf"--include '{name}': there is no such file"):
            choose_files(full, [name])


@pytest.mark.parametrize("name", ["settings.py", "net/job.toml"])
def test_code_with_a_secret_in_it_is_refused_by_its_line(full: Path, name: str) -> None:
    write(full, name, "a = 1\nb = 'AKIAIOSFODNN7EXAMPLE'\n")
    with pytest.raises(ConfigError, match=rf"{name}': line 2 holds what .* a key of AWS") as e:
        choose_files(full)
    assert f"--include '{name}'" in str(e.value)
    assert "AKIA" not in str(e.value)
    assert name in choose_files(full, [name])[0]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_what_git_tracks_goes_but_for_secrets(full: Path) -> None:
    names = ["LICENSE", "id_rsa", ".vscode/settings.json", "settings.yaml", "away.json"]
    subprocess.run(["git", "init", "-q"], cwd=full, check=True)
    subprocess.run(["git", "add", "-f", *names], cwd=full, check=True)
    chosen, left = choose_files(full)
    assert set(chosen) == {*SENT, "LICENSE"}
    assert left["id_rsa"] == left["settings.yaml"] == SECRET


def test_a_link_that_goes_round_ends(tmp_path: Path) -> None:
    write(tmp_path, "a/model.py")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "shared").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert list(find_files(tmp_path)) == ["a/model.py", "shared/model.py"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("folder", [".", "jobs", "jobs/deep"])
def test_ignore_files_are_read_as_git_reads_them(tmp_path: Path, folder: str) -> None:
    names = ["a.txt", "a.log", "keep.log", "data/x", "data/keep.me", "top", "build/x", "b/build"]
    for place in (".", "jobs", "jobs/deep"):
        for name in names:
            if not (tmp_path / place / name).exists():
                write(tmp_path / place, name)
    write(tmp_path, ".gitignore", "*.log\n!keep.log\n/top\nbuild/\ndata/*\n!data/keep.me\n# no\n")
    write(tmp_path / "jobs", ".gitignore", "!a.log\n/deep/a.txt\n")
    write(tmp_path / "jobs" / "deep", ".gitignore", "keep.log\n!top\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "-z", "."],
        cwd=tmp_path / folder,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)},
    )
    wanted = sorted(name for name in listed.stdout.split("\0") if name)
    assert list(find_files(tmp_path / folder)) == wanted
    assert len(wanted) < len([p for p in (tmp_path / folder).rglob("*") if p.is_file()])


def test_a_folder_that_git_ignores_may_be_sent(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(tmp_path, ".gitignore", "scratch/\n*.log\n")
    write(tmp_path, "scratch/model.py")
    assert list(find_files(tmp_path / "scratch")) == ["model.py"]


def test_the_same_files_are_the_same_archive(tmp_path: Path) -> None:
    for number, folder in enumerate((tmp_path / "one", tmp_path / "other")):
        write(folder, "model.py", "code")
        os.utime(folder / "model.py", (number * 1e9, number * 1e9))
    extra = {"job.toml": b"a job", "model.py": b"ours"}
    one, other = (pack_files(find_files(tmp_path / n), extra) for n in ("one", "other"))
    assert one.data == other.data
    with zipfile.ZipFile(io.BytesIO(one.data)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == extra
    assert one.sizes == {"job.toml": 5, "model.py": 4}


def test_what_is_too_large_is_refused_by_name_before_it_is_all_read(tmp_path: Path) -> None:
    write(tmp_path, "model.py", "code")
    (tmp_path / "noise.bin").write_bytes(os.urandom(3_000_000))
    with (tmp_path / "sparse.bin").open("wb") as file:
        # Twenty gigabytes that take no room, and that nobody may read whole.
        file.truncate(20 * 2**30)
    with pytest.raises(ConfigError, match=r"more than a Ray cluster takes, 1 MB \(sparse.bin") as e:
        pack_files(find_files(tmp_path), {}, most_bytes=1_000_000)
    assert "noise.bin 3.0 MB" in str(e.value)
    assert ".rayignore" in str(e.value)
    (tmp_path / "sparse.bin").unlink()
    assert len(pack_files(find_files(tmp_path), {}, most_bytes=4_000_000).data) > 3_000_000


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.py").symlink_to("odd.py")
    with pytest.raises(ConfigError, match=r"odd.py': cannot be read: Too many levels .*rayignore"):
        pack_files({"odd.py": tmp_path / "odd.py"}, {})
    with pytest.raises(ConfigError, match=r"nowhere': cannot be read: No such file"):
        find_files(tmp_path / "nowhere")


def test_what_vanishes_meanwhile_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job may write its results below the folder, under names that last for a moment."""
    for name in ("model.py", "notes.txt", "passing/file.txt"):
        write(tmp_path, name)
    is_ignored = packaging._is_ignored

    def vanish(path: Path, *others: Any, **options: Any) -> bool:
        # When it is known to be a folder, and before anybody looks into it.
        if path.name == "passing":
            shutil.rmtree(path)
        return is_ignored(path, *others, **options)

    monkeypatch.setattr(packaging, "_is_ignored", vanish)
    files = find_files(tmp_path)
    assert not (tmp_path / "passing").exists()
    assert list(files) == ["model.py", "notes.txt"]
    (tmp_path / "notes.txt").unlink()
    assert pack_files(files, {}).sizes == {"model.py": 1}
    with pytest.raises(ConfigError, match=r"more than a Ray cluster takes"):
        pack_files(files, {}, most_bytes=10)
