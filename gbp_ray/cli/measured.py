"""What was measured of a dense and a pruned network beside each other: sizes, times of a pass."""

from __future__ import annotations

from collections.abc import Sequence

from gbp_ray.cli.tables import make_table
from gbp_ray.cli.terminal import console, say, warnings_in_lines
from gbp_ray.errors import GbpError
from gbp_ray.results.measurements import (
    DENSE,
    PRUNED,
    LatencyRecord,
    MeasurementsRecord,
    latency_rows,
    size_rows,
    speed_sentence,
    write_time,
)

__all__ = ["print_beside", "print_measurements"]


def print_measurements(measured: MeasurementsRecord) -> None:
    """Prints times and sizes of an export, and how they were measured."""
    headings, rows = latency_rows(measured)
    console().print(make_table(rows, headings[:1], headings[1:]))
    console().print(make_table(size_rows(measured.networks), [""], list(measured.networks)))
    say(
        f"milliseconds of a pass: {_how_timed(measured.latency, measured.versions)}",
        speed_sentence(measured),
        *(f"not measured: {text}" for text in measured.left_out),
    )


_FAIR = 0.8
"""Share of the saved multiply-adds that shows in time where widths suit the kernels."""


def print_beside(uri: str, trusted: Sequence[str], round_to: int) -> None:
    """Measures the pruned network of a finished trial beside the dense one, and prints it.

    Args:
        trusted: Code that the user's own job names.
        round_to: What its widths are multiples of.
    """
    # torch takes seconds to import; --help and a mistyped option should not.
    from gbp_ray.export.beside import compare_with_dense

    try:
        with warnings_in_lines():
            found = compare_with_dense(uri, trust_code=trusted)
    except GbpError as error:
        # The trial is done and kept; its data may lie where only its workers are.
        say(f"latency: not measured here: {error}")
        return
    sizes = [found.sizes[name] for name in (DENSE, PRUNED)]
    costs = (
        ("parameters", [size.parameters for size in sizes]),
        ("multiply-adds", [size.macs for size in sizes]),
        ("bytes", [size.num_bytes for size in sizes]),
    )
    rows: list[tuple[str, ...]] = [
        (name, f"{dense:,}", f"{pruned:,}", f"{dense / pruned:.2f}")
        for name, (dense, pruned) in costs
        if dense and pruned
    ]
    ratios = []
    by_size: dict[int, dict[str, LatencyRecord]] = {}
    for record in found.latency:
        by_size.setdefault(record.batch_size, {})[record.network] = record
    for size, pair in by_size.items():
        ratios.append(pair[DENSE].median_ms / pair[PRUNED].median_ms)
        times = (write_time(pair[name]) for name in (DENSE, PRUNED))
        rows.append((f"latency, batch {size}, ms", *times, f"{ratios[-1]:.2f}"))
    say("")
    console().print(make_table(rows, [""], [DENSE, PRUNED, f"{DENSE} / {PRUNED}"]))
    if found.latency:
        say(f"latency in eager PyTorch: {_how_timed(found.latency, found.versions)}")
        if round_to == 1 and max(ratios) < _FAIR * sizes[0].macs / max(sizes[1].macs, 1):
            say(
                "time fell less than multiply-adds: kernels compute channels in blocks, so try "
                "--set prune.round_to=8, or 16, where the target can be met with such widths"
            )
    for size in found.too_long:
        say(
            f"latency, batch {size}: not measured, as it would take long; gbp-ray export {uri} DIR "
            "--measure does"
        )
    if found.fault:
        say(f"removed units are zeros in the pruned network: {found.fault}")


def _how_timed(latency: Sequence[LatencyRecord], versions: dict[str, str]) -> str:
    first = latency[0]
    return (
        f"median (10th to 90th percentile) of up to {max(i.repetitions for i in latency)}, "
        f"networks in turn; {first.device}, {first.threads} "
        f"{'thread' if first.threads == 1 else 'threads'}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}"
    )
