"""What a network and its data do beside computing: found before training, refused or warned of.

Items are read twice under one seed, and the network passes over a few examples, as in training and
as in evaluation. What differs, or is written where nobody keeps it, would make a run that is done
again, resumed or spread over other workers end in other bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gbp_ray.config.job import JobConfig
from gbp_ray.config.training import Recipe
from gbp_ray.distributed.ranks import Ranks, buffer_slots, checksum, isolated
from gbp_ray.errors import ConfigError, WorkloadError, in_one_line, name_some
from gbp_ray.training.buffers import TrainedBuffers
from gbp_ray.workloads.checks import Checked, find_unreached
from gbp_ray.workloads.contract import Workload, in_mode, num_examples
from gbp_ray.workloads.data import take_batch

__all__ = [
    "Watch",
    "check_evaluated",
    "check_readings",
    "check_training_passes",
]

_NUM_ITEMS = 8


def check_readings(workload: Workload) -> bool:
    """Read items of each split twice under one seed; where they differ, warn and return False."""
    items: list[str] = []
    made: list[str] = []
    for split in ("train", "test", "validation"):
        data = getattr(workload, split)
        if data is None:
            continue
        raw = replace(workload, prepare=None, augment=None)
        seed = 0 if split == "train" else None
        if not isinstance(data, tuple) and not _is_read_alike(raw, split, seed):
            items.append(f"workload.{split}")
        elif (workload.prepare or workload.augment) and not _is_read_alike(workload, split, seed):
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


def _is_read_alike(workload: Workload, split: str, seed: int | None) -> bool:
    data = getattr(workload, split)
    indices = torch.arange(min(_NUM_ITEMS, num_examples(data)))
    one, other = (take_batch(workload, data, indices, augment_seed=seed) for _ in range(2))
    return all(_is_same(a, b) for a, b in zip(one, other, strict=True))


def _is_same(one: object, other: object) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return True
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


class Watch:
    """A network as it was, to find what passes have written since."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums = {name: checksum(p) for name, p in model.named_parameters()}
        self._slots = [(owner, name, b, b.shape) for owner, name, b in buffer_slots(model)]
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        self._numbers = dict(_numbers(model))
        self._has_warned = False
        self._replaced: set[str] = set()

    def parameters(self) -> list[str]:
        """Names the parameters that have other values now."""
        named = self._model.named_parameters()
        return [name for name, p in named if checksum(p) != self._sums.get(name)]

    def check_shapes(self) -> None:
        """Refuses layers that were made since, and buffers that have other shapes now.

        Warns of buffers that were put aside.

        Raises:
            WorkloadError: Naming the first.
        """
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
        """Warns of numbers that are kept as plain attributes, and changed."""
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


def _numbers(model: nn.Module) -> Iterable[tuple[str, float]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float)) and name != "training":
                yield f"{path}.{name}".lstrip("."), value


def _listed(kind: str, names: list[str]) -> str:
    shown = name_some([f"'{name}'" for name in names], 3)
    return f"{kind}{'s' if len(names) > 1 else ''} {shown}"


def check_evaluated(watch: Watch) -> None:
    """Refuses a network that passes in eval mode have changed.

    Raises:
        WorkloadError: Naming a parameter, or a buffer of another shape.
    """
    watch.check_shapes()
    if changed := watch.parameters():
        raise WorkloadError(
            "workload.build_model: a forward pass in eval mode sets "
            f"{_listed('parameter', changed)}; set it in build_model, or only while self.training"
        )
    watch.warn_of_attributes()


