"""Objects as files: each is written under a temporary name, flushed to disk and given its own.

A reader so sees whole files or none, whenever the writer dies. Temporary names start with a dot and
are not objects. A write returns when file and folder have been flushed, so what was acknowledged
outlives a power cut; `put_new` leaves the folder to `flush`, for several files at once.

The storage's own folder may be a symbolic link. Below it none is followed: each folder is opened by
its handle, from the root down, so that no name leads out, whatever somebody has put there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from gbp_ray.errors import ConfigError, StoreError
from gbp_ray.results.objects import TEMPORARY, Entry, Leftover, Objects, check_key, is_key

__all__ = [
    "FolderObjects",
    "check_target",
    "write_target",
]

_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LINK = "it lies behind a symbolic link, and none is followed inside a storage"
_MOST_DEPTH = 50
_PIECE = 2**20


class FolderObjects(Objects):
    """Objects as files below a folder.

    Args:
        folder: Holds them.
        prefix: Where below it the names begin.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._root, self._prefix = folder, prefix
        self.folder = folder / prefix if prefix else folder

    def path(self, key: str) -> Path:
        """Locates an object's file.

        Raises:
            StoreError: The name leads out of the folder.
        """
        return self._root.joinpath(*self._parts(key))

    def uri_of(self, key: str = "") -> str:
        """Return the path."""
        return f"{self.folder}/{key}" if key else str(self.folder)

    def child(self, name: str) -> FolderObjects:
        """Opens a folder below."""
        return FolderObjects(self._root, f"{self._prefix}/{name}" if self._prefix else name)

    def parent(self) -> tuple[FolderObjects, str] | None:
        """Opens the folder above; None at the root."""
        if self._prefix:
            above, _, name = self._prefix.rpartition("/")
            return FolderObjects(self._root, above), name
        if not self._root.name:
            return None
        return FolderObjects(self._root.parent), self._root.name

    def get(self, key: str) -> bytes | None:
        """Reads a file, or None where there is none."""
        found = self.get_version(key)
        return None if found is None else found[0]

    def get_version(self, key: str) -> tuple[bytes, str, float] | None:
        """Reads a file through one handle, with inode, time and size as its version."""
        try:
            # One handle for both, so that the version is that of the bytes.
            with self.open_file(key, _READ) as file:
                state = os.fstat(file.fileno())
                return file.read(), _version_of(state), max(0.0, time.time() - state.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._cannot_read(key, error) from None

    def measure(self, key: str) -> tuple[int, str] | None:
        """Reads a file in pieces for its size and SHA-256."""
        try:
            with self.open_file(key, _READ) as file:
                return os.fstat(file.fileno()).st_size, _digest_of(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._cannot_read(key, error) from None

    def exists(self, key: str) -> bool:
        """Check whether there is such a file."""
        try:
            with self._inside(key) as (folder, name):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, _LINK)
                return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._cannot_read(key, error) from None

    def put(self, key: str, data: bytes) -> None:
        """Writes a file under another name and renames it."""
        self._write(key, data, is_new=False)

    def put_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Links a new file to its name, or replaces it while other writers are kept out."""
        if version is None:
            return self._write(key, data, is_new=True)
        with self._writers_excluded():
            found = self.get_version(key)
            is_same = found is not None and found[1] == version
            return self._write(key, data, is_new=False) if is_same else None

    def put_new(self, key: str, data: bytes, twin: str = "") -> bool:
        """Links a new file to its name, or its twin's file; the folder is left to `flush`."""
        if twin and self._link_twin(key, twin):
            return True
        if self._write(key, data, is_new=True, is_flushed=False) is not None:
            return True
        return self.measure(key) == (len(data), hashlib.sha256(data).hexdigest())

    def flush(self, folders: Iterable[str]) -> None:
        """Flushes folders, whose files have been."""
        for folder in sorted(set(folders)):
            with (
                _as_store_error(self.path(folder)),
                self._inside(f"{folder}/x") as (handle, _),
            ):
                _flush_folder(handle)

    def delete(self, keys: Iterable[str]) -> None:
        """Removes files, and the folders that are empty then."""
        for key in keys:
            with (
                _as_store_error(self.path(key)),
                contextlib.suppress(FileNotFoundError),
                self._inside(key) as (folder, name),
            ):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, _LINK)
                os.unlink(name, dir_fd=folder)
            self._remove_empty(key)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Walks the folder; temporary files and links are passed over."""
        for key, state in self._walk(prefix):
            if not TEMPORARY.fullmatch(key.rpartition("/")[2]):
                yield Entry(key, state.st_size, max(0.0, time.time() - state.st_mtime))

    def list_folders(self, prefix: str = "") -> list[str]:
        """Lists the folders directly inside one; warns of links to some, which are not followed."""
        folder = prefix.rstrip("/")
        names = []
        try:
            with self._inside(f"{folder}/x" if folder else "x") as (handle, _):
                for entry in os.scandir(handle):
                    if entry.is_symlink():
                        self._warn_of_link(handle, prefix + entry.name)
                    elif entry.is_dir(follow_symlinks=False) and is_key(entry.name):
                        names.append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._cannot_read(folder, error) from None
        return sorted(names)

    def find_leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """Finds the temporary files of writers that were killed."""
        folder, _, _ = prefix.rpartition("/")
        for temporary, state in self._walk(f"{folder}/" if folder else ""):
            place, _, name = temporary.rpartition("/")
            if TEMPORARY.fullmatch(name):
                own = name[1:].rpartition(".")[0]
                key = f"{place}/{own}" if place else own
                if key.startswith(prefix):
                    age_s = max(0.0, time.time() - state.st_mtime)
                    yield Leftover(key, state.st_size, age_s, temporary)

    def discard(self, leftover: Leftover) -> None:
        """Removes a temporary file."""
        place, _, name = leftover.token.rpartition("/")
        with (
            _as_store_error(self.folder / leftover.token),
            contextlib.suppress(FileNotFoundError),
            self._inside(f"{place}/x" if place else "x") as (folder, _),
        ):
            os.unlink(name, dir_fd=folder)
        self._remove_empty(leftover.key, at_most=1)

    def preflight(self) -> None:
        """Asks nothing of a folder: its first write, the claim, is as good a question."""

    @contextlib.contextmanager
    def open_file(self, key: str, flags: int, *, is_made: bool = False) -> Iterator[IO[bytes]]:
        """Opens a regular file below the root without following a link.

        Raises:
            OSError: It is missing or not a regular file.
        """
        with self._inside(key, is_made=is_made) as (folder, name):
            handle = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "it is no regular file")
        mode = "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "rb+"
        with os.fdopen(handle, mode) as file:
            yield file

    # -- by handle ---------------------------------------------------------------------------------

    def _parts(self, key: str) -> list[str]:
        whole = "/".join(part for part in (self._prefix, key) if part)
        return check_key(whole).split("/") if whole else []

    @contextlib.contextmanager
    def _inside(self, key: str, *, is_made: bool = False) -> Iterator[tuple[int, str]]:
        """Opens the folder that an object is in, from the root down; gives handle and name."""
        *folders, name = self._parts(key)
        if is_made:
            _make_folders(self._root)
        handle = os.open(self._root, _ENTER & ~os.O_NOFOLLOW)
        try:
            for folder in folders:
                below = _enter(handle, folder, is_made)
                os.close(handle)
                handle = below
            yield handle, name
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise OSError(errno.ELOOP, _LINK) from None
            raise
        finally:
            os.close(handle)

    def _write(self, key: str, data: bytes, *, is_new: bool, is_flushed: bool = True) -> str | None:
        with _as_store_error(self.path(key), len(data)):
            # Whoever removed the last file of this folder may be removing the folder as well.
            for is_last in (*[False] * 8, True):
                with self._inside(key, is_made=True) as (folder, name):
                    temporary = f".{name}.{secrets.token_hex(4)}"
                    try:
                        handle = os.open(temporary, _CREATE, 0o600, dir_fd=folder)
                    except FileNotFoundError:
                        if is_last:
                            raise
                        continue
                    return _fill(folder, handle, temporary, name, data, is_new, is_flushed)
        raise AssertionError("unreachable")

    def _link_twin(self, key: str, twin: str) -> bool:
        """Gives the file of another object a second name; both are only ever replaced."""
        # Without links, or where the name is taken, it is written and compared.
        with (
            contextlib.suppress(OSError),
            self._inside(twin) as (source, old),
            self._inside(key, is_made=True) as (folder, new),
        ):
            os.link(old, new, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
            return True
        return False

    def _remove_empty(self, key: str, at_most: int = _MOST_DEPTH) -> None:
        """Removes the folders of an object that hold nothing any more."""
        # A folder without objects does not exist on an object store either.
        with contextlib.suppress(OSError):
            for _ in range(min(at_most, key.count("/"))):
                key = key.rpartition("/")[0]
                with self._inside(key) as (folder, name):
                    os.rmdir(name, dir_fd=folder)

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        folder, _, start = prefix.rpartition("/")
        try:
            with self._inside(f"{folder}/x" if folder else "x") as (handle, _):
                yield from _walk(handle, f"{folder}/" if folder else "", start, 0)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StoreError(
                f"storage: '{self.uri_of(folder)}' is not a folder that can be used: "
                f"{error.strerror}; choose another name or storage"
            ) from None

    def _warn_of_link(self, folder: int, key: str) -> None:
        with contextlib.suppress(OSError):
            if stat.S_ISDIR(os.stat(key.rpartition("/")[2], dir_fd=folder).st_mode):
                warnings.warn(
                    f"storage: '{self.uri_of(key)}' is a symbolic link and is left out; give the "
                    "folder that it leads to",
                    stacklevel=3,
                )

    def _cannot_read(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"'{self.uri_of(key)}': cannot be read: {error.strerror}")

    @contextlib.contextmanager
    def _writers_excluded(self) -> Iterator[None]:
        """Lets one writer at a time compare and replace; the kernel frees it when one dies."""
        with contextlib.ExitStack() as stack:
            # Unclaimed, and so nobody's but the caller's, it has no mark. Some network file systems
            # know no locks; the index can be rebuilt.
            with contextlib.suppress(OSError):
                # The job's mark is never replaced, so its lock needs no file of its own.
                file = stack.enter_context(self.open_file("job.json", os.O_RDWR))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _fill(
    folder: int,
    handle: int,
    temporary: str,
    name: str,
    data: bytes,
    is_new: bool,
    is_flushed: bool,
) -> str | None:
    """Writes a temporary file and gives it its name; returns its version, or None if taken."""
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        if not is_new:
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        elif _link(folder, temporary, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        else:
            os.unlink(temporary, dir_fd=folder)
            return None
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    if is_flushed:
        _flush_folder(folder)
    return _version_of(os.stat(name, dir_fd=folder, follow_symlinks=False))


def _link(folder: int, temporary: str, name: str) -> bool:
    """Gives a file its name unless the name is taken."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        # This file system knows no links: looking first is the best there is.
        with contextlib.suppress(FileNotFoundError):
            os.stat(name, dir_fd=folder, follow_symlinks=False)
            return False
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    return True


