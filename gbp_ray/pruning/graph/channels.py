"""Rules of operators that treat elements, channels or whole axes alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gbp_ray.pruning.graph.calls import LETTERS, Call, Rules, axes_of, made
from gbp_ray.pruning.graph.labels import FIXED, Block, Labelled, Tracing

__all__ = ["RULES", "pointwise"]

RULES = Rules()


def pointwise(tracing: Tracing, call: Call) -> Labelled:
    """Couples operands along the axes that broadcasting aligns."""
    values, rank = call.values(), len(call.shape)
    out = LETTERS[:rank]
    words = [out[rank - len(value.shape) :] for value in values]
    channels = {
        word[block.dims[0]]
        for value, word in zip(values, words, strict=True)
        for block in value.blocks
        if len(block.dims) == 1
    }
    for number, (value, word) in enumerate(zip(values, words, strict=True)):
        if channels & {letter for letter, n in zip(word, value.shape, strict=True) if n > 1}:
            values[number] = tracing.label_buffer(value)
    found = tracing.couple(values, words, out)
    sources = [value for value in call.values() if math.prod(value.shape) > 1]
    if all(value.buffers for value in sources) and not found.blocks:
        # Such as the scale of a BatchNorm that is frozen, which follows from its statistics.
        names = dict.fromkeys(name for value in sources for name in value.buffers)
        axes = {len(call.shape) - len(v.shape) + _longest(v.shape) for v in sources}
        return replace(found, buffers=tuple(names) if len(axes) == 1 else ())
    return found


def _longest(shape: tuple[int, ...]) -> int:
    return max(range(len(shape)), key=lambda dim: shape[dim])


@RULES.of("prelu")
def _prelu(tracing: Tracing, call: Call) -> Labelled:
    inputs, weight = call["self"], call["weight"]
    out = LETTERS[: len(inputs.shape)]
    return tracing.couple([inputs, weight], [out, out[min(1, len(out) - 1)]], out)


@RULES.of("where", "hardswish", "log_sigmoid", "rsub", "floor_divide", "copy", "rrelu_with_noise")
def _where(tracing: Tracing, call: Call) -> Labelled:
    return pointwise(tracing, call)


@RULES.of(
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "alias", "detach"),
    *("to", "_to_copy", "type_as", "lift_fresh_copy", "native_dropout", "float", "double", "half"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("requires_grad", "positive", "conj", "resolve_conj", "resolve_neg", "fill", "zero"),
    *("bernoulli", "fake_quantize_per_tensor_affine"),
)
def _same(tracing: Tracing, call: Call) -> Labelled:
    return call.values()[0]


@RULES.of(
    "batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm"
)
def _batch_norm(tracing: Tracing, call: Call) -> Labelled:
    inputs = call["input"]
    names = ("weight", "bias", "running_mean", "running_var")
    others = [tracing.label_buffer(call[name]) for name in names if call.get(name) is not None]
    out = LETTERS[: len(inputs.shape)]
    return tracing.couple([inputs, *others], [out, *["b"] * len(others)], out)


@RULES.of("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _layer_norm(tracing: Tracing, call: Call) -> Labelled:
    inputs, number = call["input"], len(call["normalized_shape"])
    rank = len(inputs.shape)
    inputs = tracing.whole(inputs, *range(rank - number, rank))
    others = [v for v in call.values() if v is not call["input"]]
    out = LETTERS[:rank]
    return tracing.couple([inputs, *others], [out, *[out[rank - number :]] * len(others)], out)


@RULES.of("group_norm")
def _group_norm(tracing: Tracing, call: Call) -> Labelled:
    inputs, groups = call["input"], call["num_groups"]
    block = inputs.block_of(1)
    others = [v for v in (call.get("weight"), call.get("bias")) if v is not None]
    if block is not None and block.ids.ndim == 1:
        rows = block.ids.reshape(groups, -1)
        tracing.elements.tie_together(rows, 1, tracing.where)
    else:
        inputs = tracing.whole(inputs, 1)
    out = LETTERS[: len(inputs.shape)]
    return tracing.couple([inputs, *others], [out, *["b"] * len(others)], out)


@RULES.of("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "flip")
def _along(tracing: Tracing, call: Call) -> Any:
    value = call.values()[0]
    value = tracing.whole(value, *axes_of(value, call.get("dim", call.get("dims"))))
    return value if len(call.shapes) == 1 else (value,) * len(call.shapes)


@RULES.of("triu", "tril")
def _triangle(tracing: Tracing, call: Call) -> Labelled:
    return tracing.whole(call["self"], -2, -1)


@RULES.of("new_zeros", "new_ones", "new_full", "new_empty")
def _new(tracing: Tracing, call: Call) -> Any:
    return made(tracing, call)


@RULES.of("roll")
def _roll(tracing: Tracing, call: Call) -> Labelled:
    value: Labelled = call["self"]
    return tracing.whole(value, *axes_of(value, call["dims"]))


@RULES.of("topk")
def _topk(tracing: Tracing, call: Call) -> tuple[Labelled, ...]:
    value = tracing.whole(call["self"], call.get("dim", -1))
    return tuple(replace(value, shape=shape).as_value() for shape in call.shapes)


@RULES.of(
    *("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "prod"),
    *("logsumexp", "norm", "linalg_vector_norm", "var_mean", "any", "all"),
)
def _reduce(tracing: Tracing, call: Call) -> Any:
    value: Labelled = call.values()[0]
    if len(call.values()) > 1:
        return pointwise(tracing, call)
    dims = axes_of(value, call.get("dim"))
    value = tracing.whole(value, *dims)
    if len(call.shape) == len(value.shape):
        moved = {dim: dim for dim in range(len(value.shape)) if dim not in dims}
    else:
        left = [dim for dim in range(len(value.shape)) if dim not in dims]
        moved = {dim: place for place, dim in enumerate(left)}
    found = tuple(value.moved(shape, moved).as_value() for shape in call.shapes)
    return found[0] if len(found) == 1 else found


@RULES.of(
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("_adaptive_avg_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "max_pool2d_with_indices"),
    *("adaptive_max_pool1d", "adaptive_max_pool3d", "upsample_nearest_exact2d", "lp_pool2d"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"),
    *("replication_pad2d", "replication_pad3d", "grid_sampler"),
)
def _spatial(tracing: Tracing, call: Call) -> Any:
    """Operations on the axes behind batch and channels, each channel by itself."""
    value: Labelled = call.values()[0]
    for other in call.values()[1:]:
        tracing.freeze(other)
    lead = len(value.shape) - {"1d": 1, "2d": 2, "3d": 3}.get(tracing.where.split(" ")[0][-2:], 2)
    value = tracing.whole(value, *range(lead, len(value.shape)))
    found = tuple(value.moved(shape, {d: d for d in range(lead)}) for shape in call.shapes)
    return found[0] if len(found) == 1 else found


@RULES.of("pad", "constant_pad_nd")
def _pad(tracing: Tracing, call: Call) -> Labelled:
    """Zeros that are padded in may leave with what is added to them; others are fixed."""
    value, widths = call["self"], call["pad"]
    rank = len(value.shape)
    sides = {rank - 1 - n // 2: tuple(widths[n : n + 2]) for n in range(0, len(widths), 2)}
    is_constant = call.get("mode", "constant") == "constant"
    for dim, pair in sides.items():
        block = value.block_of(dim)
        is_simple = is_constant and min(pair) >= 0 and block is not None and block.ids.ndim == 1
        if any(pair) and not is_simple:
            value = tracing.whole(value, dim)
    are_zeros = not call.get("value", 0)

    def spread(block: Block) -> Block:
        pair = sides.get(block.dims[0], (0, 0))
        if not any(pair):
            return block
        before, after = (
            tracing.add_zeros(n) if are_zeros else np.full(n, FIXED, np.int64) for n in pair
        )
        return Block(block.dims, np.concatenate([before, block.ids, after]))

    blocks = tuple(map(spread, value.blocks))
    return replace(value, shape=call.shape, blocks=blocks).as_value()
