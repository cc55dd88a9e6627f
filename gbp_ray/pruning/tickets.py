"""Masks that come from elsewhere: read by address, fitted to a network, the start of another job.

A job that starts from masks or from weights is known by their digests, not by where they lie:
`pin_files` puts these into the job before the job's id is asked for, and whoever reads the files
later compares.

Masks fit a network if every parameter that they mask is there, with the same shape. Parameters that
the job excludes stay whole whatever their mask says, and those without a mask start whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gbp_ray.config import JobConfig, expand, is_matched, nearest_name
from gbp_ray.errors import ConfigError, GbpError, StoreError
from gbp_ray.pruning.masks import MaskSet, Prunable
from gbp_ray.pruning.selection import num_to_prune
from gbp_ray.store import locate_round, open_objects
from gbp_ray.weights import pin_weights

__all__ = ["pin_files", "pin_trials", "read_masks_at", "starting_masks"]

_FILE = "masks.safetensors"
_KEY = "prune.initial_masks"


def read_masks_at(source: str) -> MaskSet:
    """Reads masks from a file, or from the round or trial at an address.

    Args:
        source: Path or s3:// address of a mask file, or of a round's or a trial's folder; a trial
            gives those of the round that it is for.

    Raises:
        StoreError: There is no such thing, or it is damaged.
    """
    is_s3 = source.startswith("s3://")
    path = Path(source.removeprefix("file://")).expanduser()
    if is_s3 and source.partition("?")[0].endswith(".safetensors"):
        address, mark, query = source.partition("?")
        folder, _, name = address.rpartition("/")
        data = open_objects(f"{folder}{mark}{query}").get(name)
        if data is None:
            raise StoreError(f"'{source}': there is no such file")
        return MaskSet.from_bytes(data, source)
    if not is_s3 and path.is_file():
        try:
            return MaskSet.from_bytes(path.read_bytes(), source)
        except OSError as error:
            raise StoreError(f"'{source}': cannot be read: {error.strerror}") from None
    store, trial, record = locate_round(source)
    return MaskSet.from_bytes(store.read_file(trial, record, _FILE), source)


def pin_files(job: JobConfig, known: dict[str, str] | None = None) -> JobConfig:
    """Notes the digests of masks and weights that a job names, which then are part of its id.

    Args:
        known: Digests by address, which grow; jobs of one sweep share them.

    Raises:
        ConfigError: The masks cannot be read.
        WorkloadError: The weights cannot be read.
    """
    known = {} if known is None else known
    job = pin_weights(job, known)
    source = job.prune.initial_masks
    if not source or job.prune.initial_masks_digest:
        return job
    if source not in known:
        known[source] = _read(job).digest
    prune = job.prune.model_copy(update={"initial_masks_digest": known[source]})
    return job.model_copy(update={"prune": prune})


def pin_trials(job: JobConfig) -> tuple[JobConfig, list[JobConfig]]:
    """Pins what a sweep starts from; returns it with the trials of its grid, if it is one.

    Raises:
        GbpError: As `pin_files` and `expand`.
    """
    if job.sweep.search != "grid":
        return pin_files(job), []
    digests: dict[str, str] = {}
    return job, [pin_files(trial, digests) for trial in expand(job)]


def starting_masks(job: JobConfig, units: Iterable[Prunable]) -> MaskSet | None:
    """Reads the masks that a job starts from, fitted to its network; None where it has none.

    Raises:
        ConfigError: They cannot be read, are not those that the job was made with, do not fit, or
            have removed more than the job asks for.
    """
    if not job.prune.initial_masks:
        return None
    found, named = _read(job), f"{_KEY} = '{job.prune.initial_masks}'"
    if job.prune.initial_masks_digest not in ("", found.digest):
        raise ConfigError(
            f"{named}: holds other masks than when the job was made (digest {found.digest[:12]}, "
            f"not {job.prune.initial_masks_digest[:12]}); restore them, or unset "
            "prune.initial_masks_digest, which makes it another job"
        )
    shapes = {unit.name: tuple(unit.parameter.shape) for unit in units}
    masks = _fit(found, shapes, job.prune.exclude, named)
    if num_to_prune(job.prune.sparsity, masks.num_units) < masks.num_pruned:
        raise ConfigError(
            f"prune.sparsity = {job.prune.sparsity:g}: is below the {masks.sparsity:.4f} of "
            f"{_KEY}, and masks only ever remove; raise it"
        )
    return masks


def _read(job: JobConfig) -> MaskSet:
    try:
        return read_masks_at(job.prune.initial_masks)
    except GbpError as error:
        raise ConfigError(f"{_KEY} = '{job.prune.initial_masks}': {error}") from error


def _fit(
    found: MaskSet, shapes: Mapping[str, tuple[int, ...]], exclude: tuple[str, ...], named: str
) -> MaskSet:
    for name, mask in found.items():
        if name not in shapes:
            # Only the name of an excluded parameter is known here by its glob.
            if is_matched(name, exclude):
                continue
            raise ConfigError(
                f"{named}: masks '{name}', which is no prunable parameter of this network"
                f"{nearest_name(name, list(shapes))}; give masks of the same network, or name it "
                "in prune.exclude"
            )
        if tuple(mask.shape) != shapes[name]:
            raise ConfigError(
                f"{named}: the mask of '{name}' has shape {tuple(mask.shape)}, the weights have "
                f"{shapes[name]}; give masks of the same network, or name it in prune.exclude"
            )
    own = {
        name: found[name] if name in found else torch.ones(shape, dtype=torch.bool)
        for name, shape in shapes.items()
    }
    return MaskSet(own, 0, found.criterion, found.digest)
