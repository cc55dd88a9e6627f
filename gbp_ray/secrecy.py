"""Finds what looks like a secret: names of files, their contents, variables of the environment.

Only looks decide, so something harmless may be taken for one; whoever asks says how to send it all
the same. No secret is ever repeated: what is found is told by its kind.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePath

__all__ = ["find_secret", "holds_credentials", "is_secret_name", "is_secret_variable"]

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
_CODE = (".py", ".pyi")

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
    """Tells by the name of a file, and of the folders above it, whether it holds a secret."""
    if _FOLDERS & {part.lower() for part in name.parts[:-1]}:
        return True
    # A module that deals with secrets is none; what it says in its lines is looked at.
    own = name.name.lower()
    return not own.endswith(_CODE) and any(fnmatchcase(own, pattern) for pattern in _NAMES)


def find_secret(content: bytes) -> tuple[int, str] | None:
    """Finds what looks like a secret: (its line, its kind), or None."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content = content.decode("utf-16", errors="replace").encode()
    found = _CONTENT.search(content)
    if found is None or found.lastgroup is None:
        return None
    kind = list(_KINDS)[int(found.lastgroup[1:])]
    return content.count(b"\n", 0, found.start()) + 1, kind


def holds_credentials(value: str) -> bool:
    """Tells whether a value, such as an address, holds credentials of a known form."""
    return bool(_CREDENTIALS.search(value)) or find_secret(value.encode()) is not None


def is_secret_variable(name: str, value: str) -> bool:
    """Tells by name and value whether a variable of the environment holds a secret."""
    parts = name.upper().split("_")
    if name not in _PLACES and (
        _PARTS & set(parts)
        or any(part.endswith(_ENDINGS) for part in parts)
        or {"CONNECTION", "STRING"} <= set(parts)
    ):
        return True
    return holds_credentials(value) or any(_is_random(run) for run in _RUN.findall(value))


def _is_random(run: str) -> bool:
    """Tells a token from words: many letters among many digits."""
    num_digits = sum(character.isdigit() for character in run)
    return num_digits >= 3 and len(run) - num_digits >= 3 and len(set(run)) >= 10