def _enter(parent: int, name: str, is_made: bool) -> int:
    """Opens a folder inside another one, or makes it, so that it outlives a power cut."""
    try:
        return os.open(name, _ENTER, dir_fd=parent)
    except FileNotFoundError:
        if not is_made:
            raise
    except NotADirectoryError:
        # What the kernel says of a link, too.
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, _LINK) from None
        raise
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
        _flush_folder(parent)
    return os.open(name, _ENTER, dir_fd=parent)


def _make_folders(folder: Path) -> None:
    """Makes a storage's own folder and those above it, each flushed into the one that holds it."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)  # noqa: PTH102 - as all other changes are made
            handle = os.open(folder.parent, _ENTER & ~os.O_NOFOLLOW)
            try:
                _flush_folder(handle)
            finally:
                os.close(handle)


def _flush_folder(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot, and then keep their folders by other means.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _walk(handle: int, place: str, start: str, depth: int) -> Iterator[tuple[str, os.stat_result]]:
    """Lists the regular files of a folder and of those inside it by name, in name order."""
    if depth > _MOST_DEPTH:
        raise OSError(errno.ENAMETOOLONG, f"it is nested more than {_MOST_DEPTH} deep")
    with os.scandir(handle) as found:
        entries = sorted((e for e in found if e.name.startswith(start)), key=lambda e: e.name)
    for entry in entries:
        # What vanishes meanwhile, or has become a link, is passed over.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            state = os.stat(entry.name, dir_fd=handle, follow_symlinks=False)
            if stat.S_ISREG(state.st_mode):
                yield place + entry.name, state
            elif stat.S_ISDIR(state.st_mode):
                below = os.open(entry.name, _ENTER, dir_fd=handle)
                try:
                    yield from _walk(below, f"{place}{entry.name}/", "", depth + 1)
                finally:
                    os.close(below)


# -- folders for people ----------------------------------------------------------------------------


def check_target(
    to: str | Path, flag: str, what: str, find_own: Callable[[Path], set[str]]
) -> Path:
    """Check before any work that a report or an export may be written to a folder; return it.

    Args:
        flag: The argument that names it.
        what: The kind of content.
        find_own: From the folder to the files of an earlier one, which will be replaced.

    Raises:
        ConfigError: It is not a folder, or holds other files.
        StoreError: It cannot be read.
    """
    if "://" in str(to):
        raise ConfigError(f"{flag} = '{to}': must be a folder; copy the {what} from there")
    folder = Path(to).expanduser().absolute()
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{flag} = '{to}': is a file; give another folder")
        foreign = _list_files(folder) - find_own(folder)
    except OSError as error:
        raise StoreError(f"{flag} = '{to}': cannot be read: {error.strerror}") from None
    if foreign:
        raise ConfigError(
            f"{flag} = '{to}': holds '{min(foreign)}', which is of no earlier {what}; give another "
            "folder"
        )
    return folder


def _list_files(folder: Path) -> set[str]:
    """List all files and links below a folder; links are not followed."""
    return {
        (Path(place) / name).relative_to(folder).as_posix()
        for place, folders, names in os.walk(folder)
        for name in [*names, *(name for name in folders if (Path(place) / name).is_symlink())]
    }


def write_target(
    folder: Path, files: Mapping[str, bytes], flag: str = "", stale: Iterable[str] = ()
) -> None:
    """Write files into a folder: all aside and flushed first, then each into place, in order.

    Args:
        flag: The argument that names the folder.
        stale: Files of an earlier content, which are removed last.

    Raises:
        StoreError: They cannot be written; a new folder is not left behind.
    """
    aside, is_new = None, False
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".parts-", dir=folder))
        for name, data in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (aside / name).replace(folder / name)
        for name in set(stale) - set(files):
            (folder / name).unlink(missing_ok=True)
        is_new = False
    except OSError as error:
        named = f"{flag} = '{folder}'" if flag else f"'{folder}'"
        raise StoreError(f"{named}: cannot be written: {error.strerror}") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _digest_of(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _version_of(state: os.stat_result) -> str:
    return f"{state.st_ino}-{state.st_mtime_ns}-{state.st_size}"


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
