"""The archive of a user's files that goes to a cluster with a job.

`find_files` lists a folder under the ignore rules: `.gitignore` and `.rayignore` in it, below it
and, inside a git repository, above it, read as git reads them. Version control, virtual
environments, caches, results and common credential files (`.env`, `.ssh`) are always left out.
Links are followed. A file that vanishes meanwhile is not sent.

`choose_files` picks from these: code, TOML, data by suffix, files beside the modules of a package
and files that git tracks. It leaves out hidden files, links out of the folder, other kinds, and
files that look like secrets by name or contents, unless they are included by name.

Equal files make equal bytes, so a cluster that already has an archive is not sent it again.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath

from pathspec import GitIgnoreSpec

from gbp_ray.errors import ConfigError

__all__ = [
    "MOST_BYTES",
    "SECRET",
    "Package",
    "choose_files",
    "describe_left_out",
    "find_files",
    "find_secret",
    "holds_credentials",
    "is_secret_name",
    "is_secret_variable",
    "pack_files",
]

MOST_BYTES = 100 * 2**20 - 1
"""Largest archive that the head of a Ray cluster takes (DASHBOARD_CLIENT_MAX_SIZE)."""

_IGNORE_FILES = (".gitignore", ".rayignore")

_ALWAYS_OUT = GitIgnoreSpec.from_lines(
    (
        *(".git", ".hg", ".svn", ".DS_Store"),
        *(".venv", "venv", "node_modules", "*.egg-info", ".tox", ".nox", ".eggs"),
        *("__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".ipynb_checkpoints"),
        *("gbp-results", "gbp-report"),
        *(".env", ".env.*", ".netrc", ".aws", ".ssh"),
    )
)

SECRET = "that look like secrets"
_HIDDEN, _LINK, _OTHER = "hidden", "linked from elsewhere", "neither code nor data"
"""Reasons to leave a file out."""

_CODE = (".py", ".pyi", ".toml")

_SUFFIXES = {
    *(*_CODE, ".ipynb", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".sh"),
    *(".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".txt", ".md", ".xml", ".ini", ".cfg"),
    *(".j2", ".html", ".parquet", ".arrow", ".feather", ".npy", ".npz", ".mat", ".h5", ".hdf5"),
    *(".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors", ".onnx", ".pkl", ".pickle", ".model"),
    *(".vocab", ".merges", ".bpe", ".gz", ".zip", ".xz", ".bz2", ".zst", ".tar", ".tgz", ".png"),
    *(".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".wav", ".flac", ".mp3"),
}


_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time of a zip file
_NUM_SHOWN = 3
_LEAVE_OUT = "it would go to the cluster; leave it out by a line in .rayignore"
_VANISHED = (FileNotFoundError, NotADirectoryError)
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Package:
    """A zip archive, and the uncompressed size of each file in it."""

    data: bytes
    sizes: dict[str, int]

    def largest(self) -> str:
        """Names the largest files with their sizes."""
        return _name_largest(self.sizes)


def find_files(folder: Path) -> dict[str, Path]:
    """Lists the files of a folder that no rule ignores, by their relative names."""
    rules = _rules_above(folder)
    if rules and _is_ignored(folder, rules, is_folder=True):
        # A folder that git ignores was given on purpose.
        rules = []
    found = {}
    try:
        for path in _walk(folder, folder, rules, ()):
            found[path.relative_to(folder).as_posix()] = path
    except OSError as error:
        raise ConfigError(
            f"'{error.filename}': cannot be read: {error.strerror}; {_LEAVE_OUT}"
        ) from None
    return dict(sorted(found.items()))


def choose_files(
    folder: Path, include: Iterable[str] = ()
) -> tuple[dict[str, Path], dict[str, str]]:
    """Chooses the files of a folder that go with a job.

    A file named in `include` always goes; a folder goes without files that look like secrets.

    Returns the chosen files and the reason for each one left out; neither holds ignored files.

    Raises:
        ConfigError: The folder cannot be read, lacks an included name, or has a secret in its code.
    """
    files, folders = find_files(folder), []
    named: set[str] = set()
    for text in include:
        path = folder / text
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        if name.startswith("../") or not path.exists():
            raise ConfigError(f"--include '{text}': there is no such file or folder in '{folder}'")
        if path.is_dir():
            folders.append("" if name == "." else f"{name}/")
            files |= {f"{folders[-1]}{below}": found for below, found in find_files(path).items()}
        else:
            named.add(name)
            files[name] = path
    tracked = _tracked_by_git(folder)
    chosen, left = {}, {}
    for name, path in sorted(files.items()):
        is_included = name.startswith(tuple(folders))
        why = None
        if name not in named:
            why = _why_not(folder, name, path, is_included, is_included or name in tracked)
        if why is None:
            chosen[name] = path
        else:
            left[name] = why
    return chosen, left


def _why_not(folder: Path, name: str, path: Path, is_included: bool, is_known: bool) -> str | None:
    """Returns the reason to leave a file out, or None."""
    place, own = folder.resolve(), path.resolve()
    names: list[PurePath] = [PurePosixPath(name)]
    is_inside = own.is_relative_to(place)
    names.append(own.relative_to(place) if is_inside else own)
    if any(is_secret_name(one) for one in names):
        return SECRET
    if not is_inside and not is_included:
        return _LINK
    if any(part.startswith(".") for part in names[0].parts) and not is_included:
        return _HIDDEN
    suffix, is_beside_code = path.suffix.lower(), (path.parent / "__init__.py").is_file()
    if suffix not in _SUFFIXES and not is_beside_code and not is_known:
        return _OTHER
    try:
        with path.open("rb") as file:
            # Binary files hold tensors or images.
            start = file.read(_CHUNK_BYTES)
            is_text = b"\0" not in start or start[:2] in (b"\xff\xfe", b"\xfe\xff")
            content = start + file.read(MOST_BYTES) if is_text else b""
    except OSError:
        return None  # `pack_files` reports it
    if (found := find_secret(content)) is None:
        return None
    if suffix in _CODE:
        line, kind = found
        raise ConfigError(
            f"'{path}': line {line} holds what looks like {kind}, and would go to the cluster; "
            f"take it out, leave the file out by a line in .rayignore, or give --include '{name}'"
        )
    return SECRET


def _tracked_by_git(folder: Path) -> set[str]:
    """Lists the files that git tracks below a folder; none without git or a repository."""
    try:
        done = subprocess.run(
            # A repository's configuration must not make git start programs.
            ["git", "-c", "core.fsmonitor=false", "ls-files", "-z"],
            cwd=folder,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}


def pack_files(
    files: Mapping[str, Path], extra: Mapping[str, bytes], most_bytes: int = MOST_BYTES
) -> Package:
    """Packs files, and contents in `extra` that replace files of the same name, into one archive.

    Raises:
        ConfigError: A file cannot be read, or the archive is too large.
    """
    buffer = io.BytesIO()
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted({*files, *extra}):
            source = extra[name] if name in extra else files[name]
            size = _add(archive, name, source, lambda: buffer.tell() > most_bytes)
            if size is not None:
                sizes[name] = size
            if buffer.tell() > most_bytes:
                break
    # The archive's directory counts as well.
    if len(buffer.getvalue()) > most_bytes:
        for name in files.keys() - sizes:
            with suppress(OSError):
                sizes[name] = files[name].stat().st_size
        raise ConfigError(
            f"the folder of the job holds more than a Ray cluster takes, {most_bytes / 1e6:.0f} MB "
            f"({_name_largest(sizes)}); list in .rayignore what the code does not need, and put "
            "data on s3:// or in a folder that all nodes have"
        )
    return Package(buffer.getvalue(), sizes)


def _add(
    archive: zipfile.ZipFile, name: str, source: bytes | Path, is_full: Callable[[], bool]
) -> int | None:
    """Adds a file, until the archive is full; returns the file's size, or None if it vanished."""
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    if isinstance(source, bytes):
        entry.external_attr = (stat.S_IFREG | 0o644) << 16
        archive.writestr(entry, source)
        return len(source)
    try:
        state = source.stat()
        entry.external_attr = (stat.S_IFREG | (state.st_mode & 0o755)) << 16
        with source.open("rb") as file, archive.open(entry, "w", force_zip64=True) as target:
            while chunk := file.read(_CHUNK_BYTES):
                target.write(chunk)
                if is_full():
                    break
    except _VANISHED:
        return None
    except OSError as error:
        raise ConfigError(f"'{source}': cannot be read: {error.strerror}; {_LEAVE_OUT}") from None
    return state.st_size


