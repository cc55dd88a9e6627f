"""Bytes by name: the same answers from a folder, from moto's server and from a real one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from gbp_ray.config.address import S3Address
from gbp_ray.errors import StoreError, TransientStoreError
from gbp_ray.results.objects import Objects
from gbp_ray.results.s3 import S3Objects
from gbp_ray.results.store import open_objects


@pytest.fixture
def objects(storage: str) -> Objects:
    return open_objects(storage).child("try")


def client_of(storage: str) -> tuple[Any, S3Address]:
    """A client of our own, to look behind the scenes."""
    address = S3Address.parse(storage)
    return boto3.client("s3", endpoint_url=address.endpoint, region_name="us-east-1"), address


# -- the interface ---------------------------------------------------------------------------------


def test_what_is_put_is_got_until_it_is_deleted(objects: Objects) -> None:
    assert objects.get("a/b.bin") is None
    assert not objects.exists("a/b.bin")
    for data in (b"one", b"", bytes(range(256)) * 40):
        objects.put("a/b.bin", data)
        assert objects.get("a/b.bin") == data
        assert objects.exists("a/b.bin")
    objects.delete(["a/b.bin", "a/never-there"])
    assert objects.get("a/b.bin") is None
    assert list(objects.entries()) == []
    assert objects.list_folders() == []


def test_listings_name_objects_and_folders(objects: Objects) -> None:
    sizes = {"job.json": 1, "trials/a b/x": 2, "trials/c+ü/x": 3, "trials/c+ü/y/z": 4, "tri": 0}
    for key, size in sizes.items():
        objects.put(key, b"x" * size)
    assert {entry.key: entry.num_bytes for entry in objects.entries()} == sizes
    assert {entry.key for entry in objects.entries("trials/c")} == {
        "trials/c+ü/x",
        "trials/c+ü/y/z",
    }
    assert {entry.key for entry in objects.entries("tri")} == set(sizes) - {"job.json"}
    assert all(0 <= entry.age_s < 60 for entry in objects.entries())
    assert objects.list_folders() == ["trials"]
    assert objects.list_folders("trials/") == ["a b", "c+ü"]
    assert objects.list_folders("nothing/") == []
    below = objects.child("trials/c+ü")
    assert {entry.key for entry in below.entries()} == {"x", "y/z"}
    place = below.parent()
    assert place is not None
    assert (place[0].uri_of(), place[1]) == (objects.uri_of("trials"), "c+ü")


def test_a_uri_opens_what_it_names(objects: Objects) -> None:
    objects.put("trials/t/trial.json", b"here")
    assert open_objects(objects.uri_of("trials")).get("t/trial.json") == b"here"


def test_a_conditional_write_needs_the_version_it_saw(objects: Objects) -> None:
    first = objects.put_if("mark", b"one", None)
    assert first is not None
    assert objects.put_if("mark", b"two", None) is None
    second = objects.put_if("mark", b"two", first)
    assert second is not None
    assert objects.put_if("mark", b"three", first) is None
    found = objects.get_version("mark")
    assert found is not None
    assert found[:2] == (b"two", second)
    assert found[2] < 60
    objects.delete(["mark"])
    assert objects.put_if("mark", b"four", second) is None
    assert objects.put_if("mark", b"five", None) is not None


def test_of_many_claims_one_succeeds(objects: Objects) -> None:
    start = threading.Barrier(8)

    def claim(number: int) -> bool:
        start.wait()
        return objects.put_if("job.json", b"%d" % number, None) is not None

    with ThreadPoolExecutor(8) as pool:
        won = [number for number, is_won in enumerate(pool.map(claim, range(8))) if is_won]
    assert len(won) == 1
    assert objects.get("job.json") == b"%d" % won[0]


def test_of_many_replacements_none_is_lost(objects: Objects) -> None:
    # Each adds its number on condition that nobody else did since it looked.
    objects.put("job.json", b"the folder is claimed")
    objects.put("sum", b"0 by nobody")

    def add(number: int) -> None:
        for _ in range(99):
            found = objects.get_version("sum")
            assert found is not None
            # Two that write the same bytes could not be told apart, and need not.
            total = b"%d by %d" % (int(found[0].split()[0]) + number, number)
            if objects.put_if("sum", total, found[1]) is not None:
                return
        pytest.fail("a hundred writes in a row were refused")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(1, 13)))
    assert (objects.get("sum") or b"").split()[0] == b"%d" % sum(range(1, 13))


def test_a_preflight_leaves_nothing(objects: Objects) -> None:
    objects.preflight()
    assert list(objects.entries()) == []


# -- large objects ---------------------------------------------------------------------------------


def test_large_objects_go_up_in_parts_and_come_back_whole(s3_storage: str) -> None:
    objects = open_objects(s3_storage)
    data = os.urandom(2**20) * 20 + b"tail"
    objects.put("large", data)
    client, address = client_of(s3_storage)
    head = client.head_object(Bucket=address.bucket, Key=f"{address.prefix}/large")
    assert head["ETag"].strip('"').endswith("-3"), "it went up whole"
    assert objects.get("large") == data


def test_an_upload_that_fails_leaves_nothing(s3_storage: str) -> None:
    objects = open_objects(s3_storage)
    assert isinstance(objects, S3Objects)
    send = objects._client._make_api_call

    def fail(operation: str, parameters: Any) -> Any:
        if operation == "UploadPart" and parameters["PartNumber"] == 2:
            answer = {
                "Error": {"Code": "AccessDenied"},
                "ResponseMetadata": {"HTTPStatusCode": 403},
            }
            raise ClientError(answer, operation)
        return send(operation, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects._client, "_make_api_call", fail)
        text = refusal(lambda: objects.put("large", b"x" * 20 * 2**20))
    assert "need s3:PutObject on arn:aws:s3:::gbp/" in text
    assert objects.get("large") is None
    assert list(objects.find_leftovers()) == []


def test_the_upload_of_a_killed_writer_is_found_and_discarded(s3_storage: str) -> None:
    client, address = client_of(s3_storage)
    key = f"{address.prefix}/try/large"
    begun = client.create_multipart_upload(Bucket=address.bucket, Key=key)
    client.upload_part(
        Bucket=address.bucket, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 99
    )
    objects = open_objects(s3_storage)
    assert list(objects.child("other").find_leftovers()) == []
    (leftover,) = objects.child("try").find_leftovers("la")
    assert (leftover.key, leftover.num_bytes) == ("large", 99)
    objects.child("try").discard(leftover)
    objects.child("try").discard(leftover)
    assert list(objects.find_leftovers()) == []


# -- what may be wrong -----------------------------------------------------------------------------


def refusal(action: Any, kind: type[StoreError] = StoreError) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert "secret" not in text
    return text


def test_a_missing_bucket_is_named(moto_endpoint: str) -> None:
    objects = open_objects(f"s3://no-such-bucket/x?endpoint_override={moto_endpoint}&scheme=http")
    for action in (
        objects.preflight,
        lambda: objects.get("a"),
        lambda: objects.put("a", b"x"),
        lambda: objects.put_if("a", b"x", None),
        lambda: list(objects.entries()),
        lambda: list(objects.find_leftovers()),
        lambda: objects.delete(["a"]),
    ):
        assert "there is no bucket 'no-such-bucket'" in refusal(action)


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    objects = open_objects("s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http")
    text = refusal(objects.preflight, TransientStoreError)
    assert "did not answer" in text
    assert "127.0.0.1:9" in text


def test_missing_credentials_are_named(
    monkeypatch: pytest.MonkeyPatch, moto_endpoint: str, tmp_path: Any
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    objects = open_objects(f"s3://gbp/x?endpoint_override={moto_endpoint}&scheme=http")
    assert "needs credentials" in refusal(objects.preflight)


def test_wrong_credentials_are_named(real_storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-and-wrong")
    assert "refuses the credentials" in refusal(open_objects(real_storage).preflight)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-secret")
    assert "refuses the credentials" in refusal(open_objects(real_storage).preflight)


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://b",
        "s3:///x",
        "s3://bucket/../x",
        "s3://bucket/x#y",
        "s3://bucket/x?scheme=ftp",
        "s3://bucket/x?colour=red",
        "s3://key:secret@bucket/x",
        "s3://bucket/x?secret_key=secret",
        "s3://bucket/x?endpoint_override=user:secret@host",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_a_secret(text: str) -> None:
    refusal(lambda: open_objects(text))


def test_an_address_reads_back_as_written() -> None:
    for text in (
        "s3://bucket",
        "s3://bucket/a/b",
        "s3://bucket/a?endpoint_override=host:9000&scheme=http",
        "s3://bucket/a?endpoint_override=host&region=eu-west-1",
    ):
        assert str(S3Address.parse(text)) == text
    whole = S3Address.parse("s3://bucket//a/?endpoint_override=http://host:9000/")
    assert whole.endpoint == "http://host:9000"
    assert str(whole) == "s3://bucket/a?endpoint_override=host:9000&scheme=http"


def test_the_endpoint_comes_from_the_environment(
    moto_storage: str, moto_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = moto_storage.partition("?")[0]
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, f"http://{moto_endpoint}")
        open_objects(plain).put(name, b"x")
        monkeypatch.delenv(name)
        assert open_objects(moto_storage).get(name) == b"x"


# -- servers without conditional writes ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["answers 501", "ignores the condition"])
def test_without_conditional_writes_of_many_claims_one_succeeds(
    moto_storage: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("gbp_ray.results.s3._SETTLE_S", 0.5)
    claimants = [open_objects(moto_storage) for _ in range(4)]
    for claimant in claimants:
        assert isinstance(claimant, S3Objects)

        call = claimant._client._make_api_call

        def weaken(operation: str, parameters: Any, call: Any = call) -> Any:
            is_asked = parameters.pop("IfNoneMatch", None) or parameters.pop("IfMatch", None)
            if is_asked and kind == "answers 501":
                answer = {
                    "Error": {"Code": "NotImplemented"},
                    "ResponseMetadata": {"HTTPStatusCode": 501},
                }
                raise ClientError(answer, operation)
            return call(operation, parameters)

        monkeypatch.setattr(claimant._client, "_make_api_call", weaken)
        claimant.preflight()
    start = threading.Barrier(len(claimants))

    def claim(number: int) -> bool:
        start.wait()
        return claimants[number].put_if("mark", b"%d" % number, None) is not None

    with ThreadPoolExecutor(len(claimants)) as pool:
        won = [number for number, is_won in enumerate(pool.map(claim, range(4))) if is_won]
    assert len(won) == 1
    assert claimants[0].get("mark") == b"%d" % won[0]
