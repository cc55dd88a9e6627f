"""The one use of the test split by a trial whose rounds were judged by other examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import nn

from gbp_ray.config import JobConfig
from gbp_ray.errors import PruneError
from gbp_ray.pruning.batchnorm import recalibrate_as_asked
from gbp_ray.pruning.checkpoint import load_weights
from gbp_ray.pruning.evaluation import evaluate
from gbp_ray.pruning.ranks import Ranks
from gbp_ray.records import FinalTest
from gbp_ray.workload import Workload

__all__ = ["measure_final_test"]


def measure_final_test(
    job: JobConfig,
    workload: Workload,
    model: nn.Module,
    ranks: Ranks,
    chosen: int,
    read_weights: Callable[[int], bytes],
    tell: Callable[[int, int, int], None] = lambda number, done, total: None,
) -> FinalTest:
    """Measures the chosen round on the test split, and the dense network beside it. Communicates.

    Args:
        model: Of the trial; it gets the weights of both rounds.
        chosen: Number of the round, from `records.choose_round`.
        read_weights: Number of a round -> its weights.safetensors.
        tell: Called with (number of the round, batches done, batches in all).

    Raises:
        PruneError: A loss is not finite.
        StoreError: Weights cannot be read.
    """
    batch_size = job.workload.eval_batch_size
    measured = []
    for number in (chosen, 0):
        source = f"round_{number:03d}/weights.safetensors"
        weights = ranks.together(lambda number=number: read_weights(number))  # type: ignore[misc]
        load_weights(model, weights, source)
        accuracy, loss = evaluate(model, workload, ranks, batch_size, partial(tell, number))
        if not math.isfinite(loss):
            raise PruneError(f"round {number}: the test loss is {loss:g}; its weights diverged")
        measured.append((accuracy, loss))
    (accuracy, loss), (dense_accuracy, dense_loss) = measured
    recalibrated: tuple[float | None, float | None] = None, None
    if recalibrate_as_asked(job, model, workload, ranks):
        again = evaluate(model, workload, ranks, batch_size, partial(tell, 0))
        recalibrated = again if math.isfinite(again[1]) else recalibrated
    return FinalTest(
        round=chosen,
        accuracy=accuracy,
        loss=loss,
        dense_accuracy=dense_accuracy,
        dense_loss=dense_loss,
        dense_accuracy_recalibrated=recalibrated[0],
        dense_loss_recalibrated=recalibrated[1],
    )
