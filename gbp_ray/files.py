"""Objects as files: each is written under a temporary name, flushed to disk and renamed.

A reader so sees whole files or none, whenever the writer dies. Temporary names start with a dot and
are no objects.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gbp_ray.errors import StoreError
from gbp_ray.objects import Entry, Leftover, Objects

__all__ = ["FolderObjects"]

_TEMPORARY = re.compile(r"\..+\.[^.]+")


class FolderObjects(Objects):
    """Objects as files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Locates an object's file."""
        return self.folder / key if key else self.folder

    def uri_of(self, key: str = "") -> str:
        """Says the path."""
        return str(self.path(key))

    def child(self, name: str) -> FolderObjects:
        """Opens a folder below."""
        return FolderObjects(self.path(name))

    def parent(self) -> tuple[FolderObjects, str] | None:
        """Opens the folder above; None at the root."""
        if not self.folder.name:
            return None
        return FolderObjects(self.folder.parent), self.folder.name

    def get(self, key: str) -> bytes | None:
        """Reads a file, or None where there is none."""
        path = self.path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise _cannot_read(path, error) from None

    def get_version(self, key: str) -> tuple[bytes, str, float] | None:
        """Reads a file through one handle, with inode, time and size as its version."""
        path = self.path(key)
        try:
            # One handle for both, so that the version is that of the bytes.
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                return file.read(), _version_of(state), max(0.0, time.time() - state.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _cannot_read(path, error) from None

    def exists(self, key: str) -> bool:
        """Tells whether there is such a file."""
        path = self.path(key)
        try:
            return path.exists()
        except OSError as error:
            raise _cannot_read(path, error) from None

    def put(self, key: str, data: bytes) -> None:
        """Writes a file under another name and renames it."""
        self._write(self.path(key), data, is_new=False)

    def put_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Links a new file to its name, or replaces it while other writers are kept out."""
        path = self.path(key)
        if version is None:
            return self._write(path, data, is_new=True)
        with self._writers_excluded():
            try:
                found = _version_of(path.stat())
            except OSError:
                found = ""
            return self._write(path, data, is_new=False) if found == version else None

    def delete(self, keys: Iterable[str]) -> None:
        """Removes files, and the folders that are empty then."""
        for key in keys:
            path = self.path(key)
            with _as_store_error(path):
                path.unlink(missing_ok=True)
            # A folder without objects does not exist on an object store either.
            with contextlib.suppress(OSError):
                parent = path.parent
                while parent != self.folder:
                    parent.rmdir()
                    parent = parent.parent

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Walks the folder; temporary files are no objects."""
        folder, _, start = prefix.rpartition("/")
        now = time.time()
        for path in self._walk(self.path(folder), start):
            if not _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    key = path.relative_to(self.folder).as_posix()
                    yield Entry(key, state.st_size, max(0.0, now - state.st_mtime))

    def list_folders(self, prefix: str = "") -> list[str]:
        """Lists the folders directly inside one."""
        folder = self.path(prefix.rstrip("/"))
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError) as error:
            raise _cannot_read(folder, error) from None

    def find_leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """Finds the temporary files of writers that were killed."""
        folder, _, start = prefix.rpartition("/")
        now = time.time()
        for path in self._walk(self.path(folder), ""):
            if _TEMPORARY.fullmatch(path.name):
                key = path.with_name(path.name[1:].rpartition(".")[0])
                name = key.relative_to(self.folder).as_posix()
                if name.startswith(f"{folder}/{start}" if folder else start):
                    with contextlib.suppress(FileNotFoundError):
                        state = path.stat()
                        age_s = max(0.0, now - state.st_mtime)
                        yield Leftover(name, state.st_size, age_s, str(path))

    def discard(self, leftover: Leftover) -> None:
        """Removes a temporary file."""
        path = Path(leftover.token)
        with _as_store_error(path):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def preflight(self) -> None:
        """Asks nothing of a folder: its first write, the claim, is as good a question."""

    def _walk(self, folder: Path, start: str) -> Iterator[Path]:
        try:
            with os.scandir(folder) as found:
                files = sorted(
                    (entry for entry in found if entry.name.startswith(start)),
                    key=lambda entry: entry.name,
                )
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(
                f"storage: '{folder}' is not a folder that can be used: {error.strerror}; choose "
                "another name or storage"
            ) from None
        for entry in files:
            if entry.is_dir():
                yield from self._walk(folder / entry.name, "")
            else:
                yield folder / entry.name

    def _write(self, path: Path, data: bytes, *, is_new: bool) -> str | None:
        with _as_store_error(path, len(data)):
            handle, temporary = _make_temporary(path)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                if is_new:
                    is_ours = _link(temporary, path)
                    Path(temporary).unlink(missing_ok=True)
                    if not is_ours:
                        return None
                else:
                    Path(temporary).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink(missing_ok=True)
                raise
            return _version_of(path.stat())

    @contextlib.contextmanager
    def _writers_excluded(self) -> Iterator[None]:
        """Lets one writer at a time compare and replace; the kernel frees it when one dies."""
        try:
            # The job's mark is never replaced, so its lock needs no file of its own.
            file = self.path("job.json").open("rb+")
        except OSError:
            # Unclaimed, and so nobody's but the caller's.
            yield
            return
        with file:
            with contextlib.suppress(OSError):
                # Some network file systems know no locks; the index can be rebuilt.
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _make_temporary(path: Path) -> tuple[int, str]:
    for _ in range(9):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whoever removed the last file of this folder may be removing the folder as well.
        with contextlib.suppress(FileNotFoundError):
            return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


def _link(temporary: str, path: Path) -> bool:
    """Gives a file its name unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        # This file system knows no links: looking first is the best there is.
        if path.exists():
            return False
        Path(temporary).replace(path)
    return True


def _version_of(state: os.stat_result) -> str:
    return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"


def _cannot_read(path: Path, error: OSError | ValueError) -> StoreError:
    reason = error.strerror if isinstance(error, OSError) else error
    return StoreError(f"'{path}': cannot be read: {reason}")


@contextlib.contextmanager
def _as_store_error(path: Path, num_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(_explain_os_error(error, path, num_bytes)) from None


def _explain_os_error(error: OSError, path: Path, num_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with contextlib.suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free"
        return (
            f"storage: no room on disk for '{path}' ({num_bytes / 1e6:.1f} MB{free}); make room or "
            "choose another storage, and run the job again"
        )
    if error.errno == errno.ENOENT and path.parent.exists():
        return (
            f"storage: '{path}' vanished while it was written; is another process running this "
            "job? Run the job again when it has ended"
        )
    return (
        f"storage: cannot write '{path}': {error.strerror}; choose a storage folder you can write"
    )
