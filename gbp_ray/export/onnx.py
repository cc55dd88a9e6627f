"""model.onnx: a network for ONNX Runtime, opened there and compared with the network.

The one door to onnx, onnxscript and onnxruntime, which come with the extra `onnx` and are imported
in functions only. The file is made from the traced program (torch.onnx.export), takes any number
of examples, and names its inputs as the network's arguments are named.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gbp_ray.errors import ConfigError, ExportError, in_one_line
from gbp_ray.export.traced import compare_outputs
from gbp_ray.workloads.call import Call

__all__ = [
    "OnnxFile",
    "check_onnx",
    "make_onnx",
    "missing_onnx",
    "open_session",
    "runtime_version",
]

_TOLERANCE = 1e-4
"""Greatest difference of the outputs in ONNX Runtime, against the greatest output."""

_MOST_BYTES = 2**31 - 1
"""What one protobuf message holds; a larger network would need a second file beside it."""


@dataclass(frozen=True)
class OnnxFile:
    """A network as an ONNX file.

    Attributes:
        data: The file; empty where `fault` says why there is none.
        difference: Greatest difference of its outputs in ONNX Runtime from the network's.
        has_one_length: Whether it takes sequences of the traced length only.
    """

    data: bytes
    difference: float = 0.0
    fault: str = ""
    has_one_length: bool = False


def missing_onnx() -> list[str]:
    """Lists those of the needed packages that are not installed."""
    return [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]


def check_onnx(option: str) -> None:
    """Checks that the extra is installed.

    Args:
        option: What needs it, as given on the command line.

    Raises:
        ConfigError: It is not.
    """
    if missing := missing_onnx():
        raise ConfigError(
            f"{option}: needs {', '.join(missing)}, which cannot be imported; "
            "pip install 'gbp-ray[onnx]'"
        )


def runtime_version() -> str:
    """Returns the version of ONNX Runtime."""
    return version("onnxruntime")


def make_onnx(traced: ExportedProgram, model: nn.Module, call: Call) -> OnnxFile:
    """Converts a traced network, opens the file in ONNX Runtime and compares the outputs.

    Args:
        traced: The program by torch.export.
        model: The network to compare with.
        call: Examples to compare on: all, the first, twice as many, and shorter sequences.

    Returns:
        The file, or why the network cannot be converted.

    Raises:
        ExportError: The file gives other outputs.
    """
    # A weight that layers share is one initializer.
    weights = {tensor.data_ptr(): tensor for tensor in traced.state_dict.values()}
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    if num_bytes >= _MOST_BYTES:
        return OnnxFile(b"", fault=f"{num_bytes:,} bytes of weights do not fit into one ONNX file")
    try:
        data = _convert(traced, list(call.leaves()))
        session = open_session(data)
        found = compare_outputs("model.onnx", session, model, call, _TOLERANCE)
        more = compare_outputs(
            "model.onnx", session, model, call.resized(2 * call.size), _TOLERANCE
        )
    except ExportError:
        raise
    except Exception as error:  # noqa: BLE001 - converter and runtime raise errors of their own
        return OnnxFile(b"", fault=in_one_line(error)[:160])
    difference = max(found.difference, more.difference)
    return OnnxFile(data, difference, has_one_length=found.has_one_length)


def open_session(data: bytes, threads: int = 1) -> Callable[..., Tensor]:
    """Opens a file in ONNX Runtime on the processor.

    Returns:
        A function that is called as the network is, and returns its first output.

    Raises:
        Exception: ONNX Runtime cannot open it; it has many errors of its own.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*positional: Any, **named: Any) -> Tensor:
        leaves = Call(positional, named, 0).leaves()
        feed = {name: leaves[name].numpy() for name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _convert(traced: ExportedProgram, names: list[str]) -> bytes:
    """Converts a program; the axis of examples is called "batch" in it."""
    with _quiet():
        made = torch.onnx.export(
            traced, (), input_names=names, output_names=["outputs"], dynamo=True, verbose=False
        )
    assert made is not None
    proto = made.model_proto
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    axes = [value.type.tensor_type.shape.dim for value in values]
    symbol = next((dims[0].dim_param for dims in axes if dims and dims[0].dim_param), "")
    for dim in (dim for dims in axes for dim in dims):
        if symbol and dim.dim_param:
            dim.dim_param = re.sub(rf"\b{symbol}\b", "batch", dim.dim_param)
    return proto.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the converter logs and warns of away; what matters is compared afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
