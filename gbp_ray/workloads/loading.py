"""Loading of what a job names as "module:attr": workloads, their networks, and the code in records.

Built-in workloads come through the same door as a user's own.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gbp_ray import workloads
from gbp_ray.config.job import JobConfig, list_code, load_job
from gbp_ray.config.schema import nearest_name
from gbp_ray.config.workload import EncodingConfig, WorkloadConfig
from gbp_ray.errors import ConfigError, GbpError, WorkloadError, in_one_line
from gbp_ray.workloads.batch import kind_of, map_tensors, tensors_in
from gbp_ray.workloads.contract import (
    Portion,
    Workload,
    bounds_of_inputs,
    check_range,
    num_examples,
)
from gbp_ray.workloads.data import (
    derive_seed,
    first_example,
    seeded,
    shuffled_indices,
    without_loaders,
)
from gbp_ray.workloads.encoding import encode_network
from gbp_ray.workloads.tying import find_shared_memory, with_tied_weights, without_wrappers
from gbp_ray.workloads.weights import start_from

__all__ = [
    "LIVE",
    "add_import_paths",
    "add_job_folders",
    "admit_code",
    "build_network",
    "code_of",
    "hold_out",
    "import_attribute",
    "in_channels_last",
    "load_workload",
    "own_sources",
    "warn_of_changed_code",
    "warn_of_shadowed_modules",
]


def load_workload(config: WorkloadConfig, seed: int | None = None) -> Workload:
    """Calls the factory that a job names, and holds out examples if the job asks for it.

    Args:
        seed: Of the job; seeds the factory's draws and the choice of held-out examples.

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
    workload = without_loaders(workload)
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
    return in_channels_last(workload) if config.channels_last else workload


def in_channels_last(workload: Workload) -> Workload:
    """Lays the images of every batch out pixel by pixel.

    Weights stay as they are: convolutions keep their inputs' layout for what they make, and weights
    are small beside that.
    """
    return replace(workload, prepare=partial(_to_channels_last, workload.prepare))


def _to_channels_last(prepare: Callable[[Any], Any] | None, nest: Any) -> Any:
    nest = nest if prepare is None else prepare(nest)
    if not any(tensor.ndim == 4 for tensor in tensors_in(nest)):
        raise ConfigError(
            "workload.channels_last = true: a batch of this workload holds no images of shape "
            "(B, C, H, W); leave it out"
        )
    # Unlike `contiguous`, `to` also sets the strides of images of one channel.
    return map_tensors(
        nest, lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t
    )


def _encoded(workload: Workload, config: EncodingConfig) -> Workload:
    """Puts the workload's network behind an encoding, which takes intensities."""
    example = first_example(workload).inputs
    if not isinstance(example, Tensor):
        raise ConfigError(
            f"workload.encoding.kind: encodes inputs that are one tensor, not {kind_of(example)}; "
            "leave it out"
        )
    low, high = bounds_of_inputs(workload.input_range, example, "workload.encoding.kind")
    check_range(example, low, high)
    build, prepare = workload.build_model, workload.prepare
    return replace(
        workload,
        build_model=lambda: encode_network(build(), config, low, high, example),
        prepare=partial(_to_intensities, prepare, low, high),
        input_range=(0.0, 1.0),
    )


def _to_intensities(
    prepare: Callable[[Tensor], Tensor] | None, low: Tensor, high: Tensor, inputs: Tensor
) -> Tensor:
    prepared = inputs if prepare is None else prepare(inputs)
    low, high = low.to(prepared.device), high.to(prepared.device)
    return (prepared - low) / (high - low)


def hold_out(workload: Workload, share: float, seed: int) -> Workload:
    """Makes a share of the training examples the validation split.

    Raises:
        ConfigError: The workload has a validation split of its own, or too few examples.
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


def build_network(workload: Workload) -> nn.Module:
    """Calls `build_model`; raises WorkloadError unless it makes a network of separate tensors."""
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


LIVE: dict[str, Any] = {}
"""Objects of this process by the name that jobs know them by, "live:NAME"; see `runtime.live`."""


def import_attribute(path: str, key: str) -> Any:
    """Resolves "module:attr" named by the config field `key`; raises ConfigError if it cannot."""
    if path in LIVE:
        return LIVE[path]
    if path.startswith("live:"):
        raise ConfigError(
            f"{key} = '{path}': was an object of the process that ran the job, and no module holds "
            "it; give it to gbp_ray.prune(workload=...) again, or make a job of a function that "
            'can be imported as "module:function"'
        )
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


_HIDING = {("ignore", None, kind, None, 0) for kind in (Warning, UserWarning)}


@contextmanager
def _staying(what: str) -> Iterator[None]:
    """Undoes what the user's code `what` must not change for this package.

    Another working folder would move relative paths. A rule of that code against all warnings would
    hide this package's, too; it stays in force for those of others.
    """
    before, rules = Path.cwd(), list(warnings.filters)
    try:
        yield
    finally:
        new = takewhile(lambda rule: rule not in rules[:1], warnings.filters)
        if not _HIDING.isdisjoint(new):
            warnings.filterwarnings("default", category=UserWarning, module=r"gbp_ray\.")
        if (now := Path.cwd()) != before:
            os.chdir(before)
            warnings.warn(
                f"{what}: changes the working folder to '{now}', which would move relative paths "
                "such as that of storage; it was changed back, so let the code give whole paths",
                stacklevel=3,
            )


def add_import_paths(folders: Iterable[str]) -> None:
    """Makes a user's own modules importable, as `python script.py` would."""
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)


