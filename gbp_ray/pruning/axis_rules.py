"""What each operator of a graph does to the axes of its operands; see `axes`.

A rule gets the operator's arguments by the names of its schema and returns the labels of its
results. Operators without a rule freeze what they touch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gbp_ray.pruning.axes import FIXED, Block, Labelled, Tracing, Work

__all__ = ["apply_rule"]

_LETTERS = "".join(map(chr, (*range(ord("a"), ord("z")), *range(0x100, 0x2000))))
"""Names of axes; z, which they lack, is free for an axis of one operand."""


@dataclass(frozen=True)
class _Call:
    """One operation: arguments by name, values in place of nodes, and the shapes of its results."""

    given: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
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


_Rule = Callable[[Tracing, _Call], Any]
_RULES: dict[str, _Rule] = {}


def apply_rule(tracing: Tracing, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """Couples elements as an operation asks for; returns the labels of its results."""
    if node.target is operator.getitem:
        return _resolve(node.args[0], env)[node.args[1]]
    shapes = _shapes_of(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload):
        return None if not shapes else _freeze_all(tracing, _Call(_look_up(node, env), shapes))
    given = {}
    for place, argument in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        given[argument.name] = _resolve(value, env)
    call = _Call(given, shapes)
    rule = _RULES.get(node.target._opname.rstrip("_"))
    if rule is None and torch.Tag.pointwise in node.target.tags:
        rule = _pointwise
    if rule is None and not call.values():
        rule = _made
    if rule is None or node.target.namespace != "aten":
        return _freeze_all(tracing, call)
    result = rule(tracing, call)
    return result if isinstance(result, tuple) or len(shapes) < 2 else (result,)


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


def _freeze_all(tracing: Tracing, call: _Call) -> Any:
    for value in call.values():
        tracing.freeze(value, f"no rule for {tracing.where}")
    return _made(tracing, call)


def _made(tracing: Tracing, call: _Call) -> Any:
    """Results without labels, of operations that make tensors."""
    made = tuple(Labelled(shape) for shape in call.shapes)
    return made[0] if len(made) == 1 else made


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _dims(value: Labelled, dims: int | Sequence[int] | None) -> list[int]:
    rank = len(value.shape)
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


# -- element by element ----------------------------------------------------------------------------


def _pointwise(tracing: Tracing, call: _Call) -> Labelled:
    """Couples operands along the axes that broadcasting aligns."""
    values, rank = call.values(), len(call.shape)
    out = _LETTERS[:rank]
    words = [out[rank - len(value.shape) :] for value in values]
    return tracing.couple(values, words, out)


@_rule("where")
def _where(tracing: Tracing, call: _Call) -> Labelled:
    return _pointwise(tracing, call)


@_rule(
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "alias", "detach"),
    *("to", "_to_copy", "type_as", "lift_fresh_copy", "native_dropout", "float", "double", "half"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("requires_grad", "positive", "conj", "resolve_conj", "resolve_neg"),
)
def _same(tracing: Tracing, call: _Call) -> Labelled:
    return call.values()[0]


# -- products --------------------------------------------------------------------------------------


def _contract(
    tracing: Tracing, values: Sequence[Labelled], words: Sequence[str], out: str
) -> Labelled:
    """Sums products of two values over the letters that `out` lacks.

    A weight among them is zero where units are removed, so that its elements are coupled with the
    other's one by one. Of two values that are no weights, each axis that is summed over stays
    whole.
    """
    has_weight = any(value.weight for value in values)
    found = []
    for value, word in zip(values, words, strict=True):
        for dim, letter in enumerate(word):
            if value.weight:
                tracing.plays("out" if letter in out else "in", value, dim)
            elif letter not in out and not has_weight:
                value = _stay_whole(tracing, value, dim)
        found.append(value)
    return tracing.couple(found, words, out, macs_each=1)


def _stay_whole(tracing: Tracing, value: Labelled, dim: int) -> Labelled:
    """Keeps an axis whole; what it was labelled together with is then a head of attention."""
    block = value.block_of(dim)
    value = tracing.whole(value, dim)
    for other in block.dims if block is not None else ():
        if other != dim and (left := value.block_of(other)) is not None:
            tracing.elements.mark_heads(left.ids)
    return value


@_rule("linear")
def _linear(tracing: Tracing, call: _Call) -> Labelled:
    inputs, weight, bias = call["input"], call["weight"], call.get("bias")
    rank = len(inputs.shape)
    lead = _LETTERS[: rank - 1]
    made = _contract(tracing, [inputs, weight], [f"{lead}x", "yx"], f"{lead}y")
    return made if bias is None else tracing.couple([made, bias], [f"{lead}y", "y"], f"{lead}y")


@_rule("matmul", "bmm", "mm", "mv", "dot")
def _matmul(tracing: Tracing, call: _Call) -> Labelled:
    a, b = call.values()
    batch = max(len(a.shape), len(b.shape), 2) - 2
    lead = _LETTERS[:batch]
    left = "x" if len(a.shape) == 1 else f"{lead[batch - len(a.shape) + 2 :]}yx"
    right = "x" if len(b.shape) == 1 else f"{lead[batch - len(b.shape) + 2 :]}xz"
    out = lead + ("y" if len(a.shape) > 1 else "") + ("z" if len(b.shape) > 1 else "")
    return _contract(tracing, [a, b], [left, right], out)


@_rule("addmm", "baddbmm")
def _addmm(tracing: Tracing, call: _Call) -> Labelled:
    added, a, b = call.values()[:3]
    made = _matmul(tracing, _Call({"a": a, "b": b}, call.shapes))
    return _pointwise(tracing, _Call({"a": added, "b": made}, call.shapes))


@_rule("einsum")
def _einsum(tracing: Tracing, call: _Call) -> Labelled:
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    if "->" not in equation or "." in equation or len(operands) != 2:
        return _freeze_all(tracing, call)
    words, out = equation.split("->")
    first, second = words.split(",")
    if any(len(set(word)) < len(word) for word in (first, second)):
        return _freeze_all(tracing, call)
    return _contract(tracing, operands, [first, second], out)


@_rule("conv1d", "conv2d", "conv3d", "convolution")
def _conv(tracing: Tracing, call: _Call) -> Labelled:
    if call.get("transposed"):
        return _conv_transposed(tracing, call)
    inputs, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    inputs, is_single = _with_batch(inputs, len(weight.shape))
    if not weight.weight:
        return _freeze_all(tracing, call)
    # Multiply-adds of one input and output channel.
    each = math.prod(call.shape[-len(weight.shape) + 2 :]) * math.prod(weight.shape[2:])
    tracing.plays("out", weight, 0)
    if groups == 1:
        tracing.plays("in", weight, 1)
        plain = [_flat(inputs, 2), _flat(weight, 2)]
        made = tracing.couple(plain, [f"{_BATCH}x", "yx"], f"{_BATCH}y", macs_each=each)
    else:
        each *= inputs.shape[0] * weight.shape[1]
        made = _conv_by_groups(tracing, inputs, weight, groups, 0, each)
    return _finish_conv(tracing, call, made, is_single)


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(tracing: Tracing, call: _Call) -> Labelled:
    inputs, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    inputs, is_single = _with_batch(inputs, len(weight.shape))
    if not weight.weight:
        return _freeze_all(tracing, call)
    each = math.prod(inputs.shape[2:]) * math.prod(weight.shape[2:])
    if groups == 1:
        tracing.plays("in", weight, 0)
        tracing.plays("out", weight, 1)
        plain = [_flat(inputs, 2), _flat(weight, 2)]
        made = tracing.couple(plain, [f"{_BATCH}x", "xy"], f"{_BATCH}y", macs_each=each)
    else:
        tracing.plays("out", weight, 0)
        each *= inputs.shape[0] * weight.shape[1]
        made = _conv_by_groups(tracing, inputs, weight, groups, 1, each)
    return _finish_conv(tracing, call, made, is_single)


_BATCH = "b"


def _with_batch(value: Labelled, rank: int) -> tuple[Labelled, bool]:
    """Adds the batch axis that a convolution's input may lack."""
    if len(value.shape) == rank:
        return value, False
    moved = {dim: dim + 1 for dim in range(len(value.shape))}
    return value.moved((1, *value.shape), moved), True


