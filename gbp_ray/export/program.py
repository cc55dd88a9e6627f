"""The deliverable: a pruned network that loads in plain PyTorch, checked before it is written.

    model.safetensors    the state dict, for the network's own class
    model.pt2            the network as a program (torch.export), for those without the class; with
                         BatchNorm folded into the layers before it, if that is asked for
    masks.safetensors    which weights stay zero
    example.safetensors  prepared inputs with the outputs that belong to them
    README.md            the model card

Everything is made and compared in memory; a folder is written whole or not at all.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.agreement import check_data
from gbp_ray.errors import ExportError, in_one_line
from gbp_ray.export.card import ExportFacts, write_card
from gbp_ray.export.fold import fold_batchnorm
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.results.folder import check_target, write_target
from gbp_ray.results.store import locate_finished
from gbp_ray.training.network import network_of_seed, rebuild_network
from gbp_ray.workloads.batch import call_arguments, kind_of, logits_of, take_part
from gbp_ray.workloads.contract import Workload, judged_split, num_examples
from gbp_ray.workloads.data import take_batch
from gbp_ray.workloads.loading import admit_code, load_workload, warn_of_changed_code
from gbp_ray.workloads.weights import save_state, tensor_state

__all__ = [
    "Export",
    "export_round",
]

_FILES = ("model.safetensors", "model.pt2", "masks.safetensors", "example.safetensors", "README.md")
_NUM_EXAMPLES = 8
_TOLERANCE = 1e-5
"""Greatest difference of a program's outputs, against the greatest output."""

_FOLDED = "In `model.pt2` each BatchNorm is folded into the layer before it; no zero was lost."
_ONE_LENGTH = (
    "`model.pt2` takes sequences of the length in `example.safetensors` only, since torch.export "
    "fixes that of recurrent layers."
)


@dataclass(frozen=True)
class Export:
    """The result of `export_round`.

    Attributes:
        folder: Where.
        files: Name to size in bytes.
        trial_id: Of the trial.
        round: Of it.
        difference: Greatest difference of the program's outputs from the pruned network's.
        program_fault: The reason for a missing program, or "".
    """

    folder: str
    files: dict[str, int]
    trial_id: str
    round: int
    difference: float
    program_fault: str


def export_round(
    uri: str | Path,
    folder: str | Path,
    *,
    is_folded: bool = False,
    code: str | Path = "",
    trust_code: Sequence[str] = (),
) -> Export:
    """Writes a round of a finished trial as files that need nothing of this package.

    Args:
        uri: A round's folder, or a trial's: that gives the round which the trial is for.
        folder: Receives the files; new, empty, or holding an earlier export.
        is_folded: Folds every BatchNorm of the program into the layer before it. The state dict
            stays that of the network's own class.
        code: A folder of the job's own modules, searched in addition to the working folder.
        trust_code: Code that may run though only the record names it; see `admit_code`.

    Raises:
        ConfigError: The record names code that is neither built in nor trusted.
        ExportError: What was made does not compute what the pruned network does.
        PruneError: A BatchNorm cannot be folded.
        StoreError: The round cannot be read, its trial has not finished, or the folder cannot be
            written.
    """
    target = check_target(folder, "DIR", "export", lambda target: set(_FILES))
    store, trial, record = locate_finished(uri)
    name = trial.trial_id
    admit_code(trial.job, store.trial_uri(name), trust_code, [code] if code else [])
    warn_of_changed_code(trial.sources, trial.trial_id, trial.job)
    workload = load_workload(trial.job.workload, trial.job.seed)
    known = trial.dense.fingerprints
    check_data(workload, known, store.trial_uri(name))
    weights = store.read_file(name, record, "weights.safetensors")
    packed = store.read_file(name, record, "masks.safetensors")
    masks = MaskSet.from_bytes(packed, "masks.safetensors")
    model = rebuild_network(workload, trial.job.seed, weights, "weights.safetensors", known)
    if (revived := masks.find_revived(model)) is not None:
        raise ExportError(f"'{revived}': has weights other than zero where its mask removes them")
    call = _Call.of(model, workload)
    outputs = call.run(model)
    state = _complete_state(model, weights)
    _check_state(trial.job, state, call, outputs)
    lean = fold_batchnorm(model, call.run) if is_folded else model
    program = _make_program(lean, model, call)
    given = call.tensors()
    example = {**given, "outputs": outputs}
    files = {
        "model.safetensors": state,
        "masks.safetensors": packed,
        "example.safetensors": save_tensors({n: t.contiguous() for n, t in example.items()}),
    }
    if program.data:
        files["model.pt2"] = program.data
    facts = ExportFacts(
        class_name=type(model).__name__,
        inputs={name: (str(t.dtype), tuple(t.shape[1:])) for name, t in given.items()},
        arguments=call.in_code(),
        output_shape=tuple(outputs.shape[1:]),
        num_test=num_examples(workload.test),
        num_judged=num_examples(getattr(workload, judged_split(workload))),
        program_fault=program.fault,
        difference=program.difference,
        has_tied_weights=state != weights,
        notes=(
            *((_FOLDED,) if is_folded and program.data else ()),
            *((_ONE_LENGTH,) if program.has_one_length else ()),
            *(
                f"`{name}` is no tensor and not in `model.safetensors`; load with `strict=False`."
                for name in _beside_tensors(model)
            ),
        ),
    )
    files["README.md"] = write_card(trial, trial.rounds[record.round], facts).encode()
    write_target(target, files, "DIR", stale=_FILES)
    return Export(
        folder=str(target),
        files={name: len(data) for name, data in files.items()},
        trial_id=name,
        round=record.round,
        difference=program.difference,
        program_fault=program.fault,
    )


