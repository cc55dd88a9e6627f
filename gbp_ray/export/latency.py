"""measurements.json: speed and size of the dense and the pruned network, measured on this machine.

Both networks go through the same steps: the same examples, the same files made of them, the same
engines in turn. The dense network is round 0 of the same trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import nn

from gbp_ray.export.onnx import OnnxFile, open_session, runtime_version
from gbp_ray.results.measurements import MeasurementsRecord, NetworkRecord
from gbp_ray.results.records import RoundRecord
from gbp_ray.training.latency import (
    BATCH_SIZES,
    EAGER,
    describe_device,
    forward_bytes,
    measure_latency,
    read_machine,
)
from gbp_ray.workloads.call import Call

__all__ = [
    "Deliverable",
    "measure_networks",
]

ONNX_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Deliverable:
    """A network with the files made of it.

    Attributes:
        model: As it is run in eager PyTorch.
        record: Of its round.
        file_bytes: Size of each file by name.
        onnx: Its ONNX file; None where it has none.
        macs_saved: Multiply-adds with zeros that it leaves out.
        macs: Multiply-adds of one example, counted in it where whole units have left it; None: of
            its record.
    """

    model: nn.Module
    record: RoundRecord
    file_bytes: Mapping[str, int]
    onnx: OnnxFile | None = None
    macs_saved: int = 0
    macs: int | None = None


def measure_networks(
    networks: Mapping[str, Deliverable], call: Call, *, threads: int = 1
) -> MeasurementsRecord:
    """Measures networks against each other: eager, and in ONNX Runtime those with a file.

    Args:
        networks: By name, dense first.
        call: Examples on the processor.
        threads: Of each engine.
    """
    models = {name: network.model for name, network in networks.items()}
    latency = measure_latency(models, call, engine=EAGER, threads=threads)
    versions, left_out = {"torch": str(torch.__version__)}, []
    files = {name: network.onnx for name, network in networks.items() if network.onnx}
    faults = [f"the {name} network: {file.fault}" for name, file in files.items() if file.fault]
    if files and not faults:
        sessions = {name: open_session(file.data, threads) for name, file in files.items()}
        device = describe_device(torch.device("cpu"))
        latency += measure_latency(
            sessions, call, engine=ONNX_RUNTIME, device=device, threads=threads
        )
        versions[ONNX_RUNTIME] = runtime_version()
    elif not files:
        left_out.append("ONNX Runtime, which is not installed whole (pip install 'gbp-ray[onnx]')")
    else:
        left_out.append(f"ONNX Runtime, which cannot take {faults[0]}")
    return MeasurementsRecord(
        date=datetime.now(UTC).date().isoformat(),
        machine=read_machine(),
        versions=versions,
        networks={name: _sizes_of(network, call) for name, network in networks.items()},
        latency=latency,
        left_out=tuple(left_out),
    )


def _sizes_of(network: Deliverable, call: Call) -> NetworkRecord:
    cost = network.record.cost
    macs, nonzero = cost.macs - network.macs_saved, cost.macs_nonzero
    if network.macs is not None and cost.units is not None:
        # What cannot be counted follows from the widths, as in the record.
        macs = nonzero = network.macs or cost.units.macs
    return NetworkRecord(
        round=network.record.round,
        num_parameters=sum(p.numel() for p in network.model.parameters()),
        num_nonzero=sum(int(p.count_nonzero()) for p in network.model.parameters()),
        macs=macs,
        macs_nonzero=nonzero,
        file_bytes=dict(network.file_bytes),
        forward_bytes=forward_bytes(network.model, call, BATCH_SIZES),
    )
