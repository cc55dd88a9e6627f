"""Rules of operators that move axes: reshape, permute, cat, split and their like."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gbp_ray.pruning.graph.calls import LETTERS, Call, Rules, axes_of, freeze_all
from gbp_ray.pruning.graph.labels import FIXED, Block, Labelled, Tracing

__all__ = ["RULES", "repeat_each"]

RULES = Rules()


@RULES.of("view", "reshape", "_unsafe_view", "_reshape_copy", "flatten", "unflatten", "view_as")
@RULES.of("reshape_as", "squeeze", "unsqueeze", "ravel")
def _reshape(tracing: Tracing, call: Call) -> Labelled:
    return _to_shape(tracing, call.values()[0], call.shape)


def _to_shape(tracing: Tracing, value: Labelled, shape: tuple[int, ...]) -> Labelled:
    """Follows labels from one shape to another of the same number of elements.

    Both shapes are cut into the shortest stretches of axes that hold equally many elements.
    """
    stretches = _stretches(value.shape, shape)
    for old, new in stretches:
        inside = [block for block in value.blocks if set(block.dims) & set(old)]
        if len(inside) > 1 and (len(old), len(new)) != (1, 1):
            # Axes that are labelled apart are merged: neither can be cut then.
            value = tracing.whole(value, *old)
    blocks: list[Block] = []
    for block in value.blocks:
        touched = [(old, new) for old, new in stretches if set(block.dims) & set(old)]
        before = [dim for old, _ in touched for dim in old]
        after = [dim for _, new in touched for dim in new]
        sizes = [value.shape[dim] for dim in before]
        spread = [n if dim in block.dims else 1 for dim, n in zip(before, sizes, strict=True)]
        ids = block.ids.transpose(np.argsort(block.dims).tolist()).reshape(spread)
        table = np.broadcast_to(ids, sizes).reshape([shape[dim] for dim in after])
        whole = Labelled(table.shape, (Block(tuple(range(table.ndim)), table),))
        for part in tracing.simplify(whole).blocks:
            if part.ids.ndim > 1:
                tracing.tables.append((tracing.path, part.ids))
            blocks.append(Block(tuple(after[dim] for dim in part.dims), part.ids))
    return replace(value, shape=shape, blocks=tuple(blocks))


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


@RULES.of(
    "permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "adjoint", "mT", "matrix_H"
)
def _permute(tracing: Tracing, call: Call) -> Labelled:
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
        moved = axes_of(value, call["source"])
        placed = axes_of(value, call["destination"])
        left = iter(dim for dim in range(rank) if dim not in moved)
        order = [moved[placed.index(p)] if p in placed else next(left) for p in range(rank)]
    else:
        order[-2:] = order[-2:][::-1]
    return value.moved(call.shape, {dim: place for place, dim in enumerate(order)})


@RULES.of("view_as_complex", "view_as_real")
def _complex(tracing: Tracing, call: Call) -> Labelled:
    """Pairs along the last axis are one complex number each."""
    value: Labelled = call["self"]
    if len(call.shape) < len(value.shape):
        value = tracing.whole(value, -1)
    shared = min(len(call.shape), len(value.shape))
    return value.moved(call.shape, {dim: dim for dim in range(shared)}).as_value()


@RULES.of("expand", "expand_as", "broadcast_to")
def _expand(tracing: Tracing, call: Call) -> Labelled:
    value: Labelled = call.values()[0]
    new = len(call.shape) - len(value.shape)
    moved = {d: d + new for d, n in enumerate(value.shape) if n == call.shape[d + new]}
    return value.moved(call.shape, moved)


@RULES.of("repeat", "tile")
def _repeat(tracing: Tracing, call: Call) -> Labelled:
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


def repeat_each(value: Labelled, dim: int, times: int) -> Labelled:
    """Repeats each position along an axis so often."""
    blocks = tuple(
        Block(b.dims, np.repeat(b.ids, times, axis=b.dims.index(dim))) if dim in b.dims else b
        for b in value.blocks
    )
    shape = list(value.shape)
    shape[dim] *= times
    return Labelled(tuple(shape), blocks)


@RULES.of("repeat_interleave")
def _repeat_interleave(tracing: Tracing, call: Call) -> Labelled:
    times, dim = call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or dim is None:
        return freeze_all(tracing, call)
    value: Labelled = call["self"]
    return repeat_each(value, dim % len(value.shape), times)


@RULES.of("slice", "narrow")
def _slice(tracing: Tracing, call: Call) -> Labelled:
    value: Labelled = call["self"]
    changed = [d for d, (a, b) in enumerate(zip(value.shape, call.shape, strict=True)) if a != b]
    return replace(tracing.whole(value, *changed), shape=call.shape).as_value()


@RULES.of("select", "unbind")
def _select(tracing: Tracing, call: Call) -> Any:
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


@RULES.of("chunk", "unsafe_chunk", "unsafe_split", "split", "split_with_sizes", "tensor_split")
def _split(tracing: Tracing, call: Call) -> tuple[Labelled, ...]:
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


@RULES.of("cat", "concat", "concatenate")
def _cat(tracing: Tracing, call: Call) -> Labelled:
    values = [value for value in call["tensors"] if value.shape != (0,)]
    rank = len(call.shape)
    dim = call.get("dim", 0) % rank
    for number, value in enumerate(values):
        block = value.block_of(dim)
        if block is not None and len(block.dims) > 1:
            values[number] = tracing.whole(value, dim)
    # Along the other axes the parts are coupled; each has a letter of its own for this one.
    out = LETTERS[:rank]
    words = [out[:dim] + LETTERS[rank + n] + out[dim + 1 :] for n in range(len(values))]
    rest = tracing.couple(values, words, out)
    rest = replace(rest, shape=call.shape)
    if all(value.block_of(dim) is None for value in values):
        return rest
    ids = [
        np.full(value.shape[dim], FIXED) if (block := value.block_of(dim)) is None else block.ids
        for value in values
    ]
    return replace(rest, blocks=(*rest.blocks, Block((dim,), np.concatenate(ids))))


@RULES.of("stack")
def _stack(tracing: Tracing, call: Call) -> Labelled:
    values, rank = call["tensors"], len(call.shape)
    dim = call.get("dim", 0) % rank
    word = LETTERS[: rank - 1]
    found = tracing.couple(values, [word] * len(values), word)
    return found.moved(call.shape, {d: d + (d >= dim) for d in range(rank - 1)})


@RULES.of("index")
def _index(tracing: Tracing, call: Call) -> Labelled:
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


@RULES.of("index_select")
def _index_select(tracing: Tracing, call: Call) -> Labelled:
    value: Labelled = call["self"]
    value = tracing.whole(value, call["dim"] % len(value.shape))
    return replace(value, shape=call.shape).as_value()


@RULES.of("glu")
def _glu(tracing: Tracing, call: Call) -> Labelled:
    """Couples each gate with what it gates."""
    value: Labelled = call["self"]
    dim = call.get("dim", -1) % len(value.shape)
    halves = Call({"self": value, "dim": dim}, (call.shape, call.shape))
    return replace(_split(tracing, halves)[0], weight="")


@RULES.of("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(tracing: Tracing, call: Call) -> Labelled:
    """Couples the channels that become pixels of one."""
    value: Labelled = call["self"]
    dim = len(value.shape) - 3
    value = tracing.whole(value, dim + 1, dim + 2)
    block = value.block_of(dim)
    if block is None or block.ids.ndim > 1:
        value = tracing.whole(value, dim)
        return value.moved(call.shape, {d: d for d in range(dim)})
    before, after = value.shape[dim], call.shape[dim]
    if before > after:
        parts = block.ids.reshape(after, -1)
        tracing.elements.tie_together(parts, 1, tracing.where)
        made = Block((dim,), parts[:, 0])
    else:
        made = Block((dim,), np.repeat(block.ids, after // before))
    kept = tuple(b for b in value.blocks if b is not block)
    return Labelled(call.shape, (*kept, made))
