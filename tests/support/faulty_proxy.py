"""A proxy between a client and an S3 server that spoils a share of the requests, by a seed."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = (
    "500",
    "503",
    "500 after the work was done",
    "cut before",
    "cut after the work was done",
    "answer cut short",
    "answer shortened",
    "request cut short",
    "delay",
)


class FaultyProxy:
    """Listens on a free port of loopback while the block runs.

    Args:
        upstream: host:port of the server.
        share: Of the requests, how many go wrong.
        seed: Decides which, and how.

    Attributes:
        endpoint: host:port of the proxy.
        seen: Requests by what was done to them; "" for nothing.
    """

    def __init__(self, upstream: str, share: float = 0.2, seed: int = 0) -> None:
        self.seen: Counter[str] = Counter()
        draws, lock = random.Random(seed), threading.Lock()
        proxy = self

        def draw_fault() -> str:
            with lock:
                fault = draws.choice(FAULTS) if draws.random() < share else ""
                proxy.seen[fault] += 1
                return fault

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body of an answer go out separately; together they would wait for each other.
            disable_nagle_algorithm = True

            def log_message(self, *arguments: Any) -> None:
                pass

            def relay(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = draw_fault()
                if fault == "delay":
                    time.sleep(0.3)
                if fault in ("500", "503"):
                    self.answer(int(fault), {}, b"<html>no</html>")
                elif fault == "cut before":
                    self.hang_up()
                elif fault == "request cut short":
                    self.forward_half(body)
                    self.hang_up()
                else:
                    self.pass_on(body, fault)

            def pass_on(self, body: bytes, fault: str) -> None:
                connection = http.client.HTTPConnection(upstream, timeout=60)
                connection.putrequest(self.command, self.path, True, True)
                for name, value in self.headers.items():
                    if name.lower() not in ("expect", "connection"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                data = answer.read()
                headers = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("connection", "transfer-encoding", "content-length")
                }
                connection.close()
                size = answer.headers.get("Content-Length", str(len(data)))
                if self.command == "HEAD":
                    headers["Content-Length"] = size
                if fault == "500 after the work was done":
                    self.answer(500, {}, b"")
                elif fault == "cut after the work was done":
                    self.hang_up()
                elif fault == "answer shortened":
                    self.answer(answer.status, headers, data[: len(data) // 2])
                else:
                    half = len(data) // 2 if fault == "answer cut short" else None
                    self.answer(answer.status, headers, data, half)
                    if half is not None:
                        self.hang_up()

            def answer(
                self, status: int, headers: dict[str, str], data: bytes, half: int | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers and status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data[:half])

            def forward_half(self, body: bytes) -> None:
                host, _, port = upstream.partition(":")
                with socket.create_connection((host, int(port))) as connection:
                    lines = [f"{self.command} {self.path} HTTP/1.1"]
                    lines += [f"{n}: {v}" for n, v in self.headers.items() if n != "Expect"]
                    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
                    connection.sendall(head + body[: len(body) // 2])

            def hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = relay

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
