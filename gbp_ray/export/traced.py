"""model.pt2: a network as a program of torch.export, compared with the network it was made from."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from gbp_ray.errors import ExportError, in_one_line
from gbp_ray.workloads.batch import logits_of
from gbp_ray.workloads.call import Call

__all__ = [
    "Comparison",
    "Program",
    "compare_outputs",
    "make_program",
]

_TOLERANCE = 1e-5
"""Greatest difference of a program's outputs, against the greatest output."""


@dataclass(frozen=True)
class Program:
    """A network by torch.export.

    Attributes:
        data: The file; empty where `fault` says why there is none.
        difference: Greatest difference of its outputs from the network's.
        has_one_length: Whether it takes sequences of the traced length only.
        traced: The program that the file holds.
    """

    data: bytes
    difference: float = 0.0
    fault: str = ""
    has_one_length: bool = False
    traced: ExportedProgram | None = None


@dataclass(frozen=True)
class Comparison:
    """How the outputs of a file differ from those of the network, see `compare_outputs`."""

    difference: float
    has_one_length: bool


def make_program(lean: nn.Module, model: nn.Module, call: Call) -> Program:
    """Exports a network for any number of examples, and of places where sequences are padded.

    Args:
        lean: The network to export.
        model: The network to compare with.

    Raises:
        ExportError: The program gives other outputs, for these examples or for a single one.
    """
    buffer = io.BytesIO()
    # A program gives logits only, not the loss or states beside them.
    hook = lean.register_forward_hook(lambda module, inputs, outputs: logits_of(outputs))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            positional, named = call.free_sizes()
            sizes = signature(lean.forward).bind(*positional, **named).arguments
            traced = torch.export.export(
                lean, call.positional, call.named, dynamic_shapes=dict(sizes)
            )
            torch.export.save(traced, buffer)
            loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    except Exception as error:  # noqa: BLE001 - a bug still deserves one line
        return Program(b"", fault=in_one_line(error)[:160])
    finally:
        hook.remove()
    found = compare_outputs("model.pt2", loaded, model, call, _TOLERANCE)
    return Program(buffer.getvalue(), found.difference, "", found.has_one_length, traced)


def compare_outputs(
    file: str, made: Callable[..., Any], model: nn.Module, call: Call, tolerance: float
) -> Comparison:
    """Compares a file with the pruned network: on the examples, on the first, on shorter sequences.

    Args:
        file: Its name in errors.
        made: The loaded file, called as the network is.
        tolerance: Greatest difference allowed, against the greatest output.

    Raises:
        ExportError: Outputs differ by more, or in shape.
    """
    pairs = [(some.run(model), some.run(made)) for some in (call, call.part(1))]
    has_one_length = False
    if (short := call.shortened()) is not None:
        with suppress(Exception):  # the network itself may want this length
            wanted = short.run(model)
            has_one_length = True
            pairs.append((wanted, short.run(made)))
            has_one_length = False
    largest = difference = 0.0
    for wanted, found in pairs:
        if found.shape != wanted.shape:
            raise ExportError(
                f"{file}: gives outputs of shape {tuple(found.shape)} for {len(wanted)} "
                f"examples, the pruned network {tuple(wanted.shape)}; nothing was written"
            )
        largest = max(largest, float(wanted.abs().max()))
        difference = max(difference, float((found - wanted).abs().max()))
    if not difference <= tolerance * largest:
        raise ExportError(
            f"{file}: its outputs differ by {difference:.3g} from those of the pruned network, "
            f"whose greatest is {largest:.3g}; nothing was written"
        )
    return Comparison(difference, has_one_length)