def describe_left_out(left: Mapping[str, str]) -> str:
    """Lists the files left out in one line, by reason; "" if there are none."""
    groups: dict[str, list[str]] = {}
    for name, why in left.items():
        groups.setdefault(why, []).append(name)
    parts = []
    for why, names in groups.items():
        shown = ", ".join(names[:_NUM_SHOWN]) + ", ..." * (len(names) > _NUM_SHOWN)
        parts.append(f"{len(names)} {why} ({shown})")
    return f"left out: {'; '.join(parts)}; --include PATH sends one" if parts else ""


def _name_largest(sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_NUM_SHOWN]
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in largest)


Rule = tuple[Path, GitIgnoreSpec]
"""A folder and the patterns ignored below it."""


def _walk(top: Path, folder: Path, rules: list[Rule], above: tuple[object, ...]) -> Iterator[Path]:
    try:
        state = folder.stat()
        entries = sorted(folder.iterdir())
    except _VANISHED:
        if folder == top:
            raise
        return
    identity = state.st_dev, state.st_ino
    # A link to a folder above would never end.
    if identity in above or (folder != top and _holds_no_code(folder)):
        return
    rules = rules + _rules_in(folder)
    for path in entries:
        is_folder = path.is_dir()
        name = path.relative_to(top).as_posix()
        if _ALWAYS_OUT.match_file(name) or _is_ignored(path, rules, is_folder):
            continue
        if is_folder:
            yield from _walk(top, path, rules, (*above, identity))
        elif path.is_file():
            yield path


