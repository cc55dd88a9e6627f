"""A decision over many scores in layers of equal size, each rank holding its rows of each."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gbp_ray.config.prune import PruneConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.pruning.masks import MaskSet
from gbp_ray.pruning.selection import select_masks
from gbp_ray.pruning.thresholds import exact_threshold
from gbp_ray.pruning.units import Layout, Prunable, SlicedScores, num_to_prune

NUM_LAYERS = 60
SPARSITY = 0.9


class LargeDecision:
    """Scores of `size` weights, about; what is drawn depends on the rank.

    Attributes:
        stretch: This rank's scores.
        num_weights: Over all ranks.
    """

    def __init__(self, ranks: Ranks, size: int) -> None:
        self._ranks = ranks
        units = [
            Prunable(
                f"layer{number:02d}.weight",
                nn.Parameter(torch.empty(size // NUM_LAYERS // 100, 100)),
                1,
            )
            for number in range(NUM_LAYERS)
        ]
        self.layout = Layout(units, ranks)
        self.num_weights = self.layout.num_weights
        own = [piece.size for piece in self.layout.own]
        self.stretch = np.random.default_rng(ranks.rank).standard_normal(sum(own), dtype=np.float32)
        np.abs(self.stretch, out=self.stretch)
        self._scores = SlicedScores(self.layout.own, torch.from_numpy(self.stretch).split(own))
        self.dense = MaskSet.dense(units)

    def find_threshold(self) -> float:
        """Finds where the lowest scores end."""
        threshold, _ = exact_threshold(
            self.stretch, num_to_prune(SPARSITY, self.num_weights), self._ranks
        )
        return threshold

    def decide(self, masks: MaskSet | None = None, sparsity: float = SPARSITY) -> MaskSet:
        """Decides as a round does: masks on all ranks, and their digests compared."""
        config = PruneConfig(criterion="taylor", sparsity=sparsity)
        chosen = select_masks(
            self._scores, masks or self.dense, config, sparsity, ranks=self._ranks
        ).masks
        self._ranks.check_agreement(chosen.digest, "the mask")
        return chosen
