"""The bring-your-own contract: what a model and its data must offer, and who gets which example.

A workload is one small object made by a factory that a job names as "module:attr". Built-in
workloads come through the same door. Everything that decides which examples form a batch, and which
random draws go with it, is decided here from global indices and seeds alone: the number of workers
never enters.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.utils.data import default_collate

from gbp_ray.config import EncodingConfig, WorkloadConfig, nearest_name
from gbp_ray.encoding import encode_network
from gbp_ray.errors import ConfigError, GbpError, WorkloadError
from gbp_ray.intensities import InputRange, bounds_of_inputs, check_range
from gbp_ray.seeding import derive_seed, plant_seed, seeded, shuffled_indices
from gbp_ray.tying import with_tied_weights
from gbp_ray.weights import start_from

__all__ = [
    "Portion",
    "Workload",
    "add_import_paths",
    "build_network",
    "count_top1",
    "cut_batches",
    "derive_seed",
    "find_shadowed_module",
    "hold_out",
    "import_attribute",
    "in_one_line",
    "judged_split",
    "kind_of",
    "load_workload",
    "num_examples",
    "seeded",
    "shuffled_indices",
    "take_batch",
]


def count_top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Counts right answers: outputs (B, classes), targets (B,) -> integer scalar."""
    return (outputs.argmax(dim=1) == targets).sum()


@dataclass(frozen=True, eq=False)
class Portion:
    """Some examples of a split, by index; nothing is copied.

    Attributes:
        data: The split.
        indices: (n,) positions in it.
    """

    data: Any
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Workload:
    """A model with its data, loss and metric.

    Data is either a pair of tensors or arrays `(inputs, targets)` whose first axis counts examples,
    or any map-style dataset whose items are `(input, target)`.

    Attributes:
        build_model: Makes the dense network; called under a seed of the job.
        train: Examples to score and to train on.
        test: Examples that accuracy and loss are reported on.
        loss: `(outputs, targets) -> scalar`, the mean over the batch.
        count_correct: `(outputs, targets) -> integer scalar`; accuracy is its sum over examples.
        prepare: `inputs -> inputs` for every batch, such as scaling bytes to normalised floats.
        augment: `inputs -> inputs` for training batches alone, before `prepare`; draws from the
            global generators of torch, NumPy or `random`, which are seeded for each part of each
            batch. They are seeded for each item of a data set, too, and for each pass.
        input_range: What `prepare` makes of the darkest and of the brightest intensity, each a
            number or one for each channel (axis 1). Attacks and encodings need to know.
        validation: Examples that rounds are judged by and fine-tuning is stopped by; the test split
            is then used once, at the end of a trial. None judges rounds by the test split.
    """

    build_model: Callable[[], nn.Module]
    train: Any
    test: Any
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    count_correct: Callable[[Tensor, Tensor], Tensor] = count_top1
    prepare: Callable[[Tensor], Tensor] | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    input_range: InputRange | None = None
    validation: Any = None


