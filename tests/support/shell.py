"""Commands as a user types them, run in this process, where nothing is imported twice."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

import pytest

from gbp_ray.cli import app


class Outcome(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *arguments: str) -> Outcome:
        self._capture.readouterr()
        self._patch.setattr(sys, "argv", ["gbp-ray", *arguments])
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            # What stops a command is not to stop the tests.
            patch.setattr(app, "watch", lambda: None)
            try:
                app.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else -1
        return Outcome(code, *self._capture.readouterr())

    def json(self, *arguments: str, code: int = 0) -> Any:
        found, out, errors = self(*arguments, "--json")
        assert found == code, errors
        return json.loads(out)

    def refusal(self, *arguments: str, code: int = 2) -> str:
        found, out, errors = self(*arguments)
        assert (found, out) == (code, "")
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        return errors
