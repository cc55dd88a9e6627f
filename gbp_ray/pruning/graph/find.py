"""Finds the units of a network: follows every axis of every weight through its graph.

The graph is that of `torch.export`, in eval mode. Rules say for each operator which elements it
couples (`labels`). A set of elements is a unit if some weight makes it and some weight reads it. An
operator without a rule, or one that looks at an axis as a whole, such as a softmax, freezes what it
touches, and the reason is kept.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gbp_ray.errors import PruneError, in_one_line
from gbp_ray.pruning.graph import channels, products, shapes
from gbp_ray.pruning.graph.calls import Rules, apply_rule
from gbp_ray.pruning.graph.labels import Block, Elements, Labelled, Tracing
from gbp_ray.pruning.removal.caches import find_caches
from gbp_ray.pruning.structure import Axis, Group, Product, Role, Slice, Structure

__all__ = ["find_structure"]

_RULES = Rules({**channels.RULES, **products.RULES, **shapes.RULES})


def find_structure(
    model: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[..., Sequence[Tensor]],
    exclude: Iterable[str] = (),
    kinds: Iterable[str] = ("channel", "head"),
) -> Structure:
    """Finds the units of a network and what they cost, from one example.

    Args:
        model: Unsharded, on any device, the meta device included. It is left as it is.
        inputs: The tensors of one example.
        run: (model, *inputs) -> the outputs that count.
        exclude: First names of parameters that no unit may lie in.
        kinds: Of the groups that may lose units.

    Raises:
        PruneError: torch.export cannot follow the network.
    """
    program = _export(model, inputs, run)
    tracing = Tracing()
    names = _first_names(model)
    parameters = dict(model.named_parameters())
    tensors = {**parameters, **dict(model.named_buffers())}
    program.graph.eliminate_dead_code()
    _follow(program, tracing, names, parameters)
    if not parameters.keys() <= tracing.seen:
        # Layers that training alone calls read units, too, such as auxiliary heads.
        work = list(tracing.work)
        with suppress(PruneError):
            both = [torch.cat([tensor, tensor]) if tensor.ndim else tensor for tensor in inputs]
            trained = _export(model, both, run, is_training=True)
            _follow(trained, tracing, names, parameters)
        tracing.work = work
    fixed = dict.fromkeys(exclude, "prune.exclude") | _fixed_by_layers(model, names)
    for (name, _), own in tracing.ids.items():
        if name in fixed:
            tracing.elements.freeze(own, fixed[name])
    _decide_tables(tracing)
    _join_heads(tracing)
    return _build(tracing, tensors, set(parameters), tuple(kinds))


def _follow(
    program: Any, tracing: Tracing, names: Mapping[str, str], parameters: Mapping[str, Tensor]
) -> None:
    """Applies the rule of each operation of a graph."""
    env: dict[Any, Any] = {}
    signature = program.graph_signature
    of_inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    given = set(signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(of_inputs.get(node.name, "").removeprefix("network."), "")
            is_parameter, is_constant = name in parameters, node.name not in given
            if node.users:
                tracing.seen.add(name)
            env[node] = _label(node, name, tracing, is_parameter, is_constant)
        elif node.op == "output":
            tracing.where = "the network's outputs"
            for source in node.all_input_nodes:
                if isinstance(env[source], Labelled):
                    tracing.freeze(env[source])
        else:
            tracing.where, tracing.path = _describe(node)
            env[node] = apply_rule(_RULES, channels.pointwise, tracing, node, env)


class _Passing(nn.Module):
    """A network with the pass that a workload makes through it."""

    def __init__(self, network: nn.Module, run: Callable[..., Sequence[Tensor]]) -> None:
        super().__init__()
        self.network, self._run = network, run

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._run(self.network, *inputs))


def _export(
    model: nn.Module,
    inputs: Sequence[Tensor],
    run: Callable[..., Sequence[Tensor]],
    *,
    is_training: bool = False,
) -> Any:
    # The copy shares the tensors: export puts others in their place while it looks.
    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            find_caches(twin, lambda network: run(network, *inputs))  # which takes them out
            passing = _Passing(twin, run).train(is_training)
            with redirect_stderr(io.StringIO()):  # where it prints the graph as far as it came
                return torch.export.export(passing, tuple(inputs), strict=False)
    except Exception as error:
        raise PruneError(
            "prune.granularity: torch.export cannot follow this network "
            f"({in_one_line(error)[:200]}); units of it are not known, so set granularity to "
            '"weight", or avoid what it names'
        ) from error


def _first_names(model: nn.Module) -> dict[str, str]:
    """Maps every name of a parameter or buffer to its first one."""
    first: dict[int, str] = {}
    pairs = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in pairs}


def _fixed_by_layers(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Names the weights of layers whose code takes one width for several axes."""
    return {
        names[f"{path}.{name}".lstrip(".")]: f"nn.MultiheadAttention in '{path}' has as many "
        "channels in all heads as outside"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for name, _ in module.named_parameters()
        if name.startswith(("in_proj", "q_proj", "k_proj", "v_proj"))
    }


