"""Networks composed at random of small steps, each with another way to move or mix channels.

A step is a module that takes and gives an image (B, C, H, W) or a sequence (B, T, C). It is made
of the number of channels that come in, and notes in `width` how many it gives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, LENGTH = 6, 5


class Step(nn.Module):
    """A function of itself and a value, with the parts that it uses."""

    def __init__(self, passing: Callable[[Any, Tensor], Tensor], width: int, **parts: Any) -> None:
        super().__init__()
        self.passing, self.width = passing, width
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.passing(self, x)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.4)


def wrap(layer: nn.Module, width: int) -> Step:
    return Step(lambda s, x: s.layer(x), width, layer=layer)


# -- images ----------------------------------------------------------------------------------------


def conv(c: int, d: random.Random) -> Step:
    out = d.choice([8, 12, 16])
    return wrap(nn.Conv2d(c, out, d.choice([1, 3]), padding="same", bias=d.random() < 0.5), out)


def grouped(c: int, d: random.Random) -> Step:
    out = d.choice([8, 16])
    return wrap(nn.Conv2d(c, out, 3, padding=1, groups=2), out)


def depthwise(c: int, d: random.Random) -> Step:
    times = d.choice([1, 2])
    return wrap(nn.Conv2d(c, c * times, 3, padding=1, groups=c), c * times)


def transposed(c: int, d: random.Random) -> Step:
    groups = d.choice([1, 2, c])
    out = c if groups == c else 8
    return wrap(nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups), out)


def norm(c: int, d: random.Random) -> Step:
    groups = d.choice([n for n in (1, 2, 4, c) if c % n == 0])
    layers: list[nn.Module] = [
        nn.BatchNorm2d(c),
        nn.GroupNorm(groups, c),
        nn.InstanceNorm2d(c, affine=True),
    ]
    return wrap(d.choice(layers), c)


def channels_last_norm(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        return s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return Step(passing, c, norm=nn.LayerNorm(c))


def activation(c: int, d: random.Random) -> Step:
    layers = [nn.ReLU(inplace=True), nn.Hardswish(), nn.Sigmoid(), nn.PReLU(c), nn.LeakyReLU(0.1)]
    return wrap(d.choice(layers), c)


def pool(c: int, d: random.Random) -> Step:
    return wrap(d.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Upsample(SIDE)]), c)


def residual(c: int, d: random.Random) -> Step:
    out = d.choice([8, 12])
    return Step(
        lambda s, x: x + s.two(torch.relu(s.one(x))) * s.scale,
        c,
        one=nn.Conv2d(c, out, 3, padding=1),
        two=nn.Conv2d(out, c, 1),
        scale=param(c, 1, 1),
    )


def squeeze(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(s.two(torch.relu(s.one(x.mean((2, 3), keepdim=True)))))

    return Step(passing, c, one=nn.Conv2d(c, 6, 1), two=nn.Conv2d(6, c, 1))


def dense(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: torch.cat([x, s.one(x)], 1), c + 8, one=nn.Conv2d(c, 8, 1))


def two_branches(c: int, d: random.Random) -> Step:
    return Step(
        lambda s, x: torch.cat([s.one(x), s.two(x)], 1),
        20,
        one=nn.Conv2d(c, 8, 1),
        two=nn.Conv2d(c, 12, 3, padding=1),
    )


def glu(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: functional.glu(s.one(x), 1), 8, one=nn.Conv2d(c, 16, 1))


def chunked(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        a, b = s.one(x).chunk(2, 1)
        return torch.cat([a, s.two(b)], 1)

    return Step(passing, 16, one=nn.Conv2d(c, 16, 1), two=nn.Conv2d(8, 8, 3, padding=1))


def split(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        a, b = torch.split(s.one(x), [4, 8], 1)
        return s.two(a) + s.three(b)

    parts = {"one": nn.Conv2d(c, 12, 1), "two": nn.Conv2d(4, 8, 1), "three": nn.Conv2d(8, 8, 1)}
    return Step(passing, 8, **parts)


def shuffle(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        b, n, h, w = x.shape
        return x.view(b, 2, n // 2, h, w).transpose(1, 2).reshape(b, n, h, w)

    return Step(passing, c)


def padded(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: functional.pad(x, (0, 0, 0, 0, *s.zeros)) + s.one(x), c + 8,
                one=nn.Conv2d(c, c + 8, 1), zeros=(3, 5))  # fmt: skip


def padded_with_ones(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: functional.pad(x, (0, 0, 0, 0, 2, 2), value=1.0) + s.one(x), c + 4,
                one=nn.Conv2d(c, c + 4, 1))  # fmt: skip


def sliced(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: x[:, 2:] * 2, c - 2)


def frozen_norm(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        scale = s.weight * (s.var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (s.bias - s.mean * scale).reshape(1, -1, 1, 1)

    buffers = {name: torch.rand(c) + 0.5 for name in ("weight", "bias", "mean", "var")}
    buffers["bias"] = torch.zeros(c)
    buffers["mean"] = torch.zeros(c)
    return Step(passing, c, **buffers)


def twice(c: int, d: random.Random) -> Step:
    return Step(
        lambda s, x: s.two(torch.relu(s.two(s.one(x)))),
        8,
        one=nn.Conv2d(c, 8, 1),
        two=nn.Conv2d(8, 8, 3, padding=1),
    )


def spatial_attention(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2) for part in (s.q, s.k, s.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return (v @ weights.transpose(1, 2)).view(len(x), -1, SIDE, SIDE) + x

    return Step(passing, c, q=nn.Conv2d(c, 6, 1), k=nn.Conv2d(c, 6, 1), v=nn.Conv2d(c, c, 1))


def repeated(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: x.repeat(1, 2, 1, 1), 2 * c)


def gated_by_mean(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: x * x.mean(1, keepdim=True).sigmoid(), c)


def standardized(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        weight = s.kernel - s.kernel.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight * s.gain.view(-1, 1, 1, 1))

    return Step(passing, 8, kernel=param(8, c, 1, 1), gain=param(8))


def einsum(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: torch.einsum("bchw,oc->bohw", x, s.w), 10, w=param(10, c))


def stacked(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        both = torch.stack([s.one(x), s.two(x)], 1)
        weights = s.pick(both.sum(1).mean((2, 3))).view(len(x), 2, -1).softmax(1)
        return (both * weights[..., None, None]).sum(1)

    return Step(passing, 8, one=nn.Conv2d(c, 8, 1), two=nn.Conv2d(c, 8, 1), pick=nn.Linear(8, 16))


def unshuffled(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        return s.two(functional.pixel_shuffle(s.one(functional.pixel_unshuffle(x, 2)), 2))

    return Step(passing, 8, one=nn.Conv2d(4 * c, 16, 1), two=nn.Conv2d(4, 8, 1))


def focus(c: int, d: random.Random) -> Step:
    """As YOLO's stem: every other pixel becomes channels."""

    def passing(s: Any, x: Tensor) -> Tensor:
        four = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return functional.interpolate(s.one(torch.cat(four, 1)), scale_factor=2)

    return Step(passing, 8, one=nn.Conv2d(4 * c, 8, 1))


