"""What every rank computes in test_unusual_ranks: networks that do what most do not, whole trials.

Buffers that forward passes write, layers of which nothing is pruned or nothing learnt, and passes
whose products lie deep. Pretraining takes three parts a step, so that of two ranks one idles.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from small_networks import Queue, draw, job_config, regression
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from gbp_ray.config.job import JobConfig
from gbp_ray.distributed.ranks import Ranks
from gbp_ray.distributed.sharding import gather_whole
from gbp_ray.errors import GbpError
from gbp_ray.pruning.rounds import run_rounds
from gbp_ray.workloads.contract import Workload

WIDTH, STEPS, OUTPUTS = 8, 5, 4


class Net(nn.Module):
    """Passes its inputs to a function, with members to use."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(self, inputs)


def two_layers(net: Any, inputs: Tensor) -> Tensor:
    outputs: Tensor = net.b(torch.tanh(net.a(inputs)))
    return outputs


def plain(run: Callable[[Any, Tensor], Tensor] = two_layers, **members: Any) -> Net:
    return Net(run, a=nn.Linear(WIDTH, 6), b=nn.Linear(6, OUTPUTS), **members)


# -- buffers written in forward --------------------------------------------------------------------


def observe(net: Any, inputs: Tensor) -> Tensor:
    """Counts, collects and measures in every kind of buffer; computes with what it measured."""
    net.calls += 1
    if net.training:
        seen = inputs.detach()
        net.seen += len(seen)
        net.low.copy_(seen.min().minimum(net.low))
        net.high = seen.max().maximum(net.high)
        net.table[int(net.place), 1:] += 1
        net.place.copy_((net.place + 1) % 3)
        net.signs |= seen.amax(dim=0).view(2, 4) > 2
        net.queue.push(seen[:, :3])
    return two_layers(net, inputs.clamp(net.low, net.high))


def observing() -> Net:
    return plain(
        observe,
        calls=torch.zeros(()),
        seen=torch.zeros((), dtype=torch.int64),
        low=torch.tensor(math.inf),
        high=torch.tensor(-math.inf),
        table=torch.zeros(3, 4, dtype=torch.uint8),
        place=torch.zeros(1, dtype=torch.int64),
        signs=torch.zeros(2, 4, dtype=torch.bool),
        queue=Queue(),
        mask=torch.full((3, 3), -math.inf).triu(1),
        wave=torch.polar(torch.ones(3), torch.arange(3.0)),
    )


def normed(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6, **options), nn.Linear(6, OUTPUTS))


def quantised() -> nn.Module:
    """Prepared by torch itself to be trained as if quantised."""
    observer = quantization.MovingAverageMinMaxObserver
    activation = quantization.FakeQuantize.with_args(observer=observer, quant_min=0, quant_max=255)
    weight = quantization.FakeQuantize.with_args(
        observer=observer,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    net = nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, OUTPUTS)).train()
    net.qconfig = quantization.QConfig(activation=activation, weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared: nn.Module = quantization.prepare_qat(net)
    return prepared


def grow(net: Any, inputs: Tensor) -> Tensor:
    if net.training:
        net.peak.resize_(WIDTH).copy_(inputs.detach().amax(dim=0))
    return two_layers(net, inputs)


def set_shift(net: Any, inputs: Tensor) -> Tensor:
    """Initialises a parameter by the first examples that it sees in training."""
    if net.training and not net.is_ready:
        net.shift.data.copy_(inputs.detach().mean(dim=0))
        net.is_ready.fill_(True)
    return two_layers(net, inputs - net.shift)


def shifted() -> Net:
    return plain(set_shift, shift=nn.Parameter(torch.zeros(WIDTH)), is_ready=torch.tensor(False))


# -- what is counted -------------------------------------------------------------------------------


def attend(net: Any, inputs: Tensor) -> Tensor:
    attended, _ = net.attention(inputs, inputs, inputs, need_weights=False)
    outputs: Tensor = net.head(attended.mean(dim=1))
    return outputs


def run_over(net: Any, inputs: Tensor) -> Tensor:
    hidden, _ = net.layer(inputs)
    outputs: Tensor = net.head(hidden[:, -1])
    return outputs


def run_cell(net: Any, inputs: Tensor) -> Tensor:
    state = (inputs.new_zeros(len(inputs), 6), inputs.new_zeros(len(inputs), 6))
    for step in inputs.unbind(dim=1):
        state = net.cell(step, state)
    outputs: Tensor = net.head(state[0])
    return outputs


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Net:
    return Net(
        run_over,
        layer=kind(WIDTH, 6, batch_first=True, **options),
        head=nn.Linear(options.get("proj_size", 6), OUTPUTS),
    )


def encoder() -> Net:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True, dropout=0.1)
    return Net(
        lambda net, x: net.head(net.body(x).mean(dim=1)),
        body=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(WIDTH, OUTPUTS),
    )


