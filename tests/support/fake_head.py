"""A head that answers the Jobs API as Ray's does, without a cluster: for what a real one won't do.

It loses connections, takes no notice of a stop, runs another version, and forgets.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeJob:
    """A job of the fake head."""

    request: dict[str, Any]
    status: str = "RUNNING"
    code: int | None = None
    message: str = ""
    log: str = ""
    started: float = field(default_factory=time.time)
    num_deaf: int = 0
    """How many stops it does not hear."""

    def details(self) -> dict[str, Any]:
        return {
            "type": "SUBMISSION",
            "submission_id": self.request["submission_id"],
            "status": self.status,
            "entrypoint": self.request["entrypoint"],
            "message": self.message,
            "metadata": self.request["metadata"],
            "runtime_env": self.request["runtime_env"],
            "driver_exit_code": self.code,
            "start_time": int(self.started * 1000),
            "end_time": None,
        }


@dataclass
class FakeHead:
    """The head: what it answers may be changed at any time."""

    token: str | None = None
    ray_version: str = ""
    python_version: str = "3.11.7"
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    num_drops: int = 0
    """How many connections to a log it loses, each after another 50 characters."""
    num_without_agent: int = 0
    """How many submissions come too early for it."""
    num_asked: int = 0
    address: str = ""

    async def check_token(self, request: web.Request, handler: Any) -> Any:
        self.num_asked += 1
        if self.token is not None:
            given = request.headers.get("Authorization", "")
            if not given:
                text = "Unauthorized: Missing authentication token"
                return web.Response(status=401, text=text)
            if given != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.ray_version})

    async def metadata(self, request: web.Request) -> web.Response:
        found = {"rayVersion": self.ray_version, "pythonVersion": self.python_version}
        return web.json_response({"result": True, "data": found})

    async def package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        return web.Response(status=200 if name in self.packages else 404)

    async def submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if self.num_without_agent:
            self.num_without_agent -= 1
            text = "No available agent to submit job, please try again later."
            return web.Response(status=500, text=text)
        if name in self.jobs:
            text = f"ValueError: Job with submission_id {name} already exists."
            return web.Response(status=500, text=text)
        self.jobs[name] = FakeJob(asked)
        return web.json_response({"job_id": name, "submission_id": name})

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response([job.details() for job in self.jobs.values()])

    def _find(self, request: web.Request) -> FakeJob:
        name = request.match_info["job"]
        if name not in self.jobs:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return self.jobs[name]

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response(self._find(request).details())

    async def logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self._find(request).log})

    async def stop(self, request: web.Request) -> web.Response:
        job = self._find(request)
        job.num_deaf -= 1
        if job.num_deaf < 0:
            job.status = "STOPPED"
        return web.json_response({"stopped": True})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        job = self._find(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        num_sent = 0
        while True:
            piece = job.log[num_sent : num_sent + 20]
            if piece:
                await socket.send_str(piece)
                num_sent += len(piece)
            elif job.status in ("SUCCEEDED", "FAILED", "STOPPED"):
                return socket
            if self.num_drops and num_sent >= 50 * (4 - self.num_drops):
                self.num_drops -= 1
                assert request.transport is not None
                request.transport.abort()
                return socket
            await asyncio.sleep(0.01)


@contextmanager
def fake_head(**options: Any) -> Iterator[FakeHead]:
    """Runs a fake head on a free port of loopback."""
    head = FakeHead(**options)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        @web.middleware
        async def check(request: web.Request, handler: Any) -> Any:
            return await head.check_token(request, handler)

        app = web.Application(middlewares=[check], client_max_size=100 * 2**20)
        app.add_routes(
            [
                web.get("/api/version", head.version),
                web.get("/api/v0/cluster_metadata", head.metadata),
                web.get("/api/packages/gcs/{name}", head.package),
                web.put("/api/packages/gcs/{name}", head.package),
                web.post("/api/jobs/", head.submit),
                web.get("/api/jobs/", head.list),
                web.get("/api/jobs/{job}", head.info),
                web.get("/api/jobs/{job}/logs", head.logs),
                web.get("/api/jobs/{job}/logs/tail", head.tail),
                web.post("/api/jobs/{job}/stop", head.stop),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]
        head.address = f"http://127.0.0.1:{port}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield head
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
