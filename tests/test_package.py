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

from gbp_ray import package
from gbp_ray.config import load_job
from gbp_ray.errors import ConfigError
from gbp_ray.package import find_files, is_left_out, pack_files
from gbp_ray.store import Store

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
    assert is_left_out(tmp_path, "huge.bin")
    assert not is_left_out(tmp_path, "model.py")
    assert not is_left_out(tmp_path, "nowhere.py")


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
    is_ignored = package._is_ignored

    def vanish(path: Path, *others: Any, **options: Any) -> bool:
        # When it is known to be a folder, and before anybody looks into it.
        if path.name == "passing":
            shutil.rmtree(path)
        return is_ignored(path, *others, **options)

    monkeypatch.setattr(package, "_is_ignored", vanish)
    files = find_files(tmp_path)
    assert not (tmp_path / "passing").exists()
    assert list(files) == ["model.py", "notes.txt"]
    (tmp_path / "notes.txt").unlink()
    assert pack_files(files, {}).sizes == {"model.py": 1}
    with pytest.raises(ConfigError, match=r"more than a Ray cluster takes"):
        pack_files(files, {}, most_bytes=10)