def differentiate(net: Any, inputs: Tensor) -> Tensor:
    """Takes a part of the negative gradient of an energy."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_(True)
        energy = two_layers(net, inputs).square().sum()
        (slope,) = torch.autograd.grad(energy, inputs, create_graph=True)
    return -slope[:, :OUTPUTS]


# -- what is pruned --------------------------------------------------------------------------------


def with_spare(net: Any, inputs: Tensor) -> Tensor:
    """Leaves `spare` alone, uses `aux` in training, and `odd` where inputs are large."""
    outputs = two_layers(net, inputs)
    if net.training:
        outputs = outputs + 0.1 * net.aux(inputs)
    return outputs + net.odd(inputs) if inputs.sum() > 0 else outputs


def spared() -> Net:
    spare, aux, odd = nn.Linear(5, 5), nn.Linear(WIDTH, OUTPUTS), nn.Linear(WIDTH, OUTPUTS)
    return plain(with_spare, spare=spare, aux=aux, odd=odd)


def choose(net: Any, inputs: Tensor) -> Tensor:
    """Goes through one of two blocks, by the examples."""
    hidden = torch.tanh(net.a(inputs))
    outputs: Tensor = net.b(hidden + net.blocks[int(inputs.sum() > 0)](hidden))
    return outputs


def choosing() -> Net:
    blocks = (nn.Sequential(nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 6)) for _ in range(2))
    return plain(choose, blocks=nn.ModuleList(blocks))


def with_head(change: Callable[[nn.Module], nn.Module]) -> Net:
    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.b = change(net.b)
    return net


def waved() -> Net:
    """Has a layer of complex numbers."""
    return Net(
        lambda net, x: net.head(net.wave(x.to(torch.complex64)).abs()),
        wave=nn.Linear(WIDTH, 6, dtype=torch.complex64),
        head=nn.Linear(6, OUTPUTS),
    )


def scaled() -> Net:
    return plain(
        lambda net, x: two_layers(net, x) * net.scale, scale=nn.Parameter(torch.tensor(1.0))
    )


def sided() -> Net:
    """Has a layer without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        side = nn.Linear(0, OUTPUTS)
    return plain(lambda net, x: two_layers(net, x) + net.side(x[:, :0]), side=side)


def compiled_in_place() -> nn.Module:
    net = plain()
    net.compile(backend="eager")
    return net


def tied() -> Net:
    """Looks words up in the matrix of its last layer."""
    table, head = nn.Embedding(12, WIDTH, padding_idx=0), nn.Linear(WIDTH, 12, bias=False)
    head.weight = table.weight
    return Net(
        lambda net, x: net.head(torch.tanh(net.mix(net.table(x).mean(dim=1)))),
        table=table,
        mix=nn.Linear(WIDTH, WIDTH),
        head=head,
    )


def words() -> Net:
    return Net(
        lambda net, x: net.head(torch.tanh(net.table(x)).mean(dim=1)),
        table=nn.Embedding(12, WIDTH),
        head=nn.Linear(WIDTH, 12),
    )


def convolving() -> Net:
    """Has convolutions of one, two and three axes, grouped, and turned round."""
    return Net(
        lambda net, x: net.head(
            torch.tanh(net.c(net.b(net.a(x).unsqueeze(2)).unsqueeze(4))).flatten(2).mean(dim=2)
        ),
        a=nn.Conv1d(STEPS, 4, 3),
        b=nn.ConvTranspose2d(4, 6, 2, groups=2),
        c=nn.Conv3d(6, 4, (2, 2, 1), groups=2),
        head=nn.Linear(4, OUTPUTS),
    )


# -- trials ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, with what it is fed and what is left out."""

    build: Callable[[], nn.Module]
    is_sequence: bool = False
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    is_text: bool = False


SEQUENCE = {
    "attention": lambda: Net(
        attend,
        attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        head=nn.Linear(WIDTH, OUTPUTS),
    ),
    "encoder": encoder,
    "lstm": partial(recurrent, nn.LSTM),
    "lstm with projections": partial(recurrent, nn.LSTM, proj_size=3, num_layers=2),
    "gru": partial(recurrent, nn.GRU),
    "rnn": partial(recurrent, nn.RNN),
    "cell": lambda: Net(run_cell, cell=nn.LSTMCell(WIDTH, 6), head=nn.Linear(6, OUTPUTS)),
    "only gru": lambda: Net(
        lambda net, x: net.layer(x)[0][:, -1], layer=nn.GRU(WIDTH, OUTPUTS, batch_first=True)
    ),
}