def check_training_passes(job: JobConfig, checked: Checked, watch: Watch) -> tuple[str, ...]:
    """Pass over the first batch in training mode; leave buffers as they were.

    Args:
        watch: Of the network as it was built.

    Returns:
        Names of the parameters that the loss does not depend on.

    Raises:
        ConfigError: A pass sets a parameter, which each part of a batch would do for itself.
        WorkloadError: A pass fails, or changes the shape of a buffer.
    """
    workload, model, (inputs, targets) = checked.workload, checked.model, checked.first_batch
    recipes = {name: getattr(job, name) for name in ("pretrain", "finetune")}
    recipes = {name: recipe for name, recipe in recipes.items() if recipe.epochs > 0}
    with in_mode(model, is_training=True):
        # One example has no variance over a batch.
        if not recipes or len(inputs) < 2:
            with isolated(model, 0):
                return find_unreached(model, lambda: workload.loss(model(inputs), targets))
        outputs, unreached, changed = _pass(checked, watch, is_first=True)
        if written := watch.parameters():
            _refuse_parts(job, recipes, written)
        again, *_ = _pass(checked, watch)
        if not _is_same(outputs, again) and not written:
            warnings.warn(
                "outputs of the network differ from one pass to the next under one seed; draw from "
                "the global generators of torch, NumPy or random, which are seeded",
                stacklevel=2,
            )
        if changed:
            _warn_of_unsaved(model, changed)
            _warn_of_parts(recipes, model, inputs, changed)
    return unreached


def _pass(
    checked: Checked, watch: Watch, *, is_first: bool = False
) -> tuple[object, tuple[str, ...], list[str]]:
    """Return outputs, unreached parameters, and changed buffers other than those of norms."""
    workload, model, (inputs, targets) = checked.workload, checked.model, checked.first_batch
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with isolated(model, 0):
        try:
            outputs = model(inputs)
            loss = workload.loss(outputs, targets)
        except Exception as error:
            raise WorkloadError(
                f"workload.train: {len(inputs)} examples in training mode failed with "
                f"{in_one_line(error)}"
            ) from error
        watch.check_shapes()
        watch.warn_of_attributes()
        now = dict(model.named_buffers())
        of_norms = {
            name
            for path, module in model.named_modules()
            if isinstance(module, _NormBase)
            for name in (f"{path}.{own}".lstrip(".") for own in module._buffers)
        }
        changed = [
            name
            for name, value in before.items()
            if name not in of_norms and name in now and not _is_same(value, now[name])
        ]
        if not is_first:
            return outputs, (), changed
        _warn_of_outside_parameters(model, loss)
        return outputs, find_unreached(model, lambda: loss), changed


def _warn_of_outside_parameters(model: nn.Module, loss: Tensor) -> None:
    """Warns of parameters that the loss depends on and the network does not list.

    Such are a loss's own, and those of layers in a plain list.
    """
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


def _refuse_parts(job: JobConfig, recipes: dict[str, Recipe], written: list[str]) -> None:
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


def _warn_of_unsaved(model: nn.Module, changed: list[str]) -> None:
    saved = model.state_dict().keys()
    if unsaved := [name for name in changed if name not in saved]:
        warnings.warn(
            f"workload.build_model: training changes {_listed('buffer', unsaved)}, not saved "
            "(persistent=False), so a resumed run begins with it as it was built",
            stacklevel=3,
        )


def _warn_of_parts(
    recipes: dict[str, Recipe], model: nn.Module, inputs: Tensor, changed: list[str]
) -> None:
    """Warns of buffers that a step of several parts leaves otherwise than one pass would."""
    for section, recipe in recipes.items():
        if recipe.microbatches == 1:
            continue
        # Parts of one example count examples as they count parts.
        size = 1 if recipe.batch_size // recipe.microbatches == 1 else len(inputs) // 2
        one, other = inputs[:size], inputs[size : 2 * size]
        differing: list[str] = []
        # In both orders: the last part may happen to hold what counts.
        for parts in ([one, other], [other, one]):
            whole, joined = _after_step(model, [torch.cat(parts)]), _after_step(model, parts)
            differing += [n for n in changed if not _is_close(whole[n], joined[n])]
        differing = list(dict.fromkeys(differing))
        if differing:
            warnings.warn(
                f"{section}.microbatches = {recipe.microbatches}: after a step of several parts "
                f"{_listed('buffer', differing)} will not hold what one pass over the whole "
                "batch would leave; set microbatches to 1 where that matters",
                stacklevel=4,
            )
            return


def _after_step(model: nn.Module, parts: list[Tensor]) -> dict[str, Tensor]:
    buffers = TrainedBuffers(model, parts[0].device)
    with isolated(model, 0):
        buffers.remember(len(parts))
        collected = []
        for number, part in enumerate(parts):
            model(part)
            collected.append(buffers.collect(number) / len(parts))
        buffers.settle(torch.stack(collected).sum(dim=0), Ranks())
        return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
