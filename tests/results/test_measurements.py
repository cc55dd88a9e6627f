"""What is said of measured times and sizes: ratios of what is in the table, and no more."""

from __future__ import annotations

from gbp_ray.results.measurements import (
    LatencyRecord,
    MachineRecord,
    MeasurementsRecord,
    NetworkRecord,
    latency_rows,
    ratios_of,
    size_rows,
    speed_sentence,
)


def latency(network: str, engine: str, size: int, median: float) -> LatencyRecord:
    return LatencyRecord(
        network=network,
        engine=engine,
        device="cpu (chip)",
        threads=1,
        batch_size=size,
        median_ms=median,
        low_ms=0.9 * median,
        high_ms=1.5 * median,
        repetitions=20,
    )


def network(number: int, stored: int, nonzero: int, **files: int) -> NetworkRecord:
    return NetworkRecord(
        round=number,
        num_parameters=stored,
        num_nonzero=nonzero,
        macs=10 * stored,
        macs_nonzero=10 * nonzero,
        file_bytes=files,
        forward_bytes={1: 64, 32: 2048},
    )


def measured(stored: int = 1000) -> MeasurementsRecord:
    return MeasurementsRecord(
        date="2026-11-30",
        machine=MachineRecord(processor="chip", num_cores=2, system="Linux"),
        versions={"torch": "2"},
        networks={
            "dense": network(0, 1000, 1000, program=5000),
            "pruned": network(3, stored, 100, program=4000, more=7),
        },
        latency=(
            latency("dense", "eager", 1, 3.0),
            latency("pruned", "eager", 1, 2.0),
            latency("dense", "onnxruntime", 32, 10.0),
            latency("pruned", "onnxruntime", 32, 10.1),
        ),
    )


def test_ratios_and_rows_are_of_medians() -> None:
    record = measured()
    assert ratios_of(record.latency) == {("eager", 1): 1.5, ("onnxruntime", 32): 10 / 10.1}
    headings, rows = latency_rows(record)
    assert headings == ["engine", "batch", "dense, ms", "pruned, ms", "dense / pruned"]
    assert rows == [
        ("eager", "1", "3 (2.7 to 4.5)", "2 (1.8 to 3)", "1.50"),
        ("onnxruntime", "32", "10 (9 to 15)", "10.1 (9.09 to 15.1)", "0.99"),
    ]
    assert MeasurementsRecord.model_validate_json(record.model_dump_json()) == record


def test_a_network_that_was_not_timed_has_no_ratio() -> None:
    record = measured()
    some = record.model_copy(update={"latency": record.latency[:3]})
    assert ratios_of(some.latency) == {("eager", 1): 1.5}
    assert latency_rows(some)[1][1] == ("onnxruntime", "32", "10 (9 to 15)", "", "")


def test_zeros_are_never_called_faster() -> None:
    text = speed_sentence(measured())
    assert text.startswith("Zeros do not make it faster")
    assert "1.50 (eager, batch 1), 0.99 (onnxruntime, batch 32)" in text
    smaller = measured(stored=400)
    assert speed_sentence(smaller) == (
        "The dense network takes this many times as long as the pruned one: "
        "1.50 (eager, batch 1), 0.99 (onnxruntime, batch 32)."
    )


def test_sizes_are_listed_for_each_network() -> None:
    rows = {title: cells for title, *cells in size_rows(measured().networks)}
    assert rows["parameters stored"] == ["1,000", "1,000"]
    assert rows["parameters that are not zero"] == ["1,000", "100"]
    assert rows["multiply-adds without zeros"] == ["10,000", "1,000"]
    assert rows["program, bytes"] == ["5,000", "4,000"]
    assert rows["more, bytes"] == ["", "7"]
    assert rows["memory of a pass, batch 32, bytes"] == ["2,048", "2,048"]
    uncounted = measured().networks["dense"].model_copy(update={"macs": 0})
    assert not [title for title, _ in size_rows({"dense": uncounted}) if "multiply" in title]
