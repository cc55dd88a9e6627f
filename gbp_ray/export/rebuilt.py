"""The networks of a finished trial, rebuilt from storage: dense, masked, and without its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gbp_ray.distributed.agreement import check_data
from gbp_ray.errors import ExportError, PruneError
from gbp_ray.export.compacted import Compact, compact_network
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.removal.layers import KEPT_AS_ZEROS
from gbp_ray.results.records import RoundRecord, TrialRecord
from gbp_ray.results.store import Store, locate_finished
from gbp_ray.training.network import rebuild_network
from gbp_ray.training.passes import count_macs
from gbp_ray.workloads.batch import forward
from gbp_ray.workloads.code import admit_code, warn_of_changed_code
from gbp_ray.workloads.contract import Workload
from gbp_ray.workloads.data import first_example
from gbp_ray.workloads.loading import load_workload

__all__ = [
    "StoredRound",
    "open_round",
]


@dataclass(frozen=True)
class StoredRound:
    """A round of a finished trial, with the workload that its networks are built by."""

    store: Store
    trial: TrialRecord
    record: RoundRecord
    workload: Workload

    def read(self, file: str, record: RoundRecord | None = None) -> bytes:
        """Reads a file of this round, or of another one."""
        return self.store.read_file(self.trial.trial_id, record or self.record, file)

    def rebuild(self, weights: bytes) -> nn.Module:
        """Builds the network of dense shapes with a round's weights, in eval mode.

        Raises:
            StoreError: The weights are damaged or do not fit.
            WorkloadError: The network cannot be built, or has changed.
        """
        known = self.trial.dense.fingerprints
        seed = self.trial.job.seed
        return rebuild_network(self.workload, seed, weights, "weights.safetensors", known)

    def rebuild_masked(self, weights: bytes, packed: bytes) -> tuple[nn.Module, MaskSet]:
        """Builds the network of this round, with zeros in place of what was removed.

        Args:
            weights: weights.safetensors of this round.
            packed: masks.safetensors.

        Raises:
            ExportError: Its weights do not fit its masks.
        """
        masks = MaskSet.from_bytes(packed, "masks.safetensors")
        model = self.rebuild(weights)
        if (revived := masks.find_revived(model)) is not None:
            raise ExportError(
                f"'{revived}': has weights other than zero where its mask removes them"
            )
        return model, masks

    def compact(self, masked: nn.Module, masks: MaskSet) -> tuple[Compact | None, str]:
        """Removes the units of a masked network, on a copy.

        Returns:
            None where nothing is removed as a unit, or where the job keeps units as zeros and the
            network cannot go without them; then the reason, else "".

        Raises:
            ExportError: It cannot go without them, and did in the trial.
        """
        try:
            return compact_network(self.trial.job, self.workload, masked, masks), ""
        except PruneError as error:
            if not self.trial.job.prune.compact:
                return None, str(error).removesuffix(f"; {KEPT_AS_ZEROS}")
            raise ExportError(f"units cannot be removed as in the trial: {error}") from error

    def count_macs(self, model: nn.Module) -> int:
        """Counts the multiply-adds of one example; 0 where they cannot be counted."""
        example = first_example(self.workload)
        return count_macs(model, example, lambda m, batch: forward(m, self.workload, batch)).total


def open_round(
    uri: str | Path, *, code: str | Path = "", trust_code: Sequence[str] = ()
) -> StoredRound:
    """Finds a round of a finished trial, and loads its workload.

    Args:
        uri: A round's folder, or a trial's: that gives the round which the trial is for.
        code: A folder of the job's own modules, searched in addition to the working folder.
        trust_code: Code that may run though only the record names it; see `admit_code`.

    Raises:
        ConfigError: The record names code that is neither built in nor trusted.
        StoreError: The round cannot be read, or its trial has not finished.
        WorkloadError: The data are not available any more, or others.
    """
    store, trial, record = locate_finished(uri)
    address = store.trial_uri(trial.trial_id)
    admit_code(trial.job, address, trust_code, [code] if code else [])
    warn_of_changed_code(trial.sources, trial.trial_id, trial.job)
    workload = load_workload(trial.job.workload, trial.job.seed)
    check_data(workload, trial.dense.fingerprints, address)
    return StoredRound(store, trial, record, workload)