@dataclass(frozen=True)
class _Call:
    """The arguments that the network takes for some test examples, without their labels."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    size: int

    @classmethod
    def of(cls, model: nn.Module, workload: Workload) -> _Call:
        size = min(_NUM_EXAMPLES, num_examples(workload.test))
        batch = take_batch(workload, workload.test, torch.arange(size))
        call = cls(*call_arguments(model, workload, batch), size)
        if "labels" in call.named:
            # A network in use has none; one that cannot do without is exported with them.
            named = {name: value for name, value in call.named.items() if name != "labels"}
            with suppress(Exception):
                bare = cls(call.positional, named, size)
                bare.run(model)
                return bare
        return call

    @torch.no_grad()
    def run(self, model: nn.Module | Callable[..., Any]) -> Tensor:
        """Calls a network; of outputs that name them returns the logits."""
        outputs = logits_of(model(*self.positional, **self.named))
        if not isinstance(outputs, Tensor):
            raise ExportError(
                f"the network returns {kind_of(outputs)}, and only one that returns a tensor, or "
                "logits by name, can be compared with what is exported"
            )
        return outputs

    def part(self, number: int) -> _Call:
        """Takes the first examples."""
        rows = slice(number)
        positional = take_part(self.positional, rows, self.size)
        return _Call(positional, take_part(self.named, rows, self.size), number)

    def tensors(self) -> dict[str, Tensor]:
        """Lists its tensors by the names that they are stored under."""
        if len(self.positional) == 1 and isinstance(self.positional[0], Tensor) and not self.named:
            return {"inputs": self.positional[0]}
        found = {f"inputs.{name}": value for name, value in self.named.items()}
        found |= {f"inputs.{place}": value for place, value in enumerate(self.positional)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def shortened(self) -> _Call | None:
        """Leaves out the last place of named sequences; None where there are none."""
        rows = [t for t in self.named.values() if isinstance(t, Tensor) and t.ndim > 1]
        if not rows or len({t.shape[1] for t in rows}) > 1 or rows[0].shape[1] < 2:
            return None
        cut = {
            name: t[:, :-1] if any(t is row for row in rows) else t
            for name, t in self.named.items()
        }
        return _Call(self.positional, cut, self.size)

    def in_code(self) -> str:
        """Writes the arguments as a call of the program has them."""
        if list(self.tensors()) == ["inputs"]:
            return "inputs"
        places = (f"inputs_{place}" for place in range(len(self.positional)))
        return ", ".join([*places, *(f"{name}={name}" for name in self.named)])

    def free_sizes(self) -> tuple[Any, dict[str, Any]]:
        """Describes the axes whose lengths may differ: examples, and those that padding fills."""
        # Two examples and more: a size of one would be taken for a constant.
        batch = torch.export.Dim("batch", min=1)

        def free(value: Any) -> Any:
            if isinstance(value, Tensor):
                is_padded = bool(self.named) and value.ndim > 1
                axes: dict[int, Any] = {0: batch} if len(value) == self.size else {}
                return axes | ({1: torch.export.Dim.AUTO} if is_padded else {})
            if isinstance(value, Mapping):
                return {key: free(inner) for key, inner in value.items()}
            return type(value)(map(free, value)) if isinstance(value, (tuple, list)) else None

        return tuple(map(free, self.positional)), free(self.named)


def _complete_state(model: nn.Module, weights: bytes) -> bytes:
    """Write a shared weight under each of its names, as the network's class loads it."""
    own = tensor_state(model)
    if set(own) == set(load_tensors(weights)):
        return weights
    return save_state(own)


