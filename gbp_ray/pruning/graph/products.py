"""Rules of products: linear layers, convolutions, attention, recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gbp_ray.pruning.graph.calls import LETTERS, Call, Rules, freeze_all
from gbp_ray.pruning.graph.channels import pointwise
from gbp_ray.pruning.graph.labels import Block, Labelled, Tracing, Work
from gbp_ray.pruning.graph.shapes import repeat_each

__all__ = ["RULES"]

RULES = Rules()


def _contract(
    tracing: Tracing, values: Sequence[Labelled], words: Sequence[str], out: str
) -> Labelled:
    """Sums products of two values over the letters that `out` lacks.

    A weight among them is zero where units are removed, so that its elements are coupled with the
    other's one by one. Of two values that are no weights, each axis that is summed over stays
    whole.
    """
    has_weight = any(value.weight for value in values)
    is_of_weights = all(value.weight for value in values)
    shared = set(words[0]) & set(words[1]) & set(out)
    found = []
    for value, word in zip(values, words, strict=True):
        for dim, letter in enumerate(word):
            if value.weight:
                tracing.plays("out" if letter in out else "in", value, dim)
                if is_of_weights:
                    tracing.plays("out", value, dim)  # what one of them makes, the other reads
            elif letter not in out and (value.is_constant or not has_weight):
                # What is computed from weights may not be zero where they are.
                value = tracing.whole(value, dim)
            elif letter in out:
                tracing.plays("out", value, dim)
        for dim, letter in enumerate(word):
            block = value.block_of(dim)
            if letter in shared and block is not None and not has_weight:
                tracing.elements.mark_heads(block.ids)
        found.append(value)
    return tracing.couple(found, words, out, macs_each=1)


@RULES.of("linear")
def _linear(tracing: Tracing, call: Call) -> Labelled:
    inputs, weight, bias = call["input"], call["weight"], call.get("bias")
    rank = len(inputs.shape)
    lead = LETTERS[: rank - 1]
    made = _contract(tracing, [inputs, weight], [f"{lead}x", "yx"], f"{lead}y")
    return made if bias is None else tracing.couple([made, bias], [f"{lead}y", "y"], f"{lead}y")


@RULES.of("matmul", "bmm", "mm", "mv", "dot")
def _matmul(tracing: Tracing, call: Call) -> Labelled:
    a, b = call.values()
    batch = max(len(a.shape), len(b.shape), 2) - 2
    lead = LETTERS[:batch]
    left = "x" if len(a.shape) == 1 else f"{lead[batch - len(a.shape) + 2 :]}yx"
    right = "x" if len(b.shape) == 1 else f"{lead[batch - len(b.shape) + 2 :]}xz"
    out = lead + ("y" if len(a.shape) > 1 else "") + ("z" if len(b.shape) > 1 else "")
    return _contract(tracing, [a, b], [left, right], out)


@RULES.of("addmm", "baddbmm")
def _addmm(tracing: Tracing, call: Call) -> Labelled:
    added, a, b = call.values()[:3]
    made = _matmul(tracing, Call({"a": a, "b": b}, call.shapes))
    return pointwise(tracing, Call({"a": added, "b": made}, call.shapes))


@RULES.of("_grouped_mm", "grouped_mm_fallback")
def _grouped_mm(tracing: Tracing, call: Call) -> Labelled:
    """Products of rows that are dealt to experts, of which each row meets one."""
    rows, experts = call.values()[:2]
    if len(rows.shape) != 2 or len(experts.shape) != 3:
        return freeze_all(tracing, call)
    experts = tracing.whole(experts, 0).moved(experts.shape[1:], {1: 0, 2: 1})
    return _contract(tracing, [rows, experts], ["yx", "xw"], "yw")


@RULES.of("einsum")
def _einsum(tracing: Tracing, call: Call) -> Labelled:
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    if "->" not in equation or "." in equation or len(operands) != 2:
        return freeze_all(tracing, call)
    words, out = equation.split("->")
    first, second = words.split(",")
    if any(len(set(word)) < len(word) for word in (first, second)):
        return freeze_all(tracing, call)
    return _contract(tracing, operands, [first, second], out)


@RULES.of("conv1d", "conv2d", "conv3d", "convolution")
def _conv(tracing: Tracing, call: Call) -> Labelled:
    if call.get("transposed"):
        return _conv_transposed(tracing, call)
    inputs, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    inputs, is_single = _with_batch(inputs, len(weight.shape))
    if not weight.is_constant:
        return freeze_all(tracing, call)
    if not weight.weight:
        # What is computed from weights may not be zero where they are.
        weight = tracing.whole(weight, 1)
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


@RULES.of("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(tracing: Tracing, call: Call) -> Labelled:
    inputs, weight, groups = call["input"], call["weight"], call.get("groups", 1)
    inputs, is_single = _with_batch(inputs, len(weight.shape))
    if not weight.is_constant:
        return freeze_all(tracing, call)
    if not weight.weight:
        weight = tracing.whole(weight, 0)
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


def _finish_conv(tracing: Tracing, call: Call, made: Labelled, is_single: bool) -> Labelled:
    bias = call.get("bias")
    if bias is not None:
        made = tracing.couple([made, bias], [f"{_BATCH}y", "y"], f"{_BATCH}y")
    if is_single:
        return made.moved(call.shape, {1: 0})
    return made.moved(call.shape, {0: 0, 1: 1})


@RULES.of("scaled_dot_product_attention")
def _attention(tracing: Tracing, call: Call) -> Labelled:
    query, key, value, mask = call["query"], call["key"], call["value"], call.get("attn_mask")
    rank = len(query.shape)
    if call.get("enable_gqa"):
        times = query.shape[-3] // key.shape[-3]
        key, value = (repeat_each(v, rank - 3, times) for v in (key, value))
    lead = LETTERS[: rank - 2]
    scores = _contract(tracing, [query, key], [f"{lead}yx", f"{lead}zx"], f"{lead}yz")
    if mask is not None:
        word = f"{lead}yz"
        scores = tracing.couple([scores, mask], [word, word[rank - len(mask.shape) :]], word)
    scores = tracing.whole(scores, rank - 1)
    # Networks compute the number of heads from the channels of one, which so stay as many.
    value = tracing.whole(value, rank - 1)
    return _contract(tracing, [scores, value], [f"{lead}yz", f"{lead}zw"], f"{lead}yw")


@RULES.of("embedding")
def _embedding(tracing: Tracing, call: Call) -> Labelled:
    weight, indices = call["weight"], call["indices"]
    tracing.plays("out", weight, 1)
    tracing.freeze(indices)
    weight = tracing.whole(weight, 0)
    return weight.moved(call.shape, {1: len(indices.shape)}).as_value()


@RULES.of("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(tracing: Tracing, call: Call) -> tuple[Labelled, ...]:
    """Couples hidden unit i of all layers and directions: a layer has one hidden size for all."""
    if "input" not in call.given:
        return freeze_all(tracing, call)  # packed sequences
    inputs, params = call["input"], call["params"]
    per = 4 if call["has_biases"] else 2
    ways = 2 if call["bidirectional"] else 1
    elements = tracing.elements
    hidden = params[1].shape[1]
    gates = params[1].shape[0] // hidden
    if len(params) != per * ways * call["num_layers"] or params[1].shape[0] % hidden:
        return freeze_all(tracing, call)
    for state in [v for v in call.values() if v is not inputs and not v.weight]:
        tracing.freeze(state)
    block = params[1].block_of(1)
    if block is None:
        return freeze_all(tracing, call)
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
            word = LETTERS[: len(below.shape)]
            tracing.couple([below, own[0]], [word, f"z{word[-1]}"], "", macs_each=1)
            elements.tie(own[1].block_of(1).ids, units, tracing.where)
            tracing.work.append(Work(steps, [own[1].block_of(0).ids, units], own[1].weight))
        joint = np.concatenate([units] * ways)
        shape = (*inputs.shape[:-1], hidden * ways)
        below = Labelled(shape, (Block((len(shape) - 1,), joint),))
    states = [Labelled(s, (Block((len(s) - 1,), units),)) for s in call.shapes[1:]]
    return (below, *states)


@RULES.of("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(tracing: Tracing, call: Call) -> Any:
    """Couples hidden unit i in all gates and states; zeros that a state begins with follow."""
    inputs, own = call["input"], [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    own = [param for param in own if param is not None]
    hidden = own[1].shape[1]
    block, elements = own[1].block_of(1), tracing.elements
    if block is None or any(param.block_of(0) is None for param in own):
        return freeze_all(tracing, call)
    for number, param in enumerate(own):
        rows = param.block_of(0).ids.reshape(-1, hidden)
        elements.tie(rows, block.ids[None], tracing.where)
        tracing.plays("out", param, 0)
        if number < 2:
            tracing.plays("in", param, 1)
    word = LETTERS[: len(inputs.shape)]
    tracing.couple([inputs, own[0]], [word, f"z{word[-1]}"], "", macs_each=1)
    steps = math.prod(inputs.shape[:-1])
    tracing.work.append(Work(steps, [own[1].block_of(0).ids, block.ids], own[1].weight))
    states = call["hx"] if isinstance(call["hx"], list) else [call["hx"]]
    for state in states:
        found = state.block_of(len(state.shape) - 1)
        if found is not None and found.ids.ndim == 1:
            elements.tie(found.ids, block.ids, tracing.where)
        else:
            tracing.freeze(state)
    made = tuple(Labelled(s, (Block((len(s) - 1,), block.ids),)) for s in call.shapes)
    return made[0] if len(made) == 1 else made
