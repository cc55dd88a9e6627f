"""Arrays that are costly to make are kept on disk and read as a memory map from then on.

A cache is a folder of `.npy` files beside `manifest.json`, which holds the length and CRC-32 of
each. It is written under another name and moved into place whole, so a process that is killed or
overtaken never leaves a half-written one; a damaged one is noticed and made again. The folder is
$GBP_RAY_CACHE, else $XDG_CACHE_HOME/gbp_ray, else ~/.cache/gbp_ray.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gbp_ray.errors import WorkloadError

__all__ = [
    "cache_folder",
    "cached_arrays",
]

_MANIFEST = "manifest.json"
_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 24


def cache_folder() -> Path:
    """Returns the folder under which every cache lies."""
    chosen = os.environ.get("GBP_RAY_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "gbp_ray"


def cached_arrays(name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays kept under a name, made and stored first where there are none.

    Processes that race make the arrays once each; the first to finish is kept.

    Args:
        name: Must change whenever the arrays would.
        make: Makes the arrays, by name.

    Returns:
        Read-only memory maps by name.

    Raises:
        WorkloadError: The cache folder cannot be written.
    """
    folder = cache_folder() / name
    for _ in range(_ATTEMPTS):
        arrays = _open(folder)
        if arrays is not None:
            return arrays
        # Before they are made: what is there afterwards another process has finished meanwhile.
        with _faults_explained():
            _discard(folder)
        made = make()
        with _faults_explained():
            _store(folder, made)
    raise WorkloadError(
        f"GBP_RAY_CACHE = '{cache_folder()}': '{name}' was damaged again after {_ATTEMPTS} "
        "attempts; set GBP_RAY_CACHE to a folder on a sound disk"
    )


@contextmanager
def _faults_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkloadError(
            f"GBP_RAY_CACHE = '{cache_folder()}': decoded data cannot be kept here: "
            f"{error.strerror or error}; set GBP_RAY_CACHE to a folder with space that you may "
            "write"
        ) from error


def _open(folder: Path) -> dict[str, np.ndarray] | None:
    """Opens a cache, or returns None where it is absent or damaged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text("utf-8"))
        arrays = {}
        for name, written in manifest.items():
            path = folder / f"{name}.npy"
            if _fingerprint(path) != written:
                return None
            # A plain array over the map: numpy indexes its memmap class more slowly.
            arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, AttributeError):
        return None
    return arrays


def _store(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        manifest = {}
        for name, array in arrays.items():
            path = staging / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            manifest[name] = _fingerprint(path)
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        try:
            os.replace(staging, folder)  # noqa: PTH105 - the name says that it is atomic
        except OSError:
            # A folder with files in it is never replaced: another process was faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _discard(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        # Moved first: a reader must never find a folder that is half gone.
        os.replace(folder, doomed)  # noqa: PTH105 - the name says that it is atomic
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, int]:
    checksum, length = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum, length = zlib.crc32(chunk, checksum), length + len(chunk)
    return {"bytes": length, "crc32": checksum}
