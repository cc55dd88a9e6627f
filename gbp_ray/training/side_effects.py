"""Side effects of networks and data, found before training: refused or warned of.

Items are read twice under one seed, and a few examples pass through the network in eval and in
training mode. Differences, and values written where nothing stores them, would make a repeated or
resumed run, or one on other workers, end in other bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks, buffer_slots, checksum, isolated
from gbp_ray.errors import ConfigError, WorkloadError, in_one_line, name_some
from gbp_ray.training.buffers import TrainedBuffers
from gbp_ray.workloads.batch import Batch, forward, size_of, tensors_in
from gbp_ray.workloads.checks import Checked, find_unreached
from gbp_ray.workloads.contract import Workload, in_mode
from gbp_ray.workloads.data import compare_readings, is_alike
from gbp_ray.workloads.losses import batch_loss, mean_loss

__all__ = [
    "Watch",
    "check_readings",
    "check_training_passes",
]


def check_readings(workload: Workload) -> bool:
    """Reads items of each split twice under one seed; warns, and returns False, if they differ."""
    raw = replace(workload, prepare=None, augment=None)
    items: list[str] = []
    made: list[str] = []
    for split in ("train", "test", "validation"):
        if (data := getattr(workload, split)) is None:
            continue
        seed = 0 if split == "train" else None
        if not isinstance(data, tuple) and not all(compare_readings(raw, data, seed, seed)):
            items.append(f"workload.{split}")
        elif (workload.prepare or workload.augment) and not all(
            compare_readings(workload, data, seed, seed)
        ):
            made.append(f"workload.{split}")
    prepared = "what workload.augment or workload.prepare makes of"
    for what, splits in (("items of", items), (prepared, made)):
        if splits:
            warnings.warn(
                f"{what} {' and '.join(splits)} differ from one reading to the next, so another "
                "run, a resumed one or one on other workers ends in other bits; draw from the "
                "global generators of torch, NumPy or random, which are seeded for each example",
                stacklevel=2,
            )
    return not items and not made


class Watch:
    """Remembers a network, to find the values that passes have written since."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums = {name: checksum(p) for name, p in model.named_parameters()}
        self._slots = [(owner, name, b, b.shape) for owner, name, b in buffer_slots(model)]
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        self._numbers = dict(_numbers(model))
        self._has_warned = False
        self._replaced: set[str] = set()

    def parameters(self) -> list[str]:
        """Names the parameters whose values have changed."""
        named = self._model.named_parameters()
        return [name for name, p in named if checksum(p) != self._sums.get(name)]

    def check_shapes(self) -> None:
        """Raises WorkloadError for new layers and reshaped buffers; warns of replaced buffers."""
        if made := [n for n, _ in self._model.named_parameters() if n not in self._sums]:
            raise WorkloadError(
                f"workload.build_model: a forward pass makes {_listed('parameter', made)}, which "
                "each worker and each round would make for itself; make its layer in build_model, "
                "as by calling the network on one batch there"
            )
        for owner, name, buffer, shape in self._slots:
            path, found = self._names[id(buffer)], owner.get(name)
            if buffer.shape != shape:
                raise WorkloadError(
                    f"workload.build_model: a forward pass gives buffer '{path}' the shape "
                    f"{tuple(buffer.shape)} where it had {tuple(shape)}; give it its shape in "
                    "build_model, as by calling the network on one batch there"
                )
            if (found is None or found.shape != shape) and path not in self._replaced:
                self._replaced.add(path)
                warnings.warn(
                    f"workload.build_model: a forward pass puts another tensor in the place of "
                    f"buffer '{path}', of another shape; what it holds is not kept",
                    stacklevel=3,
                )

    def warn_of_attributes(self) -> None:
        """Warns of plain attributes, as counters are, that have changed."""
        before, self._numbers = self._numbers, dict(_numbers(self._model))
        changed = [n for n, value in before.items() if self._numbers.get(n, value) != value]
        if changed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"workload.build_model: a forward pass changes {_listed('attribute', changed)} of "
                "the network, which a resumed run does not find again and each worker changes by "
                "itself; register what the network computes with as a buffer",
                stacklevel=3,
            )

    def check_evaluated(self) -> None:
        """Raises WorkloadError if passes in eval mode have set a parameter or reshaped a buffer."""
        self.check_shapes()
        if changed := self.parameters():
            raise WorkloadError(
                "workload.build_model: a forward pass in eval mode sets "
                f"{_listed('parameter', changed)}; set it in build_model, or only while "
                "self.training"
            )
        self.warn_of_attributes()


def _numbers(model: nn.Module) -> Iterable[tuple[str, float]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float)) and name != "training":
                yield f"{path}.{name}".lstrip("."), value


def _listed(kind: str, names: list[str]) -> str:
    shown = name_some([f"'{name}'" for name in names], 3)
    return f"{kind}{'s' if len(names) > 1 else ''} {shown}"