def _holds_no_code(folder: Path) -> bool:
    """Recognizes a virtual environment, or a job's results by the claim in them."""
    if (folder / "pyvenv.cfg").exists():
        return True
    try:
        claim = json.loads((folder / "job.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(claim, dict) and {"schema_version", "factory", "sha256"} <= claim.keys()


def _is_ignored(path: Path, rules: list[Rule], is_folder: bool) -> bool:
    for base, spec in reversed(rules):  # the nearest rule decides
        name = path.relative_to(base).as_posix() + "/" * is_folder
        if (verdict := spec.check_file(name).include) is not None:
            return verdict
    return False


def _rules_in(folder: Path) -> list[Rule]:
    rules = []
    for name in _IGNORE_FILES:
        try:
            lines = (folder / name).read_text(errors="replace").splitlines()
        except OSError:
            continue
        rules.append((folder, GitIgnoreSpec.from_lines(lines)))
    return rules


def _rules_above(folder: Path) -> list[Rule]:
    """Reads the rules above a folder inside its git repository."""
    rules: list[Rule] = []
    for parent in folder.parents if not (folder / ".git").exists() else ():
        rules = _rules_in(parent) + rules
        if (parent / ".git").exists():
            return rules
    return []


_NAMES = (
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12"),
    *("*.p8", "*.der", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.asc", "*.ovpn"),
    *(".env", ".env.*"),
    *("*.env", "credentials", "credentials.*", "*credentials*.json", "*.credentials"),
    *("client_secret*", "*service?account*.json", "secret", "secrets", "secret.*", "secrets.*"),
    *("*.secret", "*.secrets", "*secrets.y*ml", "*secrets.json", "*secrets.toml", "*password*"),
    *("*passwd*", ".git-credentials", ".npmrc", ".pypirc", ".netrc", "_netrc", ".pgpass"),
    *(".my.cnf", ".s3cfg", ".boto", ".dockercfg", "kubeconfig*", "*.tfstate", "*.tfstate.*"),
    *("*.tfvars", "token", "token.*", "*_token", "*.token", "tokens.*", "*_history", "core"),
    *("core.[0-9]*", "*.core", "*.dmp"),
)

_FOLDERS = {
    *(".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kaggle", ".kube"),
    *(".ray", ".ssh", ".terraform"),
}

_CODE_SUFFIXES = (".py", ".pyi")

_KINDS = {
    "a private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,})",
    "a token of GitLab": r"\bglpat-[\w-]{16,}",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of Slack": r"\bxox[abeoprs]-[\w-]{10,}",
    "an API key": r"\b(?:sk-(?:proj-|ant-\w+-|live-)?[A-Za-z0-9]{20,}|[sr]k_(?:live|test)_\w{10,}"
    r"|AIza[\w-]{35})",
    "a web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
}

_CONTENT = re.compile(
    "|".join(f"(?P<k{n}>{pattern})" for n, pattern in enumerate(_KINDS.values())).encode()
)

_CREDENTIALS = re.compile(
    r"://[^/\s@]*@|-----BEGIN|\b(?:AKIA|ASIA|ghp_|hf_|sk-)\w{12}"
    r"|(?:password|passwd|pwd|secret|token|accountkey|accesskey|signature|api_?key)\s*[=:]\s*\S",
    re.IGNORECASE,
)

_RUN = re.compile(r"[A-Za-z0-9+]{20,}")

_PARTS = {
    *("SECRET", "SECRETS", "TOKEN", "TOKENS", "PASS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"),
    *("KEY", "KEYS", "AUTH", "COOKIE", "JWT", "STRIPE", "DSN", "BEARER", "PWD", "PAT", "SAS"),
}

_ENDINGS = (
    *("PASSWORD", "PASSWD", "SECRET", "TOKEN", "APIKEY", "ACCESSKEY", "SECRETKEY", "PASSPHRASE"),
    *("CONNECTIONSTRING",),
)

_PLACES = {"PWD", "OLDPWD"}
"""Variables that every shell sets to a folder."""


def is_secret_name(name: PurePath) -> bool:
    """Recognizes a secret by the name of its file or of a folder above it."""
    if _FOLDERS & {part.lower() for part in name.parts[:-1]}:
        return True
    # A module about secrets is not one; its contents are searched instead.
    own = name.name.lower()
    return not own.endswith(_CODE_SUFFIXES) and any(fnmatchcase(own, pattern) for pattern in _NAMES)


def find_secret(content: bytes) -> tuple[int, str] | None:
    """Returns (line, kind) of the first text that looks like a secret, or None."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content = content.decode("utf-16", errors="replace").encode()
    found = _CONTENT.search(content)
    if found is None or found.lastgroup is None:
        return None
    kind = list(_KINDS)[int(found.lastgroup[1:])]
    return content.count(b"\n", 0, found.start()) + 1, kind


def holds_credentials(value: str) -> bool:
    """Recognizes credentials of a known form in a value, such as an address."""
    return bool(_CREDENTIALS.search(value)) or find_secret(value.encode()) is not None


def is_secret_variable(name: str, value: str) -> bool:
    """Recognizes a secret by the name or the value of an environment variable."""
    parts = name.upper().split("_")
    if name not in _PLACES and (
        _PARTS & set(parts)
        or any(part.endswith(_ENDINGS) for part in parts)
        or {"CONNECTION", "STRING"} <= set(parts)
    ):
        return True
    return holds_credentials(value) or any(_is_random(run) for run in _RUN.findall(value))


def _is_random(run: str) -> bool:
    """Recognizes a token by its mixture of many letters and digits."""
    num_digits = sum(character.isdigit() for character in run)
    return num_digits >= 3 and len(run) - num_digits >= 3 and len(set(run)) >= 10
