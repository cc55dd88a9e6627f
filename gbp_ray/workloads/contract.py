"""The contract of a workload: a network, its data, its loss and metric, and its inputs' range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gbp_ray.errors import ConfigError, WorkloadError, in_one_line

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED",
    "WEIGHT_LAYERS",
    "InputRange",
    "Portion",
    "Workload",
    "bounds_of_inputs",
    "check_range",
    "count_rows",
    "count_top1",
    "in_mode",
    "judged_split",
    "num_examples",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHT_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
"""Layers whose weights can be pruned, tied and folded."""

InputRange = tuple[float | Sequence[float], float | Sequence[float]]
"""(darkest, brightest), each a number or one for each channel."""


def bounds_of_inputs(
    input_range: InputRange | None, inputs: Any, key: str
) -> tuple[Tensor, Tensor]:
    """Returns the values of the darkest and the brightest intensity, shaped to spread over inputs.

    Args:
        inputs: (B, ...) a prepared batch.
        key: Dotted name of the option that needs the range, for messages.

    Raises:
        ConfigError: The workload names no range, or its inputs are no tensor of floating point.
        WorkloadError: The range does not fit the inputs.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or input_range is None:
        raise ConfigError(
            f"{key}: needs a workload of floating-point inputs that says what its darkest and "
            "brightest are; give Workload(input_range=(low, high)), as the network is given them"
        )
    bounds = []
    for bound in input_range:
        values = torch.as_tensor(bound, dtype=inputs.dtype, device=inputs.device)
        if values.ndim == 1 and inputs.ndim >= 2 and len(values) == inputs.shape[1]:
            values = values.view(-1, *[1] * (inputs.ndim - 2))
        elif values.ndim:
            raise WorkloadError(
                f"workload.input_range: has {values.numel()} values for inputs of shape "
                f"{tuple(inputs.shape)}; give a number, or one for each channel"
            )
        bounds.append(values)
    return bounds[0], bounds[1]


def check_range(inputs: Tensor, low: Tensor, high: Tensor) -> None:
    """Raises WorkloadError for inputs outside their bounds by more than rounding, or no range."""
    slack = 1e-3 * (high - low)
    is_outside = (inputs < low - slack) | (inputs > high + slack)
    if bool((low >= high).any()) or bool(is_outside.any()):
        raise WorkloadError(
            f"workload.input_range: inputs run from {inputs.min():.4g} to {inputs.max():.4g} and "
            "leave it; it must hold what `prepare` makes of the intensities 0 and 1"
        )


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
    """A model with its data, loss and metrics.

    Data is a pair of tensors or arrays `(inputs, targets)` whose first axis counts examples, a
    map-style dataset (one of Hugging Face, too), or a DataLoader, of which dataset and collate
    function are taken. Items are `(input, target)` or any other nest of tensors, such as a dict.

    `loss`, `count`, `count_correct` and metrics are given the targets of pairs, and of any other
    items the whole batch.

    Attributes:
        build_model: Makes the dense network; called under a seed of the job.
        train: Examples to score and to train on.
        test: Examples that accuracy and loss are reported on.
        loss: `(outputs, targets) -> scalar`, the mean over the batch, or over the items that
            `count` counts. Left out, outputs for a dict must carry theirs as `outputs.loss`.
        count_correct: `(outputs, targets) -> integer scalar`, how many of the examples are right;
            accuracy is its sum over examples. By default top-1, of (B, classes, ...) outputs and
            (B, ...) labels: where positions are labelled, accuracy is their share, without those
            that the loss ignores.
        prepare: `inputs -> inputs` for every batch, such as scaling bytes to normalised floats; of
            items that are no pairs it takes and gives the whole batch, as `augment` does.
        augment: `inputs -> inputs` for training batches only, before `prepare`; draws from the
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
        forward: `(model, batch) -> outputs`, where the default does not suit: it passes a tensor as
            it is, a dict as keyword arguments, several inputs as arguments.
        collate: `list of items -> batch`, where items cannot be stacked: pads or packs them.
        metrics: Names (accuracy, top5, perplexity, mse, rmse, mae, r2, f1, mIoU), `Metric`s, or
            metrics of torchmetrics whose states are sums. The first one judges; accuracy if empty.
    """

    build_model: Callable[[], nn.Module]
    train: Any
    test: Any
    loss: Callable[[Any, Any], Tensor] = functional.cross_entropy
    count_correct: Callable[[Any, Any], Tensor] = count_top1
    prepare: Callable[[Any], Any] | None = None
    augment: Callable[[Any], Any] | None = None
    input_range: InputRange | None = None
    validation: Any = None
    count: Callable[[Any], float | Tensor] | None = None
    classes: Sequence[str] = ()
    forward: Callable[[nn.Module, Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    metrics: Sequence[Any] = ()

    @cached_property
    def known_counts(self) -> dict[int, Tensor]:
        """Items of training examples that `training.loss` has counted, by the number of ranks."""
        return {}

    def __repr__(self) -> str:
        # The fields hold whole data sets.
        network = getattr(self.build_model, "__qualname__", type(self.build_model).__name__)
        sizes = [f"{num_examples(self.train):,} training", f"{num_examples(self.test):,} test"]
        return f"<Workload {network}, {' and '.join(sizes)} examples>"


def judged_split(workload: Workload) -> str:
    """Names the split that rounds are judged by: "validation" where there is one, else "test"."""
    return "test" if workload.validation is None else "validation"


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


def num_examples(data: Any) -> int:
    """Counts the examples of a split; raises WorkloadError if it has no length."""
    return count_rows(data[0] if isinstance(data, tuple) else data, "workload: examples")


def count_rows(data: Any, what: str) -> int:
    """Counts the rows of a column or data set; raises WorkloadError if it has no length."""
    try:
        return len(data)
    except TypeError as error:
        raise WorkloadError(
            f"{what} cannot be counted ({in_one_line(error)}); give (inputs, targets) or a "
            "map-style dataset"
        ) from error