def _label(
    node: Any, name: str, tracing: Tracing, is_parameter: bool, is_constant: bool
) -> Labelled | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(int(size) for size in value.shape)
    if not is_parameter:
        # A buffer is labelled where it meets channels, since most have none.
        buffers = (name,) if name and len(shape) == 1 else ()
        return Labelled(shape, buffers=buffers, is_constant=is_constant)
    return Labelled(shape, tracing.label(name, shape), name, is_constant=True)


def _describe(node: Any) -> tuple[str, str]:
    """Names an operation with the module that it is in, and gives the path of that."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    path = paths[-1].removeprefix("network").lstrip(".") if paths else ""
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return f"{name} in '{path}'" if path else str(name), path


def _decide_tables(tracing: Tracing) -> None:
    """Couples elements until those of each table go by whole rows of one of its axes."""
    elements, is_changed = tracing.elements, True
    while is_changed:
        is_changed = False
        for _, table in tracing.tables:
            ids = _undecided(tracing, table)
            if ids is None or ids.ndim == 1:
                continue
            kept = int(np.argmax(ids.shape))
            rows = np.moveaxis(ids, kept, 0).reshape(ids.shape[kept], -1)
            elements.tie_together(rows, 1, "a reshape")
            is_changed = True


def _undecided(tracing: Tracing, table: np.ndarray) -> np.ndarray | None:
    value = Labelled(table.shape, (Block(tuple(range(table.ndim)), table),))
    blocks = tracing.simplify(value).blocks
    return blocks[0].ids if blocks else None


def _join_heads(tracing: Tracing) -> None:
    """Couples heads of one module that no product couples, such as those that talk.

    The module has one number of heads for queries and values.
    """
    by_module: dict[tuple[str, int], np.ndarray] = {}
    for path, table in tracing.tables:
        ids = _undecided(tracing, table)
        if not path or ids is None or ids.ndim > 1 or not all(map(tracing.elements.is_head, ids)):
            continue
        roots = tracing.elements.find_all(ids)
        heads = roots[np.sort(np.unique(roots, return_index=True)[1])]
        first = by_module.setdefault((path, len(heads)), heads)
        tracing.elements.tie(first, heads, f"heads of '{path}'")


def _why_frozen(elements: Elements, own: np.ndarray) -> str:
    """Words why positions of an axis are no units, "" where all of them are."""
    whys = [why for why in map(elements.why_frozen, own.tolist()) if why]
    if not whys:
        return ""
    part = "" if len(whys) == len(own) else f" ({len(whys)} of {len(own)})"
    return f"{whys[0]}{part}"


def _build(
    tracing: Tracing,
    tensors: Mapping[str, Tensor],
    parameters: set[str],
    kinds: tuple[str, ...],
) -> Structure:
    elements, ids = tracing.elements, tracing.ids
    places: dict[int, list[tuple[str, int, list[int]]]] = {}
    for (name, dim), own in ids.items():
        roots = elements.find_all(own)
        if (roots == roots[0]).all():
            elements.freeze(roots[:1], "would leave nothing of the axis")
        by_root: dict[int, list[int]] = {}
        for position, root in enumerate(roots.tolist()):
            by_root.setdefault(root, []).append(position)
        for root, positions in by_root.items():
            places.setdefault(root, []).append((name, dim, positions))

    def role_of(name: str, dim: int) -> set[Role]:
        return tracing.roles.get(int(ids[name, dim][0]), set())

    # Code holds a number for each side that it pads, so the units of each side are a group.
    sides: dict[int, list[int]] = {}
    for number, own in enumerate(tracing.zeros):
        for root in elements.find_all(own).tolist():
            sides.setdefault(root, []).append(number)
    units: dict[tuple[Any, ...], list[int]] = {}
    for root, found in places.items():
        roles = {r for name, dim, _ in found if name in parameters for r in role_of(name, dim)}
        if not {"in", "out"} <= roles:
            elements.freeze(np.array([root]), "no weight both makes and reads it")
        kind = "head" if elements.is_head(root) else "channel"
        if kind not in kinds:
            elements.freeze(np.array([root]), f"a {kind}, which prune.granularity leaves alone")
        if not elements.why_frozen(root):
            signature = tuple((name, dim, len(positions)) for name, dim, positions in found)
            units.setdefault((signature, tuple(sides.get(root, ()))), []).append(root)
    groups: list[Group] = []
    makers_of: dict[str, int] = {}
    group_of: dict[int, int] = {}
    for (signature, _), members in units.items():
        slices = tuple(
            Slice(
                name,
                dim,
                np.array([places[root][number][2] for root in members]),
                "in" if "in" in role_of(name, dim) else "out",
            )
            for number, (name, dim, _) in enumerate(signature)
        )
        makers = [name for name, dim, _ in signature if "out" in role_of(name, dim)]
        kind = "head" if elements.is_head(members[0]) else "channel"
        group_of.update(dict.fromkeys(members, len(groups)))
        so_far = makers_of[makers[0]] = makers_of.get(makers[0], 0) + 1
        name = makers[0] if so_far == 1 else f"{makers[0]} ({so_far})"
        groups.append(Group(name, kind, len(members), slices))  # type: ignore[arg-type]

    def axis_of(table: np.ndarray) -> Axis:
        roots = elements.find_all(table).reshape(-1).tolist()
        counts: dict[int, int] = {}
        for root in roots:
            if root in group_of:
                counts[group_of[root]] = counts.get(group_of[root], 0) + 1
        per_unit = tuple((g, n // groups[g].num_units) for g, n in sorted(counts.items()))
        return Axis(len(roots) - sum(counts.values()), per_unit)

    def product_of(factor: int, tables: Iterable[np.ndarray], name: str) -> Product:
        axes = []
        for table in tables:
            axis = axis_of(table)
            if axis.per_unit:
                axes.append(axis)
            else:
                factor *= axis.fixed
        return Product(factor, tuple(axes), name)

    weights = []
    for name in sorted(parameters):
        shape = tensors[name].shape
        known = [ids[name, dim] for dim in range(len(shape)) if (name, dim) in ids]
        factor = int(
            np.prod([n for dim, n in enumerate(shape) if (name, dim) not in ids], initial=1)
        )
        weights.append(product_of(factor, known, name))
    shapes = {part.name: tuple(tensors[part.name].shape) for g in groups for part in g.slices}
    frozen = {
        f"{name}[{dim}]": why
        for (name, dim), own in ids.items()
        if "out" in role_of(name, dim) and (why := _why_frozen(elements, own))
    }
    return Structure(
        tuple(groups),
        tuple(product_of(work.factor, work.tables, work.name) for work in tracing.work),
        tuple(weights),
        {name: tensors[name].element_size() for name in parameters},
        shapes,
        frozen,
    )
