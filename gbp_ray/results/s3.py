"""Objects on S3 and what speaks its language: AWS, Ceph, MinIO, R2.

boto3 does the work: it signs, retries what may pass with backoff (eight attempts, or
AWS_MAX_ATTEMPTS), and sends large objects in parts, in parallel. Decided here is what it leaves
open: that a body cut short is read again, that a conditional write whose answer was lost is told
from one that came second, and which bucket and permission a refusal is about.

Checksums are our own (SHA-256 in the records), so boto3's trailing ones, which older servers
refuse, are left out.

Old Ceph compares ETags without their quotes, which shows when it refuses a write although nothing
has changed. Where a server knows no conditional writes (it answers 501, or the preflight catches it
ignoring the condition), a claim is written, left alone for a second and read back: the last of
several writers wins, and the others see that they lost.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    UnauthorizedSSOTokenError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError

from gbp_ray.config.address import S3Address
from gbp_ray.errors import StoreError, TransientStoreError
from gbp_ray.results.objects import Entry, Leftover, Objects, check_key, is_key

__all__ = [
    "S3Objects",
]

_ATTEMPTS = 8
_PART_BYTES = 8 * 2**20
_SETTLE_S = 1.0


# A body that broke off; boto3 retries requests, but hands the body to us.
_BROKEN_OFF = (IncompleteReadError, ResponseStreamingError, ReadTimeoutError, HTTPClientError)

_PASSING = (
    BotoConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,
    RetriesExceededError,
)

_ACTIONS = {
    "PutObject": "s3:PutObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}


@functools.cache
def _descriptions() -> Any:
    """Keeps what botocore reads of its services: to read it anew takes 0.15 s for each client.

    Each session notes boto3's own folder in it once more, a hundred bytes.
    """
    return botocore.session.get_session().get_component("data_loader")


class S3Objects(Objects):
    """Objects below a prefix of a bucket."""

    num_reads = 8
    num_threads = 16

    def __init__(self, address: S3Address, client: Any) -> None:
        self._address, self._client = address, client
        self._is_conditional, self._is_etag_md5, self._is_etag_quoted = True, True, True
        self._transfer = TransferConfig(
            multipart_threshold=2 * _PART_BYTES,
            multipart_chunksize=_PART_BYTES,
            max_concurrency=8,
            num_download_attempts=_ATTEMPTS,
        )

    @classmethod
    def open(cls, uri: str) -> S3Objects:
        """Opens an address; asks the network nothing.

        Raises:
            StoreError: The address is malformed.
        """
        try:
            address = S3Address.parse(uri)
        except ValueError as error:
            shown = "" if "credentials" in str(error) else f" = '{uri}'"
            raise StoreError(f"storage{shown}: {error}") from None
        retries: dict[str, Any] = {"mode": "standard"}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            retries["total_max_attempts"] = _ATTEMPTS
        config = Config(
            retries=retries,
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=2 * cls.num_threads,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Buckets of Ceph and MinIO have no host names of their own.
            s3={"addressing_style": "path"} if _has_own_endpoint(address) else None,
        )
        try:
            # A session of its own, since credentials may have changed since the last one.
            session = botocore.session.get_session()
            session.register_component("data_loader", _descriptions())
            client = boto3.session.Session(botocore_session=session).client(
                "s3",
                endpoint_url=address.endpoint,
                region_name=address.region or None,
                config=config,
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"storage = '{uri}': {_first_line(error)}") from None
        return cls(address, client)

    def uri_of(self, key: str = "") -> str:
        """Return the address, with its endpoint unless the environment sets it."""
        return str(self._address.child(key))

    def child(self, name: str) -> S3Objects:
        """Opens a prefix below."""
        return S3Objects(self._address.child(name), self._client)

    def parent(self) -> tuple[S3Objects, str] | None:
        """Opens the prefix above; None at the bucket."""
        above, _, name = self._address.prefix.rpartition("/")
        if not name:
            return None
        return S3Objects(dataclasses.replace(self._address, prefix=above), self._client), name

    def get(self, key: str) -> bytes | None:
        """Reads an object, or None where there is none."""
        found = self.get_version(key)
        return None if found is None else found[0]

    def get_version(self, key: str) -> tuple[bytes, str, float] | None:
        """Reads an object with its ETag, again where the body breaks off or is garbled."""
        previous = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                _pause(attempt)
            with self._explained(key):
                try:
                    answer = self._client.get_object(**self._place(key))
                    if answer["ContentLength"] <= self._transfer.multipart_threshold:
                        data = answer["Body"].read()
                    else:
                        answer["Body"].close()
                        data = self._download(key)
                except ClientError as error:
                    if _code(error) in ("NoSuchKey", "404"):
                        return None
                    raise
                except _BROKEN_OFF:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
            if not (self._is_etag_md5 and _is_garbled(data, answer["ETag"])):
                break
            # Garbled on the way, unless this server makes its ETags of something else.
            if data == previous and len(data) == self._size_of(key):
                self._is_etag_md5 = False
                break
            previous = data
        return data, answer["ETag"], _age_s(answer, answer["LastModified"])

    def exists(self, key: str) -> bool:
        """Check whether there is such an object, without reading it."""
        with self._explained(key):
            try:
                self._ask("head_object", **self._place(key))
            except ClientError as error:
                if _code(error) in ("NoSuchKey", "404"):
                    return False
                raise
            return True

    def put(self, key: str, data: bytes) -> None:
        """Writes an object, a large one in parts."""
        with self._explained(key):
            if len(data) > self._transfer.multipart_threshold:
                # Aborts the upload when it fails; one that is killed is left for `gc`.
                body = io.BytesIO(data)
                self._ask("upload_fileobj", Fileobj=body, **self._place(key), Config=self._transfer)
            else:
                self._put(key, data)

    def put_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Writes on a condition that the server holds, or settles where it holds none."""
        is_other_style_tried = False
        with self._explained(key):
            # 409: another conditional write was under way; its outcome decides ours.
            for _ in range(_ATTEMPTS if self._is_conditional else 0):
                try:
                    return self._put(key, data, **self._condition(version))
                except ClientError as error:
                    if _code(error) == "NotImplemented" or _status(error) == 501:
                        self._is_conditional = False
                        break
                    if _status(error) not in (404, 409, 412) or _code(error) == "NoSuchBucket":
                        raise
                    found = self.get_version(key)
                    if found is not None and found[0] == data:
                        # Ours: the answer was lost on the way, and boto3 asked again.
                        return found[1]
                    if found is not None and found[1] == version and not is_other_style_tried:
                        # Refused although nothing changed: this server wants ETags without quotes.
                        is_other_style_tried = True
                        self._is_etag_quoted = not self._is_etag_quoted
                    elif _status(error) != 409:
                        return None
            if self._is_conditional:
                return None
            return self._put_and_settle(key, data, version)

    def put_new(self, key: str, data: bytes, twin: str = "") -> bool:
        """Writes on condition that the name is free; where no server holds one, none is taken.

        Large objects go up in parts, for which some servers hold no condition: a small object takes
        the name first, and whoever wrote that is the only one to write there.
        """
        is_large = len(data) > self._transfer.multipart_threshold
        mark = b"taken by %s\n" % uuid.uuid4().hex.encode() if is_large else data
        if not self._is_conditional or self.put_if(key, mark, None) is None:
            return False
        if is_large:
            self.put(key, data)
        return True

    def flush(self, folders: Iterable[str]) -> None:
        """Do nothing: what a server has acknowledged is durable."""

    def delete(self, keys: Iterable[str]) -> None:
        """Removes objects, many at a time."""
        # One by one: servers differ in the checksum that they want for a batch.
        with ThreadPoolExecutor(self.num_threads) as pool:
            for _ in pool.map(self._delete, keys):
                pass

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Lists objects, a thousand in a request."""
        for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                age_s = _age_s(page, item["LastModified"])
                yield Entry(self._relative(item["Key"]), item["Size"], age_s)

    def list_folders(self, prefix: str = "") -> list[str]:
        """Lists the prefixes directly below one, a thousand in a request."""
        names = (
            self._relative(item["Prefix"]).removeprefix(prefix).removesuffix("/")
            for page in self._pages(prefix, Delimiter="/")
            for item in page.get("CommonPrefixes", ())
        )
        return [name for name in names if is_key(name)]

    def find_leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """Finds uploads in parts that have neither ended nor been given up."""
        place = {"Bucket": self._address.bucket, "Prefix": self._absolute(prefix)}
        following: dict[str, str] = {}
        while True:
            with self._explained(prefix):
                page = self._ask("list_multipart_uploads", **place, **following)
            for item in page.get("Uploads", ()):
                key, token = self._relative(item["Key"]), item["UploadId"]
                num_bytes = 0
                # It may have ended in the meantime.
                with contextlib.suppress(ClientError):
                    parts = self._ask("list_parts", **self._place(key), UploadId=token)
                    num_bytes = sum(part["Size"] for part in parts.get("Parts", ()))
                yield Leftover(key, num_bytes, _age_s(page, item["Initiated"]), token)
            if not page.get("IsTruncated"):
                return
            following = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def discard(self, leftover: Leftover) -> None:
        """Gives an upload up."""
        with self._explained(leftover.key):
            try:
                self._client.abort_multipart_upload(
                    **self._place(leftover.key), UploadId=leftover.token
                )
            except ClientError as error:
                if _code(error) != "NoSuchUpload":
                    raise

    def preflight(self) -> None:
        """Writes, claims, reads and removes a probe, and learns whether conditions hold here."""
        key, data = f".probe-{uuid.uuid4().hex}", b"gbp-ray looks whether it can write here\n"
        if self.put_if(key, data, None) is None:
            raise StoreError(f"storage: '{self.uri_of(key)}' was there before it was written")
        try:
            if self._is_conditional and self.put_if(key, data + b"again\n", None) is not None:
                # The server took the condition and ignored it.
                self._is_conditional = False
                self.put(key, data)
            if self.get(key) != data:
                raise StoreError(
                    f"storage: '{self.uri_of(key)}' does not read back as it was written; is this "
                    "a cache? Give the storage's own endpoint"
                )
        except BaseException:
            with contextlib.suppress(StoreError):
                self.delete([key])
            raise
        self.delete([key])

    def _condition(self, version: str | None) -> dict[str, str]:
        if version is None:
            return {"IfNoneMatch": "*"}
        return {"IfMatch": version if self._is_etag_quoted else version.strip('"')}

    def _put(self, key: str, data: bytes, **condition: str) -> str:
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        answer = self._ask(
            "put_object",
            **self._place(key),
            Body=data,
            # A server that gets less than was sent refuses it.
            ContentMD5=base64.b64encode(md5).decode(),
            **condition,
        )
        return answer["ETag"]

    def _put_and_settle(self, key: str, data: bytes, version: str | None) -> str | None:
        found = self.get_version(key)
        if (None if found is None else found[1]) != version:
            return None
        self._put(key, data)
        time.sleep(_SETTLE_S)
        settled = self.get_version(key)
        return settled[1] if settled is not None and settled[0] == data else None

    def _download(self, key: str) -> bytes:
        buffer = io.BytesIO()
        self._client.download_fileobj(**self._place(key), Fileobj=buffer, Config=self._transfer)
        return buffer.getvalue()

    def _size_of(self, key: str) -> int:
        with self._explained(key):
            return int(self._ask("head_object", **self._place(key))["ContentLength"])

    def _delete(self, key: str) -> None:
        with self._explained(key):
            self._ask("delete_object", **self._place(key))

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        place = {"Bucket": self._address.bucket, "Prefix": self._absolute(prefix), **options}
        following: dict[str, str] = {}
        while True:
            with self._explained(prefix):
                page = self._ask("list_objects_v2", **place, **following)
            yield page
            if not page.get("IsTruncated"):
                return
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def _ask(self, operation: str, **parameters: Any) -> Any:
        """Makes a request, again if its answer breaks off in the middle of the XML."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                _pause(attempt)
            if isinstance(body := parameters.get("Fileobj"), io.BytesIO):
                body.seek(0)
            try:
                answer = getattr(self._client, operation)(**parameters)
            except ResponseParserError:
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            # An answer cut down to nothing reads like an empty listing, but for its heading.
            if operation != "list_objects_v2" or "Name" in answer:
                return answer
        raise TransientStoreError(f"storage: '{self.uri_of()}': {operation} kept breaking off")

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self._address.bucket, "Key": self._absolute(check_key(key))}

    def _absolute(self, key: str) -> str:
        return f"{self._address.prefix}/{key}" if self._address.prefix else key

    def _relative(self, key: str) -> str:
        return key.removeprefix(f"{self._address.prefix}/") if self._address.prefix else key

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise self._explain(error, key) from error
        except (
            NoCredentialsError,
            PartialCredentialsError,
            CredentialRetrievalError,
            UnauthorizedSSOTokenError,
        ) as error:
            raise StoreError(
                f"storage: '{self.uri_of(key)}' needs credentials and none were found; set "
                "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except (*_PASSING, Boto3Error) as error:
            raise TransientStoreError(
                f"storage: '{self.uri_of(key)}': the server did not answer, or broke off, "
                f"{os.environ.get('AWS_MAX_ATTEMPTS', _ATTEMPTS)} times "
                f"({type(error).__name__}); check the endpoint (AWS_ENDPOINT_URL), and run the "
                "same command again to go on"
            ) from error
        except BotoCoreError as error:
            raise StoreError(f"storage: '{self.uri_of(key)}': {_first_line(error)}") from error

    def _explain(self, error: ClientError, key: str) -> StoreError:
        """Words what a server refused. Its own words are left out: some repeat the access key."""
        code, status, operation = _code(error), _status(error), error.operation_name
        place, bucket = f"storage: '{self.uri_of(key)}'", self._address.bucket
        if code == "NoSuchBucket":
            return StoreError(
                f"{place}: there is no bucket '{bucket}' on this server; create it, or mend the "
                "name or the endpoint (AWS_ENDPOINT_URL)"
            )
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return StoreError(
                f"{place}: the server refuses the credentials ({code}); mend AWS_PROFILE, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or get new ones"
            )
        if code == "AccessDenied" or status in (401, 403):
            action = _ACTIONS.get(operation, operation)
            on = f"arn:aws:s3:::{bucket}"
            if action not in ("s3:ListBucket", "s3:ListBucketMultipartUploads"):
                on = f"{on}/{self._absolute(key)}"
            # Without the right to list, AWS calls what does not exist forbidden.
            more = f", and s3:ListBucket on arn:aws:s3:::{bucket}" if "Get" in action else ""
            return StoreError(
                f"{place}: the server refuses {operation} ({code}); the credentials need {action} "
                f"on {on}{more}"
            )
        if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"):
            return StoreError(
                f"{place}: bucket '{bucket}' is in another region; set AWS_DEFAULT_REGION to its "
                "own"
            )
        if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "BadDigest"):
            return TransientStoreError(
                f"{place}: the server kept failing at {operation} ({code}); run the same command "
                "again to go on"
            )
        return StoreError(
            f"{place}: the server refuses {operation} ({code}, HTTP {status}); check bucket, "
            "prefix and endpoint"
        )


def _pause(attempt: int) -> None:
    time.sleep(min(5.0, 0.1 * 2**attempt))


def _is_garbled(data: bytes, etag: str) -> bool:
    # The ETag of an object that went up in parts is of another kind.
    md5 = etag.strip('"')
    return "-" not in md5 and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5


def _has_own_endpoint(address: S3Address) -> bool:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return bool(address.endpoint or any(os.environ.get(name) for name in names))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _age_s(answer: dict[str, Any], moment: datetime) -> float:
    """Measures an age by the server's own clock; ours may be wrong."""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    return max(0.0, (now - moment).total_seconds())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
