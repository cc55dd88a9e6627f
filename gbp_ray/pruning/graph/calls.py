"""Operations of a graph as rules see them: arguments by name, and what every rule can fall back on.

A rule gets the arguments by the names of the operator's schema, and returns the labels of its
results.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from gbp_ray.pruning.graph.labels import Labelled, Tracing, Work

__all__ = ["LETTERS", "Call", "Rule", "Rules", "apply_rule", "axes_of", "freeze_all", "made"]

LETTERS = "".join(map(chr, (*range(ord("a"), ord("z")), *range(0x100, 0x2000))))
"""Names of axes; z, which they lack, is free for an axis of one operand."""


@dataclass(frozen=True)
class Call:
    """One operation: arguments by name, values in place of nodes, and the shapes of its results."""

    given: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns an argument, or the default for one that is not given or None."""
        found = self.given.get(name)
        return default if found is None else found

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the first result."""
        return self.shapes[0]

    def values(self) -> list[Labelled]:
        """Lists the tensors among the arguments."""
        found: list[Labelled] = []

        def collect(nest: Any) -> None:
            if isinstance(nest, Labelled):
                found.append(nest)
            elif isinstance(nest, (tuple, list)):
                for inner in nest:
                    collect(inner)

        collect(list(self.given.values()))
        return found


Rule = Callable[[Tracing, Call], Any]


class Rules(dict[str, Rule]):
    """Rules by the name of the operator, without its overload or the "_" of one in place."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Registers the decorated rule under some names."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names, rule))
            return rule

        return register


def apply_rule(
    rules: Rules, pointwise: Rule, tracing: Tracing, node: fx.Node, env: Mapping[fx.Node, Any]
) -> Any:
    """Couples elements as an operation asks for; returns the labels of its results.

    Args:
        pointwise: The rule of operators that torch tags as such and that have no other.
    """
    if node.target is operator.getitem:
        return _resolve(node.args[0], env)[node.args[1]]
    tracing.is_refused = False
    found, call = _apply(rules, pointwise, tracing, node, env)
    if tracing.is_refused and (macs := _count(node)):
        tracing.work.append(Work(macs, [], ""))
    return _marked(found, all(value.is_constant for value in call.values()))


def _apply(
    rules: Rules, pointwise: Rule, tracing: Tracing, node: fx.Node, env: Mapping[fx.Node, Any]
) -> tuple[Any, Call]:
    shapes = _shapes_of(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload):
        call = Call(_look_up(node, env), shapes)
        return (freeze_all(tracing, call) if shapes else None), call
    given = {}
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        given[argument.name] = _resolve(value, env)
    call = Call(given, shapes)
    name = node.target._opname.rstrip("_")
    rule = rules.get(name)
    if rule is None and _is_pointwise(node.target, name):
        rule = pointwise
    if rule is None and (not call.values() or not shapes):
        rule = made  # of assertions, too, which make nothing
    if rule is None or node.target.namespace not in ("aten", "transformers"):
        return freeze_all(tracing, call), call
    result = rule(tracing, call)
    return (result if isinstance(result, tuple) or len(shapes) < 2 else (result,)), call


def _is_pointwise(target: torch._ops.OpOverload, name: str) -> bool:
    """Asks for torch's tag, which some operators in place lack."""
    packet = getattr(torch.ops.aten, name, None)
    others = [] if packet is None else [getattr(packet, one) for one in packet.overloads()]
    return any(torch.Tag.pointwise in one.tags for one in (target, *others))


def _marked(found: Any, is_constant: bool) -> Any:
    if isinstance(found, Labelled):
        return replace(found, is_constant=is_constant)
    return tuple(_marked(one, is_constant) for one in found) if isinstance(found, tuple) else found


def _count(node: fx.Node) -> int:
    """Counts the multiply-adds of an operation that no rule knows."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    given: list[Any] = [
        fx.node.map_arg(part, lambda source: source.meta["val"])
        for part in (node.args, node.kwargs)
    ]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            node.target(*given[0], **given[1])
    except Exception:  # noqa: BLE001 - operators of others may raise anything without data
        return 0
    return counter.get_total_flops() // 2


def _resolve(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (tuple, list)):
        return [_resolve(inner, env) for inner in value]
    return value


def _look_up(node: fx.Node, env: Mapping[fx.Node, Any]) -> dict[str, Any]:
    return {str(place): env[source] for place, source in enumerate(node.all_input_nodes)}


def _shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, Tensor):
        return (tuple(int(size) for size in value.shape),)
    if isinstance(value, (tuple, list)):
        return tuple(
            tuple(int(size) for size in inner.shape) if isinstance(inner, Tensor) else ()
            for inner in value
        )
    return ()


def freeze_all(tracing: Tracing, call: Call) -> Any:
    """Freezes what an operation touches, for lack of a rule."""
    tracing.is_refused = True
    for value in call.values():
        tracing.freeze(value, f"no rule for {tracing.where}")
    return made(tracing, call)


def made(tracing: Tracing, call: Call) -> Any:
    """Results without labels, of operations that make tensors."""
    made = tuple(Labelled(shape) for shape in call.shapes)
    return made[0] if len(made) == 1 else made or None


def axes_of(value: Labelled, dims: int | Sequence[int] | None) -> list[int]:
    """Returns axes as numbers from 0 on; all of them for None."""
    rank = len(value.shape)
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]
