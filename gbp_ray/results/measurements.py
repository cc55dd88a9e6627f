"""Measured speed and size of a dense and a pruned network: records, and tables of them.

    measurements.json    beside an exported network; read without torch

Times are medians of many passes, with the 10th and the 90th percentile as their range. All networks
of one engine and batch size were timed in turn, so that whatever else the machine did meets all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

__all__ = [
    "CSR",
    "DENSE",
    "PRUNED",
    "LatencyRecord",
    "MachineRecord",
    "MeasurementsRecord",
    "NetworkRecord",
    "latency_rows",
    "ratios_of",
    "size_rows",
    "speed_sentence",
    "write_time",
]

CSR = "csr"
DENSE = "dense"
PRUNED = "pruned"


class _Record(BaseModel):
    # "ignore": a reader of today opens the records of a later version that added fields.
    model_config = ConfigDict(frozen=True, extra="ignore")


class LatencyRecord(_Record):
    """The time that one pass of a network takes, in milliseconds.

    Attributes:
        network: The name it was timed under, such as "dense" or "pruned".
        engine: "eager" (PyTorch) or "onnxruntime".
        device: Its kind and name, such as "cpu (AMD EPYC)".
        threads: Of the engine, for one pass.
        low_ms: The 10th percentile of all passes.
        high_ms: The 90th.
        repetitions: Timed passes.
    """

    network: str
    engine: str
    device: str
    threads: int
    batch_size: int
    median_ms: float
    low_ms: float
    high_ms: float
    repetitions: int


class MachineRecord(_Record):
    """The machine that times were taken on.

    Attributes:
        processor: Its model.
        num_cores: Those that the process may use.
        system: The operating system.
    """

    processor: str
    num_cores: int
    system: str


class NetworkRecord(_Record):
    """The size of a network.

    Attributes:
        round: Of the trial.
        num_parameters: All that are stored, zeros among them.
        num_nonzero: Those that are not zero.
        macs: Multiply-adds of one example that are computed, most with zeros; 0 where not counted.
        macs_nonzero: Without zeros, in theory.
        file_bytes: Size of each file, whether written or made for the comparison.
        forward_bytes: By batch size, the most bytes of tensors that a pass in eager PyTorch holds
            at once beyond weights and inputs.
    """

    round: int
    num_parameters: int
    num_nonzero: int
    macs: int
    macs_nonzero: int
    file_bytes: dict[str, int]
    forward_bytes: dict[int, int]


class MeasurementsRecord(_Record):
    """All that was measured for one export.

    Attributes:
        date: UTC, as YYYY-MM-DD.
        networks: By name, dense first.
        left_out: What was not measured and why, a sentence part each.
    """

    date: str
    machine: MachineRecord
    versions: dict[str, str]
    networks: dict[str, NetworkRecord]
    latency: tuple[LatencyRecord, ...]
    left_out: tuple[str, ...] = ()

    @property
    def is_smaller(self) -> bool:
        """Whether the pruned network stores fewer parameters, not only zeros."""
        dense, pruned = self.networks[DENSE], self.networks[PRUNED]
        return pruned.num_parameters < dense.num_parameters


_Key = tuple[str, int]


def _medians(latency: Sequence[LatencyRecord]) -> dict[_Key, dict[str, LatencyRecord]]:
    found: dict[_Key, dict[str, LatencyRecord]] = {}
    for record in latency:
        found.setdefault((record.engine, record.batch_size), {})[record.network] = record
    return found


def ratios_of(latency: Sequence[LatencyRecord], network: str = PRUNED) -> dict[_Key, float]:
    """Computes by engine and batch size how many times as long the dense network takes."""
    return {
        key: by_name[DENSE].median_ms / by_name[network].median_ms
        for key, by_name in _medians(latency).items()
        if DENSE in by_name and network in by_name
    }


def latency_rows(record: MeasurementsRecord) -> tuple[list[str], list[tuple[str, ...]]]:
    """Lists times by engine and batch size, with the ratio of each network to dense.

    Returns:
        The headings, and the cells of each row.
    """
    names = list(dict.fromkeys(item.network for item in record.latency))
    others = [name for name in names if name != DENSE]
    headings = ["engine", "batch", *(f"{name}, ms" for name in names)]
    headings += [f"dense / {name}" for name in others]
    rows = []
    for key, by_name in _medians(record.latency).items():
        times = [write_time(by_name[name]) if name in by_name else "" for name in names]
        ratios = [ratios_of(record.latency, name).get(key) for name in others]
        shown = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append((key[0], str(key[1]), *times, *shown))
    return headings, rows


def write_time(record: LatencyRecord) -> str:
    """Writes the median of a time with its range."""
    low, high = record.low_ms, record.high_ms
    return f"{record.median_ms:.3g} ({low:.3g} to {high:.3g})"


def size_rows(networks: Mapping[str, NetworkRecord]) -> list[tuple[str, ...]]:
    """Lists sizes, a row for each kind and a cell for each network."""
    records = list(networks.values())

    def row(title: str, values: Sequence[int | None]) -> tuple[str, ...]:
        return title, *("" if value is None else f"{value:,}" for value in values)

    rows = [
        row("parameters stored", [r.num_parameters for r in records]),
        row("parameters that are not zero", [r.num_nonzero for r in records]),
    ]
    if all(r.macs for r in records):
        rows.append(row("multiply-adds computed", [r.macs for r in records]))
        rows.append(row("multiply-adds without zeros", [r.macs_nonzero for r in records]))
    for file in dict.fromkeys(file for r in records for file in r.file_bytes):
        rows.append(row(f"{file}, bytes", [r.file_bytes.get(file) for r in records]))
    for size in dict.fromkeys(size for r in records for size in r.forward_bytes):
        title = f"memory of a pass, batch {size}, bytes"
        rows.append(row(title, [r.forward_bytes.get(size) for r in records]))
    return rows


def speed_sentence(record: MeasurementsRecord) -> str:
    """Says what the times mean: nothing that was not measured, and no gain from zeros."""
    listed = _list_ratios(record.latency, PRUNED)
    sparse = _list_ratios(record.latency, CSR)
    if sparse:
        sparse = f" With CSR layers, which compute without zeros, dense / csr: {sparse}."
    if record.is_smaller:
        return (
            f"The dense network takes this many times as long as the pruned one: {listed}.{sparse}"
        )
    return (
        "Zeros do not make it faster: engines compute with them as with any other number, so "
        "dense and pruned network run the same kernels on the same shapes. Measured, dense / "
        f"pruned: {listed}; what differs from 1 is noise of the machine.{sparse}"
    )


def _list_ratios(latency: Sequence[LatencyRecord], network: str) -> str:
    return ", ".join(
        f"{ratio:.2f} ({engine}, batch {size})"
        for (engine, size), ratio in ratios_of(latency, network).items()
    )