def _beside_tensors(model: nn.Module) -> list[str]:
    tensors = tensor_state(model)
    return [name for name in model.state_dict() if name not in tensors]


def _check_state(job: JobConfig, state: bytes, call: _Call, outputs: Tensor) -> None:
    """Check that a fresh network of the class with this state dict gives the same outputs."""
    # As the class makes it: whoever loads it knows nothing of layers that the job has tied.
    workload = load_workload(job.workload.model_copy(update={"tie": ()}), job.seed + 1)
    fresh, _ = network_of_seed(workload, job.seed + 1)
    try:
        fresh.load_state_dict(load_tensors(state), strict=not _beside_tensors(fresh))
    except RuntimeError as error:
        raise ExportError(
            f"a fresh network does not take the stored weights: {' '.join(str(error).split())}"
        ) from error
    if not torch.equal(call.run(fresh.eval()), outputs):
        raise ExportError(
            "a fresh network with the stored weights gives other outputs: what it computes is not "
            "in its state dict alone, or is drawn at random"
        )


@dataclass(frozen=True)
class _Program:
    """A network by torch.export: its bytes, none where `fault` says why; see `Export`."""

    data: bytes
    difference: float = 0.0
    fault: str = ""
    has_one_length: bool = False


def _make_program(lean: nn.Module, model: nn.Module, call: _Call) -> _Program:
    """Export a network for any number of examples, and of places where sequences are padded.

    Args:
        lean: The network to export.
        model: The pruned network to compare with.

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
        return _Program(b"", fault=in_one_line(error)[:160])
    finally:
        hook.remove()
    pairs = [(some.run(model), some.run(loaded)) for some in (call, call.part(1))]
    has_one_length = False
    if (short := call.shortened()) is not None:
        with suppress(Exception):  # the network itself may want this length
            wanted = short.run(model)
            has_one_length = True
            pairs.append((wanted, short.run(loaded)))
            has_one_length = False
    largest = difference = 0.0
    for wanted, found in pairs:
        if found.shape != wanted.shape:
            raise ExportError(
                f"model.pt2: gives outputs of shape {tuple(found.shape)} for {len(wanted)} "
                f"examples, the pruned network {tuple(wanted.shape)}"
            )
        largest = max(largest, float(wanted.abs().max()))
        difference = max(difference, float((found - wanted).abs().max()))
    if not difference <= _TOLERANCE * largest:
        raise ExportError(
            f"model.pt2: its outputs differ by {difference:.3g} from those of the pruned network, "
            f"whose greatest is {largest:.3g}; nothing was written"
        )
    return _Program(buffer.getvalue(), difference, has_one_length=has_one_length)