IMAGE_STEPS = [
    *(conv, grouped, depthwise, transposed, norm, channels_last_norm, activation, pool, residual),
    *(squeeze, dense, two_branches, glu, chunked, split, shuffle, padded, padded_with_ones),
    *(sliced, frozen_norm, twice, spatial_attention, repeated, gated_by_mean, standardized),
    *(einsum, stacked, unshuffled, focus),
]


# -- sequences -------------------------------------------------------------------------------------


def mlp(c: int, d: random.Random) -> Step:
    return Step(
        lambda s, x: s.two(functional.gelu(s.one(x))), 12, one=nn.Linear(c, 9), two=nn.Linear(9, 12)
    )


def gated(c: int, d: random.Random) -> Step:
    return Step(
        lambda s, x: s.down(functional.silu(s.gate(x)) * s.up(x)) + x,
        c,
        gate=nn.Linear(c, 10, bias=False),
        up=nn.Linear(c, 10, bias=False),
        down=nn.Linear(10, c),
    )


def fused_gate(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        a, b = s.up(x).chunk(2, -1)
        return s.down(a * b.tanh())

    return Step(passing, 12, up=nn.Linear(c, 14), down=nn.Linear(7, 12))


def normed(c: int, d: random.Random) -> Step:
    layer = d.choice([nn.LayerNorm, nn.RMSNorm])(c)
    return Step(lambda s, x: x + s.two(s.one(s.norm(x)).relu_()), c, norm=layer,
                one=nn.Linear(c, 9), two=nn.Linear(9, c))  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, by_hand: bool) -> Tensor:
    if not by_hand:
        return functional.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def attention(c: int, d: random.Random) -> Step:
    """Fused queries, keys and values in several layouts, (B, T, heads, channels) in the end."""
    layout, by_hand = d.choice(["3hd", "h3d", "chunk", "h,3d", "hd3"]), d.random() < 0.5
    heads, each = 4, 3

    def passing(s: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = s.qkv(x)
        if layout == "3hd":
            q, k, v = qkv.reshape(b, t, 3, s.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        elif layout == "h3d":
            q, k, v = qkv.view(b, t, s.heads, 3, each).permute(3, 0, 2, 1, 4)
        elif layout == "chunk":
            q, k, v = (p.view(b, t, -1, each).transpose(1, 2) for p in qkv.chunk(3, -1))
        elif layout == "hd3":
            q, k, v = qkv.unflatten(-1, (-1, each, 3)).permute(4, 0, 2, 1, 3).unbind(0)
        else:
            parts = qkv.view(b, t, s.heads, 3 * each).transpose(1, 2)
            q, k, v = parts.split(each, dim=-1)
        return s.out(_attend(q, k, v, by_hand).transpose(1, 2).reshape(b, t, -1)) + x

    return Step(passing, c, qkv=nn.Linear(c, 3 * heads * each), out=nn.Linear(heads * each, c),
                heads=heads)  # fmt: skip


def grouped_queries(c: int, d: random.Random) -> Step:
    how = d.choice(["repeat", "expand", "enable"])
    heads, shared, each = 6, 3, 4

    def passing(s: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = s.q(x).view(b, t, -1, each).transpose(1, 2)
        k, v = (part(x).view(b, t, -1, each).transpose(1, 2) for part in (s.k, s.v))
        if how == "repeat":
            k, v = (p.repeat_interleave(heads // shared, 1) for p in (k, v))
        elif how == "expand":
            k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for p in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=how == "enable")
        return s.o(y.transpose(1, 2).flatten(2))

    width = heads * each
    return Step(passing, 12, q=nn.Linear(c, width), k=nn.Linear(c, shared * each),
                v=nn.Linear(c, shared * each), o=nn.Linear(width, 12))  # fmt: skip


def recurrent(c: int, d: random.Random) -> Step:
    kind, both, depth = d.choice([nn.LSTM, nn.GRU, nn.RNN]), d.random() < 0.5, d.choice([1, 2])
    layer = kind(c, 6, depth, batch_first=True, bidirectional=both)
    return Step(lambda s, x: s.layer(x)[0], 6 * (1 + both), layer=layer)


def conv1d(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: s.one(x.transpose(1, 2)).mT, 9, one=nn.Conv1d(c, 9, 3, padding=1))


def raw(c: int, d: random.Random) -> Step:
    if d.random() < 0.5:
        return Step(lambda s, x: x @ s.w + s.b, 9, w=param(c, 9), b=param(9))
    return Step(lambda s, x: x @ s.w.T, 9, w=param(9, c))


def tied(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: torch.tanh(x @ s.w) @ s.w.T, c, w=param(c, 9))


def positions(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: x + s.table[:, : x.shape[1]], c, table=param(1, 2 * LENGTH, c))


def token(c: int, d: random.Random) -> Step:
    def passing(s: Any, x: Tensor) -> Tensor:
        return s.one(torch.cat([s.token.expand(len(x), -1, -1), x], 1))[:, 1:]

    return Step(passing, 8, token=param(1, 1, c), one=nn.Linear(c, 8))


def maxout(c: int, d: random.Random) -> Step:
    return Step(lambda s, x: s.one(x).unflatten(-1, (-1, 2)).amax(-1), 8, one=nn.Linear(c, 16))


def mixer(c: int, d: random.Random) -> Step:
    return Step(
        lambda s, x: x + s.two(functional.gelu(s.one(x.mT))).mT,
        c,
        one=nn.Linear(LENGTH, 7),
        two=nn.Linear(7, LENGTH),
    )


def bilinear_heads(c: int, d: random.Random) -> Step:
    """Weights of three axes, (heads, C, each), as attention in JAX has."""

    def passing(s: Any, x: Tensor) -> Tensor:
        y = torch.einsum("btc,hcd->bhtd", x, s.w).relu()
        return torch.einsum("bhtd,hdo->bto", y, s.o)

    return Step(passing, 12, w=param(3, c, 4), o=param(3, 4, 12))


def rotary(c: int, d: random.Random) -> Step:
    """Queries and keys turned by halves, with a buffer of frequencies."""

    def turn(s: Any, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(LENGTH, dtype=x.dtype), s.frequencies).repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def passing(s: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (s.q, s.k, s.v))
        y = functional.scaled_dot_product_attention(turn(s, q), turn(s, k), v)
        return s.o(y.transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(c, 12) for name in ("q", "k", "v")}
    return Step(passing, 8, **parts, o=nn.Linear(12, 8), frequencies=torch.tensor([1.0, 0.1]))


def complex_rotary(c: int, d: random.Random) -> Step:
    """Queries and keys turned as complex numbers."""

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(LENGTH)[:, None, None] * torch.tensor([1.0, 0.1])
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)

    def passing(s: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)) for part in (s.q, s.k, s.v))
        q, k, v = (part.transpose(1, 2) for part in (turn(q), turn(k), v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return s.o(y.transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(c, 12) for name in ("q", "k", "v")}
    return Step(passing, 8, **parts, o=nn.Linear(12, 8))


def cell(c: int, d: random.Random) -> Step:
    kind = d.choice([nn.LSTMCell, nn.GRUCell])

    def passing(s: Any, x: Tensor) -> Tensor:
        state, found = None, []
        for step in x.unbind(1):
            state = s.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(found, 1)

    return Step(passing, 6, cell=kind(c, 6))


def shared(c: int, d: random.Random) -> Step:
    """Two layers with one weight, of which one has a norm."""
    one, two = nn.Linear(c, 10), nn.Linear(c, 10)
    two.weight = one.weight
    return Step(
        lambda s, x: s.out(torch.relu(s.one(x)) + torch.tanh(s.two(x))),
        8,
        one=one,
        two=two,
        out=nn.Linear(10, 8),
    )


def talking(c: int, d: random.Random) -> Step:
    """Heads of which a layer mixes the scores."""

    def passing(s: Any, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (s.heads, -1)).transpose(1, 2) for p in s.qkv(x).chunk(3, -1))
        scores = s.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return s.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    parts = {"qkv": nn.Linear(c, 36), "mix": nn.Linear(4, 4), "out": nn.Linear(12, 8)}
    return Step(passing, 8, **parts, heads=4)


def low_rank(c: int, d: random.Random) -> Step:
    """A weight with an update of low rank, added before it is used."""
    return Step(
        lambda s, x: functional.linear(x, s.w + s.up @ s.down, s.bias),
        9,
        w=param(9, c),
        up=param(9, 2),
        down=param(2, c),
        bias=param(9),
    )


SEQUENCE_STEPS = [
    *(rotary, complex_rotary, cell, shared, talking, low_rank),
    *(mlp, gated, fused_gate, normed, attention, grouped_queries, recurrent, conv1d, raw, tied),
    *(positions, token, maxout, mixer, bilinear_heads),
]


# -- whole networks --------------------------------------------------------------------------------


class Network(nn.Module):
    """Steps between a first and a last layer; gives a dict, or a tensor."""

    def __init__(self, first: nn.Module, steps: list[Step], last: nn.Module, kind: str) -> None:
        super().__init__()
        self.first, self.steps, self.last = first, nn.ModuleList(steps), last
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        if self.kind == "image":
            return {"logits": self.last(x.mean((2, 3)))}
        return self.last(x)


def random_network(seed: int, only: list[Any] | None = None) -> tuple[Network, tuple[Tensor, ...]]:
    """Draws a network of three to five steps, in eval mode, and one example for it."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind = draw.choice(["image", "sequence", "words"])
    if only:
        kind = "image" if only[0] in IMAGE_STEPS else "sequence"
    pool = IMAGE_STEPS if kind == "image" else SEQUENCE_STEPS
    width, steps = 8, []
    for make in only or [draw.choice(pool) for _ in range(draw.randint(3, 5))]:
        steps.append(make(width, draw))
        width = steps[-1].width
    first: nn.Module = nn.Conv2d(3, 8, 3, padding=1) if kind == "image" else nn.Linear(4, 8)
    inputs = torch.randn(1, 3, SIDE, SIDE) if kind == "image" else torch.randn(1, LENGTH, 4)
    if kind == "words":
        first, inputs = nn.Embedding(11, 8), torch.randint(0, 11, (1, LENGTH))
    return Network(first, steps, nn.Linear(width, 3), kind).eval(), (inputs,)