def _flat(value: Labelled, number: int) -> Labelled:
    """Keeps the first axes only; those behind have no labels in a convolution."""
    return value.moved(value.shape[:number], {dim: dim for dim in range(number)})


def _conv_by_groups(
    tracing: Tracing, inputs: Labelled, weight: Labelled, groups: int, dim_out: int, each: int
) -> Labelled:
    """Couples all inputs and outputs of each group of channels, which go as a whole.

    Args:
        dim_out: The axis of the weight along which its outputs lie.
        each: Multiply-adds of each row of the weight.
    """
    block, elements = inputs.block_of(1), tracing.elements
    own = {dim: weight.block_of(dim) for dim in (0, 1)}
    first = own[0]
    if block is None or first is None or block.ids.ndim > 1:
        tracing.freeze(weight)
        tracing.freeze(inputs)
        tracing.work.append(Work(each * weight.shape[0], [], weight.weight))
        size = weight.shape[dim_out] * (groups if dim_out else 1)
        return Labelled((inputs.shape[0], size))
    # Of a transposed convolution the inputs lie along the first axis, and the outputs of all
    # groups share the second.
    rows, channels = first.ids.reshape(groups, -1), block.ids.reshape(groups, -1)
    elements.tie_together(rows, 1, tracing.where)
    elements.tie_together(channels, 1, tracing.where)
    elements.tie(rows[:, 0], channels[:, 0], tracing.where)
    if own[1] is not None:
        elements.freeze(own[1].ids, tracing.where)
    tracing.work.append(Work(each, [first.ids], weight.weight))
    per_group = weight.shape[1] if dim_out else weight.shape[0] // groups
    ids = np.repeat(rows[:, 0], per_group)
    return Labelled((inputs.shape[0], len(ids)), (Block((1,), ids),))


