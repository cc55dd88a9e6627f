"""The bring-your-own contract: what a model and its data must offer, and who gets which example.

A workload is one small object made by a factory that a job names as "module:attr". Built-in
workloads come through the same door. Everything that decides which examples form a batch, and which
random draws go with it, is decided here from global indices and seeds alone: the number of workers
never enters.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from gbp_ray.config import EncodingConfig, WorkloadConfig, nearest_name
from gbp_ray.encoding import encode_network
from gbp_ray.errors import ConfigError, GbpError, WorkloadError, in_one_line
from gbp_ray.intensities import InputRange, bounds_of_inputs, check_range
from gbp_ray.items import collate, kind_of, read_item, take_rows
from gbp_ray.seeding import derive_seed, plant_seed, seeded, shuffled_indices
from gbp_ray.tying import find_shared_memory, with_tied_weights, without_wrappers
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
    "in_mode",
    "judged_split",
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


@dataclass(frozen=True, eq=False)
class Workload:
    """A model with its data, loss and metric.

    Data is either a pair of tensors or arrays `(inputs, targets)` whose first axis counts examples,
    or any map-style dataset whose items are `(input, target)`.

    Attributes:
        build_model: Makes the dense network; called under a seed of the job.
        train: Examples to score and to train on.
        test: Examples that accuracy and loss are reported on.
        loss: `(outputs, targets) -> scalar`, the mean over the batch, or over the items that
            `count` counts.
        count_correct: `(outputs, targets) -> integer scalar`, how many of the examples are right;
            accuracy is its sum over examples. By default top-1, of (B, classes, ...) outputs and
            (B, ...) labels: where positions are labelled, accuracy is their share, without those
            that the loss ignores.
        prepare: `inputs -> inputs` for every batch, such as scaling bytes to normalised floats.
        augment: `inputs -> inputs` for training batches alone, before `prepare`; draws from the
            global generators of torch, NumPy or `random`, which are seeded for each part of each
            batch. They are seeded for each item of a data set, too, and for each pass.
        input_range: What `prepare` makes of the darkest and of the brightest intensity, each a
            number or one for each channel (axis 1). Attacks and encodings need to know.
        validation: Examples that rounds are judged by and fine-tuning is stopped by; the test split
            is then used once, at the end of a trial. None judges rounds by the test split.
        count: `targets -> number`, over how many items the loss of these targets is a mean, not
            necessarily whole: labelled tokens, weights of classes. So a loss over any split is what
            one batch of all of it would give. By default found by itself for torch's cross entropy
            and NLL loss with class weights, labels that are ignored or labelled positions; any
            other loss must be a mean over examples, `len`.
        classes: Names by label, for reports; empty takes a data set's `classes`, where it has them.
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
    count: Callable[[Tensor], float | Tensor] | None = None
    classes: Sequence[str] = ()

    @cached_property
    def known_counts(self) -> dict[int, Tensor]:
        """What `pruning.item_counts` knows of training examples, by the number of ranks."""
        return {}

    def __repr__(self) -> str:
        # The fields hold whole data sets.
        network = getattr(self.build_model, "__qualname__", type(self.build_model).__name__)
        sizes = [f"{num_examples(self.train):,} training", f"{num_examples(self.test):,} test"]
        return f"<Workload {network}, {' and '.join(sizes)} examples>"


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
        with seeded(derive_seed(seed, "factory")), _staying("workload.factory"):
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
    workload = replace(workload, build_model=without_wrappers(workload.build_model))
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
        with _staying("workload.build_model"):
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
    if shared := find_shared_memory(model):
        one, other = shared
        raise WorkloadError(
            f"workload.build_model: '{one}' and '{other}' share memory without being one "
            "parameter, which copies, masks and workers would part; assign one parameter to both, "
            "name their layers in workload.tie, or give each its own memory by clone()"
        )
    return model