def load_workload(config: WorkloadConfig, seed: int | None = None) -> Workload:
    """Calls the factory that a job names, and sets examples aside where the job asks for it.

    Args:
        seed: Of the job; decides what the factory draws, and which examples are set aside.

    Raises:
        ConfigError: The factory cannot be found, or does not take these options.
        WorkloadError: The factory failed, or returned something else than a `Workload`.
    """
    factory = import_attribute(config.factory, "workload.factory")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise ConfigError(
            f"workload.factory = '{config.factory}': is not callable; it must return a Workload"
        ) from None
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in config.options:
            if name not in parameters:
                raise ConfigError(
                    f"workload.options.{name}: {config.factory} has no such option"
                    f"{nearest_name(name, list(parameters))} "
                    f"(allowed: {', '.join(parameters) or 'none'})"
                )
    for name, parameter in parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and name not in config.options:
            raise ConfigError(f"workload.options.{name}: is required by {config.factory}")
    try:
        # A network that is made here, and not in build_model, is the same in every process.
        with seeded(derive_seed(seed, "factory")):
            workload = factory(**config.options)
    except GbpError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            raise WorkloadError(
                f"workload.factory = '{config.factory}': '{error.filename}' does not exist; "
                "check workload.options"
            ) from error
        raise WorkloadError(
            f"workload.factory = '{config.factory}' raised {in_one_line(error)}"
        ) from error
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"workload.factory = '{config.factory}' returned {type(workload).__name__}; "
            "it must return a gbp_ray.Workload"
        )
    if config.transfer.checkpoint:
        start = start_from(workload.build_model, config.transfer)
        workload = replace(workload, build_model=start)
    if config.tie:
        tied = with_tied_weights(workload.build_model, config.tie)
        workload = replace(workload, build_model=tied)
    if config.encoding.kind != "none":
        workload = _encoded(workload, config.encoding)
    if config.validation:
        assert seed is not None, "the seed decides which examples are set aside"
        workload = hold_out(workload, config.validation, seed)
    return workload


def _encoded(workload: Workload, config: EncodingConfig) -> Workload:
    """Puts the workload's network behind an encoding, and gives it intensities to take."""
    example, _ = take_batch(workload, workload.train, torch.zeros(1, dtype=torch.long))
    low, high = bounds_of_inputs(workload.input_range, example, "workload.encoding.kind")
    check_range(example, low, high)
    build, prepare = workload.build_model, workload.prepare
    return replace(
        workload,
        build_model=partial(_build_encoded, build, config, low, high, example),
        prepare=partial(_to_intensities, prepare, low, high),
        input_range=(0.0, 1.0),
    )


def _build_encoded(
    build_model: Callable[[], nn.Module],
    config: EncodingConfig,
    low: Tensor,
    high: Tensor,
    example: Tensor,
) -> nn.Module:
    return encode_network(build_model(), config, low, high, example)


def _to_intensities(
    prepare: Callable[[Tensor], Tensor] | None, low: Tensor, high: Tensor, inputs: Tensor
) -> Tensor:
    prepared = inputs if prepare is None else prepare(inputs)
    low, high = low.to(prepared.device), high.to(prepared.device)
    return (prepared - low) / (high - low)


def hold_out(workload: Workload, share: float, seed: int) -> Workload:
    """Sets a share of the training examples aside, for judging rounds by.

    Raises:
        ConfigError: The workload brings a validation split of its own, or too few examples.
    """
    if workload.validation is not None:
        raise ConfigError(
            f"workload.validation = {share:g}: this workload brings a validation split of its own; "
            "leave it out"
        )
    total = num_examples(workload.train)
    num_aside = round(share * total)
    if not 0 < num_aside < total:
        raise ConfigError(
            f"workload.validation = {share:g}: sets {num_aside} of {total} training examples "
            "aside; some must be, and some must be left"
        )
    order = shuffled_indices(total, derive_seed(seed, "validation"))
    # In their own order, so that reading them goes through the data once.
    aside, kept = order[:num_aside].sort().values, order[num_aside:].sort().values
    return replace(
        workload,
        train=Portion(workload.train, kept),
        validation=Portion(workload.train, aside),
    )


def judged_split(workload: Workload) -> str:
    """Names the split that rounds are judged by: "validation" where there is one, else "test"."""
    return "test" if workload.validation is None else "validation"


def build_network(workload: Workload) -> nn.Module:
    """Calls the workload's `build_model`.

    Raises:
        WorkloadError: It failed, or made something else than a network whose tensors have shapes.
    """
    try:
        model = workload.build_model()
    except GbpError:
        raise
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"workload.build_model raised {in_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise WorkloadError(
            f"workload.build_model returned {kind_of(model)}; it must return a torch.nn.Module"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise WorkloadError(
                f"workload.build_model: '{name}' of the network has no shape yet, its module is "
                "lazy; call the network on one batch before returning it"
            )
    return model