def _finish_conv(tracing: Tracing, call: _Call, made: Labelled, is_single: bool) -> Labelled:
    bias = call.get("bias")
    if bias is not None:
        made = tracing.couple([made, bias], [f"{_BATCH}y", "y"], f"{_BATCH}y")
    if is_single:
        return made.moved(call.shape, {1: 0})
    return made.moved(call.shape, {0: 0, 1: 1})


@_rule("scaled_dot_product_attention")
def _attention(tracing: Tracing, call: _Call) -> Labelled:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    rank = len(query.shape)
    if call.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (_repeat_each(v, rank - 3, times) for v in (key, value))
    lead = _LETTERS[: rank - 2]
    scores = _contract(tracing, [query, key], [f"{lead}yx", f"{lead}zx"], f"{lead}yz")
    if mask is not None:
        word = f"{lead}yz"
        scores = tracing.couple([scores, mask], [word, word[rank - len(mask.shape) :]], word)
    scores = tracing.whole(scores, rank - 1)
    return _contract(tracing, [scores, value], [f"{lead}yz", f"{lead}zw"], f"{lead}yw")


def _repeat_each(value: Labelled, dim: int, times: int) -> Labelled:
    """Repeats each position along an axis so often."""
    blocks = tuple(
        Block(b.dims, np.repeat(b.ids, times, axis=b.dims.index(dim))) if dim in b.dims else b
        for b in value.blocks
    )
    shape = list(value.shape)
    shape[dim] *= times
    return Labelled(tuple(shape), blocks)


@_rule("embedding")
def _embedding(tracing: Tracing, call: _Call) -> Labelled:
    weight, indices = call["weight"], call["indices"]
    tracing.plays("out", weight, 1)
    tracing.freeze(indices)
    weight = tracing.whole(weight, 0)
    return weight.moved(call.shape, {1: len(indices.shape)}).as_value()


