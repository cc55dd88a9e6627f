"""Both ways in which scores are counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gbp_ray.pruning import counting


@pytest.fixture(params=["on the host", "on a GPU"], scope="module")
def where_scores_lie(request: pytest.FixtureRequest) -> Iterator[str]:
    """Has scores counted as on the host or, in the host's memory, by the code for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "on a GPU":
            patch.setattr(counting, "_OnHost", _as_on_a_gpu)
        yield request.param


def _as_on_a_gpu(scores_L: np.ndarray, kept_L: np.ndarray | None) -> counting.ScoreView:
    kept = None if kept_L is None else torch.from_numpy(kept_L)
    return counting._OnDevice(torch.from_numpy(scores_L), kept)
