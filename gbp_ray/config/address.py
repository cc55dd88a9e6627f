"""Addresses on object stores, in one spelling for jobs, commands and workload data.

    s3://bucket/prefix
    s3://bucket/prefix?endpoint_override=host:port&scheme=http&region=us-east-1

The options are pyarrow's, so an address serves a workload's data and results alike. Without
`endpoint_override` the endpoint is that of AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, or AWS's own.
Credentials come only from the environment; an address that holds any is refused without repeating
it, because addresses are kept in records and logs.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

__all__ = ["S3Address", "names_user"]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_OPTIONS = ("endpoint_override", "scheme", "region")
_SECRETS = ("access_key", "secret_key", "session_token")


@dataclass(frozen=True)
class S3Address:
    """A prefix in a bucket, and the server that holds it.

    Attributes:
        prefix: Without slashes at the ends; may be empty.
        endpoint_override: "host:port" of the server, or "" for the environment's choice.
        scheme: "http" or "https", for the override.
        region: "" leaves it to the environment.
    """

    bucket: str
    prefix: str = ""
    endpoint_override: str = ""
    scheme: str = "https"
    region: str = ""

    @classmethod
    def parse(cls, text: str) -> S3Address:
        """Parses an address.

        Raises:
            ValueError: It is invalid, or holds credentials, which the message does not repeat.
        """
        parts = urlsplit(text)
        if names_user(text):
            raise ValueError(_NO_CREDENTIALS)
        if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.fragment:
            raise ValueError(
                "must read s3://bucket/prefix, with a bucket of 3 to 255 letters, digits, '.', '_' "
                "and '-'"
            )
        options: dict[str, str] = {}
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name in _SECRETS or "@" in value:
                raise ValueError(_NO_CREDENTIALS)
            if name not in _OPTIONS:
                raise ValueError(f"?{name}: no such option (allowed: {', '.join(_OPTIONS)})")
            options[name] = value
        # Other tools take a whole URL as endpoint.
        if (override := options.get("endpoint_override", "")).startswith(("http://", "https://")):
            scheme, _, rest = override.partition("://")
            options |= {"endpoint_override": rest.rstrip("/"), "scheme": scheme}
        if options.get("scheme", "https") not in ("http", "https"):
            raise ValueError(f"?scheme={options['scheme']}: not allowed (allowed: http, https)")
        prefix = "/".join(part for part in unquote(parts.path).split("/") if part)
        if {".", ".."} & set(prefix.split("/")):
            raise ValueError("must not hold '.' or '..'; give the whole prefix")
        if not prefix.isprintable() or "\\" in prefix:
            raise ValueError("must not hold a backslash or what cannot be printed")
        return cls(parts.netloc, prefix, **options)

    @property
    def endpoint(self) -> str | None:
        """Returns the server's URL, or None where the environment decides."""
        return f"{self.scheme}://{self.endpoint_override}" if self.endpoint_override else None

    def child(self, path: str) -> S3Address:
        """Returns the address of a path below this one."""
        prefix = "/".join(part for part in (self.prefix, path) if part)
        return dataclasses.replace(self, prefix=prefix)

    def __str__(self) -> str:
        options = {"endpoint_override": self.endpoint_override, "region": self.region}
        if self.endpoint_override and self.scheme != "https":
            options["scheme"] = self.scheme
        query = urlencode({name: value for name, value in options.items() if value}, safe=":/")
        path = f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket
        return f"s3://{path}?{query}" if query else f"s3://{path}"


_NO_CREDENTIALS = (
    "holds credentials; give them in the environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY)"
)


def names_user(address: str) -> bool:
    """Checks whether an address, scheme://..., holds a user's name or a secret."""
    rest = address.partition("://")[2]
    server = rest.partition("/")[0]
    # A secret may hold a slash, and then seems to be part of the path.
    return "@" in server or (":" in server and "@" in rest)
