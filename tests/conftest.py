"""Storages that the tests share: a folder, moto's server, and a real server where there is one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from shell import Shell

# The tests start a hundred processes; where bytecode is not kept, each compiles the whole package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
# Kernels then add in one order, and two cores serve two processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test wants two, a thread that waits sleeps.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray's workers give way to everything else, and its tests, which take longest, would wait.
os.environ.setdefault("RAY_worker_niceness", "0")
logging.getLogger("werkzeug").setLevel(logging.ERROR)
# Other processes share the cores, so a time limit would fail tests by chance.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
# Ranks are forked from a server that imports this once. It silently leaves out what it cannot
# import, and it looks for installed modules alone: a test's own would be left out.
multiprocessing.set_forkserver_preload(
    [
        *("gbp_ray.runtime.single", "gbp_ray.runtime.trial", "gbp_ray.workloads", "torch._dynamo"),
        # What torch.export imports at its first use.
        *("torch.export._trace", "torch._functorch.partitioners"),
        "torch._functorch._aot_autograd.graph_compile",
    ]
)


def pytest_configure(config: pytest.Config) -> None:
    # Else pytest-xdist begins with the files of most tests and leaves those of Ray to the end.
    config.option.loadscopereorder = False


def pytest_itemcollected(item: pytest.Item) -> None:
    """Deals the tests to processes: those that start Ray to one, of the others whole files."""
    # Here, since xdist may read the groups before another hook sees all tests together.
    item.add_marker(pytest.mark.xdist_group("ray" if _starts_ray(item) else item.path.name))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start Ray wait a lot and take longest, so they come first."""
    items.sort(key=lambda item: not _starts_ray(item))


def _starts_ray(item: pytest.Item) -> bool:
    return item.get_closest_marker("ray") is not None


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs commands in this process."""
    # Imported here, as it needs what is not beside a GPU.
    from shell import Shell

    return Shell(monkeypatch, capsys)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every import of Ray fail, and of what imports it, although other tests have done so."""
    # The one module of its package that a search needs where no Ray is.
    spared = "gbp_ray.runtime.on_ray.optuna"
    blocked = ("ray.", "gbp_ray.runtime.on_ray.")
    for name in ["ray", *sys.modules]:
        if name == "ray" or (name.startswith(blocked) and name != spared):
            monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the time of drawing where a test is of all else in a report."""
    monkeypatch.setattr("gbp_ray.report.drawing.render", lambda draw, salt: ("<svg></svg>", b""))


@pytest.fixture
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the seconds of timing where a test is not of the times."""
    monkeypatch.setattr("gbp_ray.training.latency._MOST", 7)


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """Starts moto's S3 server in this process, with a bucket `gbp`; gives host:port."""
    # Imported here: tests of the core run where there is neither, beside a GPU for one.
    import boto3
    import botocore.utils
    from moto import backends
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    # It looks through the folder of its own code at each request.
    services = list(backends.list_of_moto_modules())
    patch.setattr(backends, "list_of_moto_modules", lambda: services)
    # Server and client parse each time in a listing by a parser of any format.
    anyhow = botocore.utils._parse_timestamp_with_tzinfo
    patch.setattr(botocore.utils, "_parse_timestamp_with_tzinfo", partial(_parse_time, anyhow))
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="gbp")
    yield f"{host}:{port}"
    server.stop()
    patch.undo()


def _parse_time(anyhow: Callable[..., datetime], value: Any, tzinfo: Callable[[], Any]) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return anyhow(value, tzinfo)


@pytest.fixture
def moto_storage(moto_endpoint: str) -> str:
    """An empty place on moto's server."""
    return f"s3://gbp/{uuid.uuid4().hex}?endpoint_override={moto_endpoint}&scheme=http"


@pytest.fixture
def real_storage() -> str:
    """An empty place on the server that GBP_RAY_S3_ENDPOINT names, in its bucket `gbp`."""
    endpoint = os.environ.get("GBP_RAY_S3_ENDPOINT")
    if endpoint is None:
        pytest.skip("GBP_RAY_S3_ENDPOINT names no S3 server with a bucket 'gbp'")
    scheme, _, place = endpoint.rpartition("://")
    return f"s3://gbp/{uuid.uuid4().hex}?endpoint_override={place}&scheme={scheme or 'http'}"


@pytest.fixture(params=["folder", "moto", "real"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage of each kind."""
    if request.param == "folder":
        return str(tmp_path / "results")
    return str(request.getfixturevalue(f"{request.param}_storage"))


@pytest.fixture(params=["moto", "real"])
def s3_storage(request: pytest.FixtureRequest) -> str:
    """An empty storage on each kind of S3 server."""
    return str(request.getfixturevalue(f"{request.param}_storage"))