def kind_of(value: object) -> str:
    """Describes a value for a message: dtype and shape of a tensor, else the type."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def in_one_line(error: BaseException) -> str:
    """Describes an exception for a message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def import_attribute(path: str, key: str) -> Any:
    """Resolves "module:attr" named by the config field `key`.

    Raises:
        ConfigError: The module cannot be imported, or lacks the attribute.
    """
    module_name, _, attribute = path.partition(":")
    try:
        # Once in a process, whatever the job's seed.
        with seeded(0):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        looked_in = "the working folder and the job file's folder"
        raise ConfigError(
            f"{key} = '{path}': no module named '{error.name}'; modules are looked up among "
            f"installed packages, {looked_in} (export and explain: --folder DIR)"
        ) from None
    except (Exception, SystemExit) as error:
        # A script that parses its own arguments ends the process when it is imported.
        raise ConfigError(
            f"{key} = '{path}': importing '{module_name}' raised {in_one_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        names = [name for name in dir(module) if not name.startswith("_")]
        raise ConfigError(
            f"{key} = '{path}': module '{module_name}' has no '{attribute}'"
            f"{nearest_name(attribute, names)}"
        )
    return getattr(module, attribute)


def add_import_paths(folders: Iterable[str]) -> None:
    """Makes a user's own modules importable by name, as `python script.py` would."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)


def find_shadowed_module(path: str, folder: str) -> str | None:
    """Finds a module in `folder` that the import of "module:attr" passed over.

    Returns:
        What was imported from where instead; None where the module is the folder's own or not in
        it.
    """
    name = path.partition(":")[0].partition(".")[0]
    loaded = getattr(sys.modules.get(name), "__file__", None)
    for candidate in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
        if candidate.is_file() and (loaded is None or not candidate.samefile(loaded)):
            return f"'{name}' is {loaded or 'built in'}, not '{candidate}'"
    return None


def num_examples(data: Any) -> int:
    """Counts the examples of a split."""
    return len(data[0]) if isinstance(data, tuple) else len(data)


def cut_batches(total: int, batch_size: int) -> list[range]:
    """Cuts positions 0..total-1 into batches; the last may be short, none is padded or repeated."""
    return [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]


def take_batch(
    workload: Workload,
    data: Any,
    indices: Tensor,
    *,
    device: torch.device | None = None,
    augment_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fetches examples by index, augments them where a seed is given, and prepares them.

    What a data set draws for an item from the global generators of torch, NumPy and `random` is
    decided by the item's index and `augment_seed`, so an item read without one always looks alike.

    Args:
        indices: (B,) positions in `data`.
        augment_seed: Seeds `workload.augment`; None leaves augmentation out.
    """
    while isinstance(data, Portion):
        data, indices = data.data, data.indices[indices]
    key = () if augment_seed is None else (augment_seed,)
    if isinstance(data, tuple):
        inputs, targets = (_as_rows(column, indices) for column in data)
    else:
        inputs, targets = _read_items(data, indices.tolist(), key)
    if augment_seed is not None and workload.augment is not None:
        with seeded(augment_seed):
            inputs = workload.augment(inputs)
    if device is not None:
        inputs, targets = inputs.to(device), targets.to(device)
    if workload.prepare is not None:
        with seeded(derive_seed("prepare", *key, *indices[:1].tolist())):
            inputs = workload.prepare(inputs)
    return inputs, targets


def _read_items(data: Any, indices: Sequence[int], key: tuple[int, ...]) -> Any:
    """Reads a data set's items, each under a seed of its own, so that batches may be cut anyhow."""
    items = []
    with seeded(0):
        for index in indices:
            plant_seed(derive_seed("item", *key, index))
            items.append(data[index])
        return default_collate(items)


def _as_rows(column: Any, indices: Tensor) -> Tensor:
    if isinstance(column, Tensor):
        return column[indices]
    return torch.as_tensor(column[indices.numpy()])