# -- norms -----------------------------------------------------------------------------------------


@_rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def _batch_norm(tracing: Tracing, call: _Call) -> Labelled:
    inputs = call["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    others = [call.get(name) for name in names if call.get(name) is not None]
    out = _LETTERS[: len(inputs.shape)]
    return tracing.couple([inputs, *others], [out, *["b"] * len(others)], out)


@_rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _layer_norm(tracing: Tracing, call: _Call) -> Labelled:
    inputs, number = call["input"], len(call["normalized_shape"])
    rank = len(inputs.shape)
    inputs = tracing.whole(inputs, *range(rank - number, rank))
    others = [v for v in call.values() if v is not call["input"]]
    out = _LETTERS[:rank]
    return tracing.couple([inputs, *others], [out, *[out[rank - number :]] * len(others)], out)


@_rule("group_norm")
def _group_norm(tracing: Tracing, call: _Call) -> Labelled:
    inputs, groups = call["input"], call["num_groups"]
    block = inputs.block_of(1)
    others = [v for v in (call.get("weight"), call.get("bias")) if v is not None]
    if block is not None and block.ids.ndim == 1:
        rows = block.ids.reshape(groups, -1)
        tracing.elements.tie_together(rows, 1, tracing.where)
    else:
        inputs = tracing.whole(inputs, 1)
    out = _LETTERS[: len(inputs.shape)]
    return tracing.couple([inputs, *others], [out, *["b"] * len(others)], out)


# -- axes as a whole -------------------------------------------------------------------------------


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "flip")
def _along(tracing: Tracing, call: _Call) -> Any:
    value = call.values()[0]
    value = tracing.whole(value, *_dims(value, call.get("dim", call.get("dims"))))
    return value if len(call.shapes) == 1 else (value,) * len(call.shapes)