CASES: dict[str, Case] = {
    "observes": Case(observing),
    "norm": Case(normed),
    "norm that counts": Case(partial(normed, momentum=None)),
    "quantised": Case(quantised),
    "grows": Case(lambda: plain(grow, peak=torch.zeros(0))),
    **{name: Case(build, is_sequence=True) for name, build in SEQUENCE.items()},
    "differentiates": Case(lambda: plain(differentiate)),
    "hides products": Case(
        lambda: plain(
            lambda net, x: two_layers(net, x) + net.both(x, x),
            both=nn.Bilinear(WIDTH, WIDTH, OUTPUTS),
        )
    ),
    "spare layers": Case(spared),
    "chooses": Case(choosing),
    "weight norm": Case(lambda: with_head(parametrizations.weight_norm), exclude=("b.*",)),
    "spectral norm": Case(lambda: with_head(parametrizations.spectral_norm), exclude=("b.*",)),
    "orthogonal": Case(lambda: with_head(parametrizations.orthogonal), exclude=("b.*",)),
    "old weight norm": Case(lambda: with_head(weight_norm), exclude=("b.*",)),
    "old spectral norm": Case(lambda: with_head(spectral_norm), exclude=("b.*",)),
    "weight norm not excluded": Case(lambda: with_head(parametrizations.weight_norm)),
    "complex": Case(waved, exclude=("wave.*",)),
    "complex not excluded": Case(waved),
    "scalar": Case(scaled),
    "empty": Case(sided),
    "compiled": Case(lambda: torch.compile(plain(), backend="eager")),
    "compiled in place": Case(compiled_in_place),
    "data-parallel": Case(lambda: nn.DataParallel(plain())),
    "tied to an embedding": Case(tied, is_text=True),
    **{
        f"{name}, pruned": Case(SEQUENCE[name], is_sequence=True, include=("*weight*",))
        for name in ("attention", "lstm with projections", "gru", "cell")
    },
    "only gru, pruned": Case(
        lambda: Net(
            lambda net, x: net.layer(x)[0].mean(dim=1),
            layer=nn.GRU(WIDTH, OUTPUTS, batch_first=True),
        ),
        is_sequence=True,
        include=("layer.weight_*",),
    ),
    "words, pruned": Case(words, is_text=True, include=("table.weight",)),
    "weight norm, pruned": Case(
        lambda: with_head(parametrizations.weight_norm), include=("b.*original1",)
    ),
    "old spectral norm, pruned": Case(lambda: with_head(spectral_norm), include=("b.weight_orig",)),
    "convolutions": Case(convolving, is_sequence=True),
}


UNSHARDABLE = ("complex", "complex not excluded", "scalar", "empty", "chooses")
"""Networks that FSDP2 cannot spread, which a job is refused for before."""
ENDING = "grows"
"""The case that no rank of a sharded network goes on after."""


def case_of(name: str, **cluster: Any) -> tuple[JobConfig, Workload]:
    """Makes a small job of a case with its workload."""
    case = CASES[name]
    training = {"epochs": 1, "batch_size": 12, "optimizer": "adamw", "weight_decay": 0.1}
    job = job_config(
        pretrain={**training, "microbatches": 3},
        finetune={**training, "microbatches": 2},
        prune={
            "sparsity": 0.5,
            "exclude": case.exclude,
            "include": case.include,
            "rounds": 1,
            "calibration_examples": 18,
            "calibration_batch_size": 5,
            "batchnorm_examples": 20,
        },
        workload={"eval_batch_size": 7},
        cluster=cluster,
    )
    shape = (STEPS, WIDTH) if case.is_sequence else (WIDTH,)
    workload = regression(case.build, draw(26, *shape, seed=1), draw(26, OUTPUTS, seed=2))
    if case.is_text:
        words = draw(26, STEPS, seed=1).mul(4).long().remainder(12)
        split = (words, words.sum(dim=1).remainder(12))
        workload = dataclasses.replace(
            workload, train=split, test=split, loss=functional.cross_entropy
        )
    return job, workload


def outcome(name: str, ranks: Ranks, strategy: str = "replicated") -> Any:
    """Runs a case; reports of each round its record and every tensor, or what it is refused for."""
    job, workload = case_of(name, strategy=strategy)
    found: list[dict[str, Any]] = []
    try:
        for state in run_rounds(job, workload, ranks):
            tensors = {**state.model.state_dict(), **dict(state.model.named_buffers())}
            found.append(
                {
                    "record": state.record.model_dump(exclude={"seconds"}),
                    "mask": state.masks.digest,
                    "tensors": {n: bits(t) for n, t in tensors.items() if torch.is_tensor(t)},
                }
            )
    except GbpError as error:
        return f"{type(error).__name__}: {error}"
    return found


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    values = gather_whole(tensor.detach()).contiguous().numpy()
    return str(values.dtype), values.shape, values.tobytes()


def unusual_program(ranks: Ranks) -> dict[tuple[str, str], Any]:
    """Runs every case in one piece and in shards."""
    whole = [(name, "replicated") for name in CASES]
    sharded = [(name, "fsdp") for name in CASES if name not in (*UNSHARDABLE, ENDING)]
    sharded.append(("chooses", "fsdp"))
    return {
        (name, strategy): outcome(name, ranks, strategy)
        for name, strategy in (*whole, *sharded, (ENDING, "fsdp"))
    }