def import_attribute(path: str, key: str) -> Any:
    """Resolves "module:attr" named by the config field `key`.

    Raises:
        ConfigError: The module cannot be imported, or lacks the attribute.
    """
    module_name, _, attribute = path.partition(":")
    try:
        # Once in a process, whatever the job's seed.
        with seeded(0), _staying(f"{key} = '{path}'"):
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


@contextmanager
def in_mode(model: nn.Module, *, is_training: bool) -> Iterator[None]:
    """Puts a network into training or eval mode, and each of its modules back after the block."""
    modes = {module: module.training for module in model.modules()}
    model.train(is_training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _staying(what: str) -> Iterator[None]:
    """Undoes a change of the working folder, which would move relative paths: the storage's, too.

    Args:
        what: Names the user's code that the block runs.
    """
    before = Path.cwd()
    try:
        yield
    finally:
        if (now := Path.cwd()) != before:
            os.chdir(before)
            warnings.warn(
                f"{what}: changes the working folder to '{now}', which would move relative paths "
                "such as that of storage; it was changed back, so let the code give whole paths",
                stacklevel=2,
            )


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
    """Counts the examples of a split.

    Raises:
        WorkloadError: It has no length.
    """
    try:
        return len(data[0]) if isinstance(data, tuple) else len(data)
    except TypeError as error:
        raise WorkloadError(
            f"workload: examples cannot be counted ({in_one_line(error)}); give (inputs, targets) "
            "or a map-style data set"
        ) from error


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

    Raises:
        WorkloadError: An item cannot be read or is not (input, target), items do not fit into one
            batch, or `augment` or `prepare` fails; naming the split and the examples.
    """
    split = _split_of(workload, data)
    while isinstance(data, Portion):
        data, indices = data.data, data.indices[indices]
    key = () if augment_seed is None else (augment_seed,)
    if isinstance(data, tuple):
        inputs, targets = (take_rows(column, indices, split) for column in data)
    else:
        inputs, targets = _read_items(data, indices.tolist(), split, key)
    if augment_seed is not None and workload.augment is not None:
        with seeded(augment_seed), _naming("augment", split, indices):
            inputs = workload.augment(inputs)
        if not isinstance(inputs, Tensor) or len(inputs) != len(targets):
            raise WorkloadError(
                f"workload.augment: must return one tensor of {len(targets)} inputs, as many as it "
                f"was given, not {kind_of(inputs)}"
            )
    if device is not None:
        inputs, targets = inputs.to(device), targets.to(device)
    if workload.prepare is not None:
        seed = derive_seed("prepare", *key, *indices[:1].tolist())
        with seeded(seed), _naming("prepare", split, indices):
            inputs = workload.prepare(inputs)
    return inputs, targets


@contextmanager
def _naming(what: str, split: str, indices: Tensor) -> Iterator[None]:
    """Makes a failure of the workload's own function an error that names it and the examples."""
    try:
        yield
    except (GbpError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        some = ", ".join(str(index) for index in indices[:4].tolist())
        raise WorkloadError(
            f"workload.{what} raised {in_one_line(error)} on examples {some}"
            f"{', ...' if len(indices) > 4 else ''} of workload.{split}"
        ) from error


def _read_items(
    data: Any, indices: Sequence[int], split: str, key: tuple[int, ...]
) -> list[Tensor]:
    """Reads a data set's items, each under a seed of its own, so that batches may be cut anyhow."""
    items = []
    with seeded(0):
        for index in indices:
            plant_seed(derive_seed("item", *key, index))
            items.append(read_item(data, index, split))
        return collate(items, indices, split)


def _split_of(workload: Workload, data: Any) -> str:
    """Names the split that an index counts in; one that is set aside is part of the training's."""
    names = [name for name in ("train", "test", "validation") if getattr(workload, name) is data]
    is_aside = names == ["validation"] and isinstance(data, Portion)
    return "train" if is_aside or not names else names[0]
