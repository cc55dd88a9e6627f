"""`gbp-ray apply`: the masks of one network on the weights of another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import Tensor

from gbp_ray.errors import ConfigError, PruneError, StoreError
from gbp_ray.pruning.masks import MaskSet, read_masks_at
from gbp_ray.results.store import locate_round
from gbp_ray.workloads.weight_files import SUFFIXES, name_of, read_weights, suffix_of
from gbp_ray.workloads.weights import pick_state, save_state

__all__ = [
    "Applied",
    "apply_masks",
]


@dataclass(frozen=True)
class Applied:
    """The result of `apply_masks`.

    Attributes:
        file: The masked weights.
        num_units: Weights under a mask.
        num_pruned: Those that are zero by it.
        num_changed: Those of them that were not zero before.
        mask_digest: Of the masks.
    """

    file: str
    num_units: int
    num_pruned: int
    num_changed: int
    mask_digest: str

    @property
    def sparsity(self) -> float:
        """Removed weights / weights under a mask."""
        return self.num_pruned / self.num_units


def apply_masks(masks: str, checkpoint: str, to: str | Path | None = None) -> Applied:
    """Sets weights to zero where masks say so, and writes them as safetensors.

    Args:
        masks: A mask file, or the folder of a round or of a trial.
        checkpoint: A file of weights (.safetensors, .pt, ...), or likewise a round or a trial.
        to: The file to write; by default beside the working folder's other files, named after
            the checkpoint.

    Raises:
        ConfigError: `to` is the checkpoint or no .safetensors file, or it holds no weights.
        PruneError: A masked parameter is missing or has another shape; nothing is written.
        StoreError: Something cannot be read or written.
        WorkloadError: The checkpoint cannot be read.
    """
    target = Path(to) if to is not None else Path(f"{_stem(checkpoint)}-masked.safetensors")
    if target.suffix != ".safetensors":
        raise ConfigError(f"--to = '{target}': must end in .safetensors, which is what is written")
    if target.exists() and Path(checkpoint).exists() and target.samefile(checkpoint):
        raise ConfigError(f"--to = '{target}': is CHECKPOINT itself; give another file")
    found = read_masks_at(masks)
    state = _read_weights(checkpoint, found)
    num_changed = sum(
        int((state[name] != 0)[~mask].sum())
        for name, mask in found.items()
        if name in state and state[name].shape == mask.shape
    )
    try:
        found.apply_(state)
    except PruneError as error:
        fault = str(error).removeprefix("target: ")
        raise PruneError(
            f"CHECKPOINT = '{checkpoint}': {fault}; masks fit the network that they were made for, "
            "and others with the same parameters"
        ) from None
    _write(target, state, found)
    return Applied(str(target), found.num_units, found.num_pruned, num_changed, found.digest)


def _read_weights(checkpoint: str, masks: MaskSet) -> dict[str, Tensor]:
    if suffix_of(checkpoint) in SUFFIXES:
        wanted = dict(masks.items())

        def find_faults(state: dict[str, Tensor]) -> str:
            fits = all(n in state and state[n].shape == mask.shape for n, mask in wanted.items())
            return "" if fits else "a mask has no weights of its shape"

        file = read_weights(checkpoint, "CHECKPOINT")
        return pick_state(file, wanted, find_faults, with_numbers=True)
    if Path(checkpoint).is_file():
        raise ConfigError(
            f"CHECKPOINT = '{checkpoint}': must end in {', '.join(SUFFIXES[:-1])} or "
            f"{SUFFIXES[-1]}, or be the folder of a round or a trial"
        )
    store, trial, record = locate_round(checkpoint)
    return load_tensors(store.read_file(trial, record, "weights.safetensors"))


def _stem(checkpoint: str) -> str:
    name, suffix = name_of(checkpoint), suffix_of(checkpoint)
    return name[: -len(suffix)] if suffix in SUFFIXES else name


def _write(target: Path, state: dict[str, Tensor], masks: MaskSet) -> None:
    data = save_state(state, {"mask_digest": masks.digest})
    try:
        aside = target.with_name(f".{target.name}.part")
        aside.write_bytes(data)
        aside.replace(target)
    except OSError as error:
        raise StoreError(f"--to = '{target}': cannot be written: {error.strerror}") from None