def check_training_passes(
    job: JobConfig, recipes: Mapping[str, Recipe], checked: Checked, watch: Watch
) -> tuple[str, ...]:
    """Passes the first batch in training mode, and leaves buffers as they were.

    Args:
        recipes: Of the sections that train.
        watch: Of the network as it was built.

    Returns:
        Names of the parameters that the loss does not depend on.

    Raises:
        ConfigError: A pass sets a parameter, which each part of a batch would do for itself.
        WorkloadError: A pass fails, or changes the shape of a buffer.
    """
    workload, model, batch = checked.workload, checked.model, checked.first_batch
    with in_mode(model, is_training=True):
        # One example has no variance over a batch.
        if not recipes or size_of(batch.inputs) < 2:
            with isolated(model, 0):
                return find_unreached(model, lambda: batch_loss(model, workload, batch))
        with isolated(model, 0):
            outputs, loss, changed = _pass(checked, watch)
            _warn_of_outside_parameters(model, loss)
            unreached = find_unreached(model, lambda: loss)
        if written := watch.parameters():
            _check_parts(job, recipes, written)
        with isolated(model, 0):
            again, *_ = _pass(checked, watch)
        if not is_alike(outputs, again) and not written:
            warnings.warn(
                "outputs of the network differ from one pass to the next under one seed; draw from "
                "the global generators of torch, NumPy or random, which are seeded",
                stacklevel=2,
            )
        saved = model.state_dict().keys()
        if unsaved := [name for name in changed if name not in saved]:
            warnings.warn(
                f"workload.build_model: training changes {_listed('buffer', unsaved)}, not saved "
                "(persistent=False), so a resumed run begins with it as it was built",
                stacklevel=2,
            )
        if changed:
            _warn_of_parts(recipes, checked, changed)
    return unreached


def _pass(checked: Checked, watch: Watch) -> tuple[object, Tensor, list[str]]:
    """Returns outputs, their loss, and the names of changed buffers, except those of norms."""
    workload, model, batch = checked.workload, checked.model, checked.first_batch
    norms = (module for module in model.modules() if isinstance(module, _NormBase))
    of_norms = {id(buffer) for norm in norms for buffer in norm._buffers.values()}
    before = {n: b.clone() for n, b in model.named_buffers() if id(b) not in of_norms}
    try:
        outputs = forward(model, workload, batch)
        loss = mean_loss(workload, outputs, batch.targets)
    except Exception as error:
        raise WorkloadError(
            f"workload.train: {size_of(batch.inputs)} examples in training mode failed with "
            f"{in_one_line(error)}"
        ) from error
    watch.check_shapes()
    watch.warn_of_attributes()
    now = dict(model.named_buffers())
    changed = [n for n, value in before.items() if n in now and not is_alike(value, now[n])]
    return outputs, loss, changed


def _warn_of_outside_parameters(model: nn.Module, loss: Tensor) -> None:
    """Warns of parameters that the network does not list: a loss's own, layers in a plain list."""
    own = {id(parameter) for parameter in model.parameters()}
    nodes, seen, shapes = [loss.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            shapes.append(str(tuple(leaf.shape)))
        nodes += [before for before, _ in node.next_functions]
    if shapes:
        warnings.warn(
            f"workload.build_model: the loss depends on parameters outside the network, of shape "
            f"{name_some(shapes, 3)}, so they are neither trained nor stored; make them the "
            "network's (layers of a list: in an nn.ModuleList), or set requires_grad = False where "
            "they are to stay as they are",
            stacklevel=3,
        )


def _check_parts(job: JobConfig, recipes: Mapping[str, Recipe], written: list[str]) -> None:
    section, recipe = max(recipes.items(), key=lambda item: item[1].microbatches)
    where = f"{section}.microbatches = {recipe.microbatches}"
    if recipe.microbatches == 1:
        if job.cluster.strategy == "replicated":
            return
        where = f"cluster.strategy = {job.cluster.strategy}"
    raise ConfigError(
        f"{where}: a forward pass sets {_listed('parameter', written)}, which each part of a batch "
        "would do for itself; set it in build_model, or have microbatches = 1 and "
        "cluster.strategy = replicated"
    )


def _warn_of_parts(recipes: Mapping[str, Recipe], checked: Checked, changed: list[str]) -> None:
    """Warns of buffers whose values after a step depend on the number of microbatches."""
    batch, total = checked.first_batch, size_of(checked.first_batch.inputs)
    for section, recipe in recipes.items():
        if recipe.microbatches == 1:
            continue
        # Parts of one example count examples as they count parts.
        size = 1 if recipe.batch_size // recipe.microbatches == 1 else total // 2
        one, other, both = (
            batch.part(rows, total)
            for rows in (slice(size), slice(size, 2 * size), slice(2 * size))
        )
        differing: dict[str, None] = {}
        # In both orders: the last part may happen to hold what counts.
        for parts in ([one, other], [other, one]):
            whole, joined = _after_step(checked, [both]), _after_step(checked, parts)
            differing |= {n: None for n in changed if not _is_close(whole[n], joined[n])}
        if differing:
            warnings.warn(
                f"{section}.microbatches = {recipe.microbatches}: after a step of several parts "
                f"{_listed('buffer', list(differing))} will not hold what one pass over the whole "
                "batch would leave; set microbatches to 1 where that matters",
                stacklevel=4,
            )
            return


def _after_step(checked: Checked, parts: list[Batch]) -> dict[str, Tensor]:
    workload, model = checked.workload, checked.model
    buffers = TrainedBuffers(model, next(tensors_in(parts[0].inputs)).device)
    with isolated(model, 0):
        buffers.remember(len(parts))
        collected = []
        for number, part in enumerate(parts):
            forward(model, workload, part)
            collected.append(buffers.collect(number) / len(parts))
        buffers.settle(torch.stack(collected).sum(dim=0), Ranks())
        return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