@_rule("roll")
def _roll(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call["self"]
    return tracing.whole(value, *_dims(value, call["dims"]))


@_rule("topk")
def _topk(tracing: Tracing, call: _Call) -> tuple[Labelled, ...]:
    value = tracing.whole(call["self"], call.get("dim", -1))
    return tuple(replace(value, shape=shape, weight="") for shape in call.shapes)


@_rule(
    *("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "prod"),
    *("logsumexp", "norm", "linalg_vector_norm", "var_mean", "any", "all"),
)
def _reduce(tracing: Tracing, call: _Call) -> Any:
    value: Labelled = call.values()[0]
    if len(call.values()) > 1:
        return _pointwise(tracing, call)
    dims = _dims(value, call.get("dim"))
    value = tracing.whole(value, *dims)
    if len(call.shape) == len(value.shape):
        moved = {dim: dim for dim in range(len(value.shape)) if dim not in dims}
    else:
        left = [dim for dim in range(len(value.shape)) if dim not in dims]
        moved = {dim: place for place, dim in enumerate(left)}
    found = tuple(value.moved(shape, moved).as_value() for shape in call.shapes)
    return found[0] if len(found) == 1 else found


@_rule(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("_adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "max_pool2d_with_indices"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad2d", "grid_sampler"),
)
def _spatial(tracing: Tracing, call: _Call) -> Any:
    """Operations on the axes behind batch and channels, each channel by itself."""
    value: Labelled = call.values()[0]
    for other in call.values()[1:]:
        tracing.freeze(other)
    lead = len(value.shape) - {"1d": 1, "2d": 2, "3d": 3}.get(tracing.where.split(" ")[0][-2:], 2)
    value = tracing.whole(value, *range(lead, len(value.shape)))
    found = tuple(value.moved(shape, {d: d for d in range(lead)}) for shape in call.shapes)
    return found[0] if len(found) == 1 else found


@_rule("pad", "constant_pad_nd")
def _pad(tracing: Tracing, call: _Call) -> Labelled:
    value, widths = call["self"], call["pad"]
    rank = len(value.shape)
    padded = [rank - 1 - n // 2 for n, width in enumerate(widths) if width]
    value = tracing.whole(value, *padded)
    return replace(value, shape=call.shape, weight="")


# -- shapes ----------------------------------------------------------------------------------------


@_rule("view", "reshape", "_unsafe_view", "_reshape_copy", "flatten", "unflatten", "view_as")
@_rule("reshape_as", "squeeze", "unsqueeze", "ravel")
def _reshape(tracing: Tracing, call: _Call) -> Labelled:
    return _to_shape(tracing, call.values()[0], call.shape)


def _to_shape(tracing: Tracing, value: Labelled, shape: tuple[int, ...]) -> Labelled:
    """Follows labels from one shape to another of the same number of elements.

    Both shapes are cut into the shortest stretches of axes that hold equally many elements.
    """
    blocks: list[Block] = []
    done: set[int] = set()
    stretches = list(_stretches(value.shape, shape))
    for old, new in stretches:
        if len(old) == len(new) == 1:
            continue
        inside = [b for b in value.blocks if set(b.dims) & set(old)]
        for block in inside:
            if not set(block.dims) <= set(old) or len(inside) > 1:
                # An axis of it stays, another one is split or merged: keep those whole.
                value = tracing.whole(value, *(dim for dim in old if dim in block.dims))
    value = tracing.simplify(value)
    for old, new in stretches:
        if len(old) == len(new) == 1:
            done.add(old[0])
            continue
        for block in [b for b in value.blocks if set(b.dims) & set(old)]:
            sizes = [value.shape[dim] for dim in old]
            order = np.argsort(block.dims).tolist()
            spread = [n if dim in block.dims else 1 for dim, n in zip(old, sizes, strict=True)]
            table = np.broadcast_to(block.ids.transpose(order).reshape(spread), sizes)
            table = table.reshape([shape[dim] for dim in new])
            found = tracing.simplify(
                Labelled(table.shape, (Block(tuple(range(table.ndim)), table),))
            )
            for part in found.blocks:
                if part.ids.ndim > 1:
                    tracing.tables.append(part.ids)
                blocks.append(Block(tuple(new[dim] for dim in part.dims), part.ids))
    same = {old[0]: new[0] for old, new in stretches if len(old) == len(new) == 1}
    kept = value.moved(shape, same)
    return replace(kept, blocks=(*kept.blocks, *blocks))


def _stretches(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts two shapes where equally many elements have passed; axes of size 1 go along."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j, left, right = i, j, 1, 1
        while i < len(old) and j < len(new) and old[i] == new[j]:
            found.append(((i,), (j,)))
            i, j = i + 1, j + 1
            start_i, start_j = i, j
        if i >= len(old) and j >= len(new):
            break
        while i < len(old) or j < len(new):
            if left == right and left > 1:
                break
            if j >= len(new) or (i < len(old) and left <= right):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((tuple(range(start_i, i)), tuple(range(start_j, j))))
    return found


@_rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "adjoint", "mT", "matrix_H")
def _permute(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call.values()[0]
    rank = len(value.shape)
    order = list(range(rank))
    if call.get("dims") is not None:
        order = [dim % rank for dim in call["dims"]]
    elif call.get("dim0") is not None or call.get("axis0") is not None:
        a, b = (call.get(f"{kind}0") for kind in ("dim", "axis")), ("dim1", "axis1")
        first = next(dim for dim in a if dim is not None) % rank
        second = next(call[name] for name in b if call.get(name) is not None) % rank
        order[first], order[second] = order[second], order[first]
    elif call.get("source") is not None:
        moved = _dims(value, call["source"])
        placed = _dims(value, call["destination"])
        left = iter(dim for dim in range(rank) if dim not in moved)
        order = [moved[placed.index(p)] if p in placed else next(left) for p in range(rank)]
    else:
        order[-2:] = order[-2:][::-1]
    return value.moved(call.shape, {dim: place for place, dim in enumerate(order)})


@_rule("expand", "expand_as", "broadcast_to")
def _expand(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call.values()[0]
    new = len(call.shape) - len(value.shape)
    moved = {d: d + new for d, n in enumerate(value.shape) if n == call.shape[d + new]}
    return value.moved(call.shape, moved)


@_rule("repeat", "tile")
def _repeat(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call["self"]
    new = len(call.shape) - len(value.shape)
    repeats = [call.shape[dim + new] // n for dim, n in enumerate(value.shape)]
    blocks = tuple(
        Block(
            tuple(dim + new for dim in block.dims),
            np.tile(block.ids, [repeats[dim] for dim in block.dims]),
        )
        for block in value.blocks
    )
    return Labelled(call.shape, blocks)


@_rule("repeat_interleave")
def _repeat_interleave(tracing: Tracing, call: _Call) -> Labelled:
    times, dim = call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or dim is None:
        return _freeze_all(tracing, call)
    value: Labelled = call["self"]
    return _repeat_each(value, dim % len(value.shape), times)


@_rule("slice", "narrow")
def _slice(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call["self"]
    changed = [d for d, (a, b) in enumerate(zip(value.shape, call.shape, strict=True)) if a != b]
    return replace(tracing.whole(value, *changed), shape=call.shape, weight="")


@_rule("select", "unbind")
def _select(tracing: Tracing, call: _Call) -> Any:
    value: Labelled = call["self"]
    rank = len(value.shape)
    dim = call.get("dim", 0) % rank
    moved = {d: d - (d > dim) for d in range(rank) if d != dim}

    def take(index: int) -> Labelled:
        blocks = []
        for block in value.blocks:
            if dim not in block.dims:
                blocks.append(Block(tuple(moved[d] for d in block.dims), block.ids))
            elif len(block.dims) > 1:
                place = block.dims.index(dim)
                left = tuple(moved[d] for d in block.dims if d != dim)
                blocks.append(Block(left, block.ids.take(index, axis=place)))
        shape = tuple(n for d, n in enumerate(value.shape) if d != dim)
        return tracing.simplify(Labelled(shape, tuple(blocks), value.weight))

    alone = value.block_of(dim)
    if alone is not None and len(alone.dims) == 1:
        value = tracing.whole(value, dim)
    if "index" in call.given:
        return take(call["index"])
    return tuple(take(index) for index in range(value.shape[dim]))


@_rule("chunk", "split", "split_with_sizes", "tensor_split")
def _split(tracing: Tracing, call: _Call) -> tuple[Labelled, ...]:
    """Couples the parts position by position where they are equal; else the axis stays whole."""
    value: Labelled = call["self"]
    dim = call.get("dim", 0) % len(value.shape)
    sizes = [shape[dim] for shape in call.shapes]
    block = value.block_of(dim)
    if block is not None and len(set(sizes)) > 1:
        value = tracing.whole(value, dim)
    elif block is not None:
        place = block.dims.index(dim)
        parts = np.split(block.ids, len(sizes), axis=place)
        for part in parts[1:]:
            tracing.elements.tie(parts[0], part, tracing.where)
    found, start = [], 0
    for shape in call.shapes:
        stop = start + shape[dim]
        blocks = tuple(
            Block(b.dims, b.ids.take(range(start, stop), axis=b.dims.index(dim)))
            if dim in b.dims
            else b
            for b in value.blocks
        )
        found.append(tracing.simplify(Labelled(shape, blocks, value.weight)))
        start = stop
    return tuple(found)


@_rule("cat", "concat", "concatenate")
def _cat(tracing: Tracing, call: _Call) -> Labelled:
    values = [value for value in call["tensors"] if value.shape != (0,)]
    rank = len(call.shape)
    dim = call.get("dim", 0) % rank
    for number, value in enumerate(values):
        block = value.block_of(dim)
        if block is not None and len(block.dims) > 1:
            values[number] = tracing.whole(value, dim)
    # Along the other axes the parts are coupled; each has a letter of its own for this one.
    out = _LETTERS[:rank]
    words = [out[:dim] + _LETTERS[rank + n] + out[dim + 1 :] for n in range(len(values))]
    rest = tracing.couple(values, words, out)
    rest = replace(rest, shape=call.shape)
    if all(value.block_of(dim) is None for value in values):
        return rest
    ids = [
        np.full(value.shape[dim], FIXED) if (block := value.block_of(dim)) is None else block.ids
        for value in values
    ]
    return replace(rest, blocks=(*rest.blocks, Block((dim,), np.concatenate(ids))))


@_rule("stack")
def _stack(tracing: Tracing, call: _Call) -> Labelled:
    values, rank = call["tensors"], len(call.shape)
    dim = call.get("dim", 0) % rank
    word = _LETTERS[: rank - 1]
    found = tracing.couple(values, [word] * len(values), word)
    return found.moved(call.shape, {d: d + (d >= dim) for d in range(rank - 1)})


@_rule("index")
def _index(tracing: Tracing, call: _Call) -> Labelled:
    value, indices = call["self"], call["indices"]
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in indexed:
        tracing.freeze(indices[dim])
    value = tracing.whole(value, *indexed)
    rank = max(len(indices[dim].shape) for dim in indexed)
    is_adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    start = indexed[0] if is_adjacent else 0
    left = [dim for dim in range(len(value.shape)) if dim not in indexed]
    moved = {dim: n if n < start else n + rank for n, dim in enumerate(left)}
    return value.moved(call.shape, moved).as_value()


@_rule("index_select")
def _index_select(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call["self"]
    value = tracing.whole(value, call["dim"] % len(value.shape))
    return replace(value, shape=call.shape, weight="")


@_rule("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(tracing: Tracing, call: _Call) -> Labelled:
    value: Labelled = call["self"]
    rank = len(value.shape)
    value = tracing.whole(value, rank - 3)
    return value.moved(call.shape, {dim: dim for dim in range(rank - 3)})


# -- recurrent layers ------------------------------------------------------------------------------


@_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(tracing: Tracing, call: _Call) -> tuple[Labelled, ...]:
    """Couples hidden unit i of all layers and directions: a layer has one hidden size for all."""
    if "input" not in call.given:
        return _freeze_all(tracing, call)  # packed sequences
    inputs, params = call["input"], call["params"]
    per = 4 if call["has_biases"] else 2
    ways = 2 if call["bidirectional"] else 1
    elements = tracing.elements
    hidden = params[1].shape[1]
    gates = params[1].shape[0] // hidden
    if len(params) != per * ways * call["num_layers"] or params[1].shape[0] % hidden:
        return _freeze_all(tracing, call)
    for state in [v for v in call.values() if v is not inputs and not v.weight]:
        tracing.freeze(state)
    block = params[1].block_of(1)
    if block is None:
        return _freeze_all(tracing, call)
    units = block.ids
    steps = math.prod(inputs.shape[:-1])
    below = inputs
    for layer in range(call["num_layers"]):
        for way in range(ways):
            start = per * (layer * ways + way)
            own = params[start : start + per]
            for number, param in enumerate(own):
                rows = param.block_of(0)
                elements.tie(rows.ids.reshape(gates, hidden), units[None], tracing.where)
                tracing.plays("out", param, 0)
                if number < 2:
                    tracing.plays("in", param, 1)
            word = _LETTERS[: len(below.shape)]
            tracing.couple([below, own[0]], [word, f"z{word[-1]}"], "", macs_each=1)
            elements.tie(own[1].block_of(1).ids, units, tracing.where)
            tracing.work.append(Work(steps, [own[1].block_of(0).ids, units], own[1].weight))
        joint = np.concatenate([units] * ways)
        shape = (*inputs.shape[:-1], hidden * ways)
        below = Labelled(shape, (Block((len(shape) - 1,), joint),))
    states = [Labelled(s, (Block((len(s) - 1,), units),)) for s in call.shapes[1:]]
    return (below, *states)