def add_job_folders(job: JobConfig | str | Path | None) -> list[str]:
    """Make modules in the working folder and beside the job file importable; list these folders."""
    folders = [str(Path.cwd())]
    if isinstance(job, (str, Path)):
        folders.append(str(Path(job).resolve().parent))
    add_import_paths(folders)
    return folders


def warn_of_shadowed_modules(job: JobConfig, folder: str, stacklevel: int) -> None:
    """Warns of a module in a folder that the import of a job's code passed over."""
    for key, plug_in in code_of(job).items():
        if plug_in in LIVE:
            continue
        name = plug_in.partition(":")[0].partition(".")[0]
        loaded = getattr(sys.modules.get(name), "__file__", None)
        for candidate in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
            if candidate.is_file() and (loaded is None or not candidate.samefile(loaded)):
                warnings.warn(
                    f"{key} = {plug_in}: module '{name}' is {loaded or 'built in'}, not "
                    f"'{candidate}'; rename yours, or start a new process if another job brought "
                    "it in",
                    stacklevel=stacklevel,
                )
                break


def code_of(job: JobConfig) -> dict[str, str]:
    """Lists the code that a job names as "module:attr" and that is not built in, by field."""
    built_in = {f"gbp_ray.zoo:{name}" for name in workloads.__all__}
    return {key: name for key, name in list_code(job).items() if name not in built_in}


def admit_code(
    job: JobConfig, uri: str, trusted: Iterable[str] = (), folders: Sequence[str | Path] = ()
) -> None:
    """Makes the code that a record names importable, where it may run.

    Args:
        job: As the record holds it.
        uri: The record's, for the refusal.
        trusted: What may run: "module:attr", "module" for all of it, or the path of a job file
            (.toml) for what that names; its folder is looked in, too.
        folders: Where to look for modules beside the working folder.

    Raises:
        ConfigError: The record names other code.
    """
    named = code_of(job)
    if not named:
        # A module beside downloaded results must not stand in for one that is not installed.
        return
    allowed, paths = set(), [str(Path.cwd()), *(str(folder) for folder in folders)]
    for name in trusted:
        if name.endswith(".toml"):
            allowed |= set(code_of(load_job(name)).values())
            paths.append(str(Path(name).resolve().parent))
        else:
            allowed.add(name)
    for key, name in named.items():
        if not allowed & {name, name.partition(":")[0]}:
            raise ConfigError(
                f"'{uri}': its record names the code {key} = '{name}', which runs only if you "
                f"allow it: --trust-code {name} (Python: trust_code=['{name}']), or --trust-code "
                "with the job file that names it"
            )
    add_import_paths(paths)


_KNOWN = ("gbp_ray.", "live:")
"""Code whose file says nothing: this package's, and what is known by a digest."""


def own_sources(job: JobConfig) -> dict[str, str]:
    """Hashes the files that the user's own functions of a job are written in, by name."""
    names = list_code(job).values()
    return {name: digest_source(name) for name in names if not name.startswith(_KNOWN)}


def warn_of_changed_code(sources: Mapping[str, str], trial_id: str, job: JobConfig) -> None:
    """Warn where a user's function is another one by now than when a trial was run.

    Args:
        sources: What `own_sources` gave when the trial was run.
        trial_id: For the warning.
        job: Names the functions; those that only `sources` names are not imported.
    """
    for name in {job.workload.factory, job.prune.criterion} & sources.keys():
        try:
            is_same = digest_source(name) == sources[name]
        except GbpError:
            continue  # what cannot be imported any more cannot mislead
        if not is_same:
            warnings.warn(
                f"'{name}' has changed since trial {trial_id} was run, and what it gave then "
                "still stands; give the job another name, or delete the trial, to run it anew",
                stacklevel=3,
            )


def digest_source(plug_in: str) -> str:
    """Hashes the file that a user's function is written in: edited, it is another function."""
    found = import_attribute(plug_in, "workload.factory")
    module = sys.modules.get(getattr(found, "__module__", "") or plug_in.partition(":")[0])
    path = getattr(module, "__file__", None)
    if path is None:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""
