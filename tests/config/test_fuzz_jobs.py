"""Job files, overrides and checkpoints that are damaged anyhow: read, or refused in one line.

GBP_RAY_FUZZ is the number of inputs of each kind, 200 unless it is set.
"""

from __future__ import annotations

import io
import json
import os
import random
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from gbp_ray.config.job import describe_fields, expand, load_job, trial_id
from gbp_ray.config.schema import find_idle_options
from gbp_ray.config.workload import TransferConfig
from gbp_ray.errors import GbpError, printable
from gbp_ray.workloads.weights import start_from

NUM_INPUTS = int(os.environ.get("GBP_RAY_FUZZ", "200"))
MOST_SECONDS = 20.0  # far more than any takes, on a machine that does much else

ROOT = Path(__file__).resolve().parents[2]
JOBS = [path.read_bytes() for path in sorted(ROOT.glob("jobs/**/*.toml"))]
JOBS.append((ROOT / "gbp_ray" / "workloads" / "digits.toml").read_bytes())

VALUES = [
    *("nan", "-inf", "1e400", "-0.0", "-1", "0", "1", "0.5", "1e308", "5e-324", "9" * 5000),
    *("0x" + "f" * 5000, str(10**18), str(2**63), "true", '""', '"."', '"\\u0000"', '" "', "'[/]'"),
    *("[]", "{}", "[[1]]", "[0, 1e9]", "{a = 1}", "{ linear = [0, 1], num = 9 }", "1979-05-27"),
    *("{ log = [5e-324, 1e308], num = 3 }", "{ choice = [[1], {}] }", "[" * 300 + "]" * 300),
    *("s3://a:b@c", "s3://bucket?x", "file://", "\udcff", "\x1b[31m", "\u202e", "n:m", "3:999999"),
    *("a" * 3000, "{a." + "a." * 2000 + "a=1}", "'''\n'''", "a:b", "obd", "cosine", "pgd", "fsdp"),
]
BYTES = [value.encode("utf-8", "surrogateescape") for value in VALUES]
BYTES += [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\n[sweep]\n",
    b"[sweep.space]\n",
    b"\n[",
    b"=",
    b".",
]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Changes some places: other bytes, pieces left out, moved, said again, cut off."""
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((0, 1, 4, 16, 200)))
        piece = content[start:end]
        other = draw.choice((draw.choice(BYTES), draw.randbytes(len(piece)), piece * 2, b""))
        content = content[:start] + other + content[end:]
        if draw.random() < 0.05:
            content = content[: draw.randrange(len(content) + 1)]
    return content


def replaced_value(content: bytes, draw: random.Random) -> bytes:
    """Gives a line of a job file another value."""
    lines = content.split(b"\n")
    number = draw.choice([n for n, line in enumerate(lines) if b"=" in line])
    lines[number] = lines[number].partition(b"=")[0] + b"= " + draw.choice(BYTES)
    return b"\n".join(lines)


def assert_read_or_refused(read: Callable[[], object], what: str) -> None:
    start = time.monotonic()
    try:
        read()
    except GbpError as error:
        text = str(error)
        assert 0 < len(text) <= 1500, what
        assert printable(text) == text, what
    except BaseException as error:
        raise AssertionError(f"{what} gave {type(error).__name__}: {error!s:.300}") from error
    assert time.monotonic() - start < MOST_SECONDS, what


def test_damaged_job_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"

    def read() -> None:
        job = load_job(path)
        trial_id(job)
        find_idle_options(job)
        job.model_dump_json()
        # As large as it may be, it takes its time.
        if job.sweep.num_samples < 100 and "num" not in str(job.sweep.space):
            expand(job)

    for seed in range(NUM_INPUTS):
        draw = random.Random(f"job {seed}")
        change = draw.choice((damaged, replaced_value))
        path.write_bytes(change(draw.choice(JOBS), draw))
        assert_read_or_refused(read, f"job file {seed}")


def test_any_overrides_are_taken_or_refused() -> None:
    fields = [key for key, _, _ in describe_fields() if not key.startswith("[")]
    fields += [
        "workload.options.a",
        "sweep.space.seed",
        "prune.layer_min_sparsity.a",
        "",
        "a..b",
        "\0",
    ]
    for seed in range(NUM_INPUTS):
        draw = random.Random(f"override {seed}")
        overrides = [
            f"{draw.choice(fields)}={draw.choice(VALUES)}" for _ in range(draw.randint(1, 5))
        ]

        def read(overrides: list[str] = overrides) -> None:
            job = load_job(None, overrides)
            trial_id(job)
            find_idle_options(job)
            job.model_dump_json()

        assert_read_or_refused(read, f"overrides {seed}: {overrides!r:.300}")


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def pickled(value: object, *, is_zip: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def damaged_inside(content: bytes, draw: random.Random) -> bytes:
    """Damages one file of an archive, which else would be refused for its checksum."""
    whole, changed = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    chosen = draw.choice(["data.pkl", draw.choice(whole.namelist())])
    with zipfile.ZipFile(changed, "w") as archive:
        for name in whole.namelist():
            data = whole.read(name)
            archive.writestr(name, damaged(data, draw) if name.endswith(chosen) else data)
    return changed.getvalue()


def test_damaged_checkpoints_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = network().state_dict()
    nested = pickled({"model": {f"module.{n}": t for n, t in state.items()}, "epoch": 3})
    (tmp_path / "a.safetensors").write_bytes(save(state))
    index = json.dumps({"weight_map": dict.fromkeys(state, "a.safetensors")}).encode()
    seeds = {
        "plain.pt": (pickled(state), damaged),
        "inside.pt": (pickled(state), damaged_inside),
        "nested.ckpt": (nested, damaged_inside),
        "old.pth": (pickled(state, is_zip=False), damaged),
        "b.safetensors": (save(state), damaged),
        "b.safetensors.index.json": (index, damaged),
    }

    def read() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start_from(network, TransferConfig(checkpoint=name))()

    for seed in range(NUM_INPUTS):
        draw = random.Random(f"checkpoint {seed}")
        name = draw.choice(list(seeds))
        content, change = seeds[name]
        Path(name).write_bytes(change(content, draw))
        assert_read_or_refused(read, f"checkpoint {seed}, {name}")
    assert {path.name for path in tmp_path.iterdir()} <= {*seeds, "a.safetensors"}
