"""The model card beside an exported network: origin, measurements, how to load it.

Markdown with the front matter that model hubs read. Made from records, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gbp_ray.config.metrics import ACCURACY
from gbp_ray.results.measurements import (
    MeasurementsRecord,
    latency_rows,
    size_rows,
    speed_sentence,
)
from gbp_ray.results.records import RoundRecord, TrialRecord, dump_job
from gbp_ray.results.scores import write_share

__all__ = [
    "ExportFacts",
    "write_card",
]


@dataclass(frozen=True)
class ExportFacts:
    """Facts about an export that the records do not hold.

    Attributes:
        class_name: Of the network.
        inputs: Type and shape of one prepared example's tensors, by their names in
            example.safetensors.
        arguments: The network's arguments, as code.
        output_shape: Of one example's output.
        num_test: Examples of the test split.
        num_judged: Examples that rounds were judged by.
        program_fault: The reason for a missing model.pt2, or "".
        difference: Greatest difference of the program's outputs from the pruned network's.
        has_tied_weights: Whether layers share a weight that is stored for each of them.
        stored_once: Names of weights that the class ties to others, and model.safetensors lacks.
        notes: Changes made on the way, a sentence each.
        onnx_difference: Greatest difference of the ONNX file's outputs; None without a file.
        onnx_fault: The reason for a missing model.onnx that was asked for, or "".
        onnx_inputs: Names of the ONNX file's inputs.
        csr_ratios: Of layers that are CSR: by name and batch size, how many times as long they
            take dense.
        csr_fault: The reason for missing CSR layers that were asked for, or "".
        hub_class: The class of transformers that loads the folder, or "".
        hub_difference: Greatest difference of its outputs then; None where it cannot.
        hub_fault: The reason why it cannot though that was asked for, or "".
        no_tokenizer: The reason why the folder has no tokenizer, or "".
        base_model: Name or folder that the dense network came from, or "".
        license: Of that, or "".
        measurements: What was measured, if that was asked for.
        loader_difference: Greatest difference of the outputs of a fresh network that load.py has
            filled; None where no whole units have left the network.
        compact_fault: The reason why whole units are zeros in it, or "".
    """

    class_name: str
    inputs: Mapping[str, tuple[str, Sequence[int]]]
    arguments: str
    output_shape: Sequence[int]
    num_test: int
    num_judged: int
    program_fault: str = ""
    difference: float = 0.0
    has_tied_weights: bool = False
    stored_once: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    onnx_difference: float | None = None
    onnx_fault: str = ""
    onnx_inputs: Sequence[str] = ()
    csr_ratios: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    csr_fault: str = ""
    hub_class: str = ""
    hub_difference: float | None = None
    hub_fault: str = ""
    no_tokenizer: str = ""
    base_model: str = ""
    license: str = ""
    measurements: MeasurementsRecord | None = None
    loader_difference: float | None = None
    compact_fault: str = ""

    @property
    def is_compact(self) -> bool:
        """Returns whether whole units have left the network."""
        return self.loader_difference is not None


def write_card(trial: TrialRecord, record: RoundRecord, facts: ExportFacts) -> str:
    """Writes the card of one round of a trial."""
    job, cost = trial.job, record.cost
    of_dense = " of the dense network" if facts.is_compact else ""
    lines = [
        "---",
        f"library_name: {'pytorch' if facts.hub_difference is None else 'transformers'}",
        *([f"base_model: {facts.base_model}"] if _is_hub_name(facts.base_model) else []),
        *([f"license: {facts.license}"] if facts.license else []),
        "tags:",
        "- pruning",
        "- sparse",
        "- gbp-ray",
        "metrics:",
        *(f"- {spec.name}" for spec in record.specs),
        "---",
        "",
        f"# {job.name}: {facts.class_name}, {_title(record, facts)}",
        "",
        f"`{job.workload.factory}` pruned by `{job.prune.criterion}` in "
        f"{job.prune.rounds} round{'' if job.prune.rounds == 1 else 's'} with gbp-ray. "
        f"{_what_is_left(record, facts)}",
        "",
        "## What it reached",
        "",
        "| | dense | this network |",
        "|---|---|---|",
        *_list_scores(trial, record),
        *_list_costs(record, facts),
        "",
        *((f"Multiply-adds: {cost.macs_fault}.", "") if cost.macs_fault else ()),
        _how_measured(trial, record, facts),
        "",
        *(_describe_speed(facts.measurements) if facts.measurements else ()),
        "## How to load it",
        "",
        *(_how_to_load_compact(facts) if facts.is_compact else _how_to_load(facts)),
        *_how_to_load_onnx(facts),
        *_how_to_load_csr(facts),
        *_how_to_load_from_hub(facts),
        "",
        f"It takes prepared inputs: {_describe_inputs(facts)}, and gives outputs of shape "
        f"`(examples, {', '.join(map(str, facts.output_shape))})`. `example.safetensors` holds "
        "`inputs` that were prepared as in the test, and the `outputs` that belong to them; "
        "preparing (scaling, normalising) is the workload's own and not part of the network. "
        f"`masks.safetensors` holds a bit for each weight{of_dense}, 1 = kept: "
        "`numpy.unpackbits(mask, count=weight.size, bitorder='little').reshape(weight.shape)`.",
        "",
        "## What it was made from",
        "",
        f"Trial `{trial.trial_id}`, round {record.round} of {trial.final.round}, seed {job.seed}. "
        f"Masks (SHA-256): `{record.mask_digest}`.",
        *(f"{note}" for note in facts.notes),
        "",
        "```toml",
        dump_job(job).rstrip(),
        "```",
        "",
        f"Made with {', '.join(f'{name} {value}' for name, value in trial.versions.items())}.",
        "",
        "## Layers",
        "",
        f"| layer | shape{of_dense} | weights left | sparsity |",
        "|---|---|---|---|",
        *(
            f"| {layer.name} | {'x'.join(map(str, layer.shape))} | {layer.num_nonzero:,} | "
            f"{layer.sparsity:.2%} |"
            for layer in cost.layers
        ),
        *_list_widths(record),
        "",
        *((f"{cost.unpruned_in_words}.", "") if cost.unpruned else ()),
        "## Limits",
        "",
        _limit_of_speed(facts),
        f"- {trial.metric.title} is a mean. Pruning hurts some classes and rare examples first "
        "(Hooker et al. 2019, arXiv 1911.05248); `gbp-ray explain` measures which.",
        "- Measured on one test split, for one seed of one job; other data were not looked at, nor "
        f"{'' if record.robust_accuracy is not None else 'robustness, '}calibration or fairness.",
        "- What the data and the dense network were licensed under holds for this one as well.",
        "",
    ]
    return "\n".join(lines)


def _title(record: RoundRecord, facts: ExportFacts) -> str:
    # Units that are zeros have made nothing smaller.
    return record.cost.headline if facts.is_compact else f"{record.sparsity:.1%} sparse"


def _what_is_left(record: RoundRecord, facts: ExportFacts) -> str:
    cost, units = record.cost, record.cost.units
    if units is None or not facts.is_compact:
        text = (
            f"{cost.num_nonzero:,} of {cost.num_parameters:,} parameters are left "
            f"({cost.compression:.1f}x fewer non-zero parameters); of the {cost.num_units:,} "
            f"prunable weights {record.sparsity:.2%} are exactly zero."
        )
        if facts.compact_fault:
            text += (
                " Whole units were removed, and are zeros here: the network cannot go without "
                f"them ({facts.compact_fault})."
            )
        return text
    kinds = sorted({width.kind for width in units.widths})
    return (
        f"Whole {' and '.join(f'{kind}s' for kind in kinds)} were removed with all that is coupled "
        f"to them: {units.num_parameters:,} of {cost.num_parameters:,} parameters are left."
    )


def _list_costs(record: RoundRecord, facts: ExportFacts) -> list[str]:
    cost, units = record.cost, record.cost.units
    if units is not None and facts.is_compact:
        rows = [f"| parameters | {cost.num_parameters:,} | {units.num_parameters:,} |"]
        if cost.macs:
            rows.append(f"| multiply-adds | {cost.macs:,} | {units.macs:,} |")
        return [
            *rows,
            f"| bytes of parameters and buffers | {cost.num_bytes:,} | {units.num_bytes:,} |",
        ]
    return [
        f"| parameters | {cost.num_parameters:,} | {cost.num_nonzero:,} |",
        f"| multiply-adds | {cost.macs:,} | {cost.macs_nonzero:,} in theory |"
        if cost.macs
        else "| multiply-adds | not counted | not counted |",
    ]


def _list_widths(record: RoundRecord) -> list[str]:
    units = record.cost.units
    if units is None:
        return []
    rows = [(w.name, f"{w.kind}s", f"{w.num_units:,}", f"{w.num_kept:,}") for w in units.widths]
    return ["", *_table(["units made by", "kind", "dense", "left"], rows)]


def _limit_of_speed(facts: ExportFacts) -> str:
    if facts.is_compact:
        return (
            "- Fewer multiply-adds are no measured time: how much faster a pass is depends on the "
            "machine, the engine and the batch size"
            f"{', as measured above' if facts.measurements else ''}."
        )
    return (
        "- Removed weights are stored as zeros, which make no pass faster"
        f"{', except in the CSR layers above' if facts.csr_ratios else ''}: a dense library "
        "computes with them, and the multiply-adds above are no measured time. Files compress "
        "well."
    )


def _describe_inputs(facts: ExportFacts) -> str:
    texts = {
        name: f"`{dtype}` of shape `(examples, {', '.join(map(str, shape))})`"
        for name, (dtype, shape) in facts.inputs.items()
    }
    if list(texts) == ["inputs"]:
        return texts["inputs"]
    return ", ".join(f"`{name.removeprefix('inputs.')}` {text}" for name, text in texts.items())


def _list_scores(trial: TrialRecord, record: RoundRecord) -> list[str]:
    rows, metric = [], trial.metric
    stored = " as stored" if trial.dense.reference.is_recalibrated else ""
    if record.judged_on != "test":
        rows.append(
            f"| {record.judged_on} {metric.name} | {trial.dense.reference.text} | "
            f"{metric.write(record.score)} |"
        )
        if trial.test is not None and record is trial.chosen:
            rows.append(
                f"| test {metric.name} | {trial.dense_reference.text} | "
                f"{metric.write(trial.test.score)} |"
            )
    else:
        rows.append(
            f"| test {metric.name} | {trial.dense.reference.text} | {metric.write(record.score)} |"
        )
    rows += [
        f"| {record.judged_on} {other.name} | "
        f"{other.write(trial.dense.metrics.get(other.name))}{stored} | "
        f"{other.write(record.metrics.get(other.name))} |"
        for other in record.other_metrics
    ]
    if record.robust_accuracy is not None and trial.dense.robust_accuracy is not None:
        attack = trial.job.attack
        how = f"{attack.kind}, epsilon {attack.epsilon:g}"
        if attack.kind == "pgd":
            how += f", {attack.steps} steps, {attack.restarts} starts"
        rows.append(
            f"| accuracy under attack ({how}), {record.judged_on} examples | "
            f"{write_share(trial.dense.robust_accuracy)}{stored} | "
            f"{write_share(record.robust_accuracy)} |"
        )
    if record.train_score is not None and trial.dense.train_score is not None:
        rows.append(
            f"| {metric.name} on training examples | "
            f"{metric.write(trial.dense.train_score)}{stored} | "
            f"{metric.write(record.train_score)} |"
        )
    return rows


def _how_measured(trial: TrialRecord, record: RoundRecord, facts: ExportFacts) -> str:
    if record.judged_on == "test":
        what = f"{trial.metric.title} is measured"
        if trial.metric == ACCURACY:
            what = "Accuracy is the share of right answers"
        return (
            f"{what} on all {facts.num_test:,} examples of the test split, which rounds were "
            "judged by as well."
        )
    text = (
        f"Rounds were judged by {facts.num_judged:,} examples set aside from the training split, "
        "which were never trained on. "
    )
    if trial.test is not None and record is trial.chosen:
        return text + (
            f"The test split, {facts.num_test:,} examples, was used once, for the round so chosen."
        )
    return text + "This round is not the one that was chosen, and was not tested."


def _describe_speed(measured: MeasurementsRecord) -> list[str]:
    headings, rows = latency_rows(measured)
    first = measured.latency[0]
    machine = measured.machine
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    names = list(measured.networks)
    return [
        "## How fast and how large it is",
        "",
        f"Measured on {measured.date} on {machine.processor}, {machine.num_cores} "
        f"core{'' if machine.num_cores == 1 else 's'}, {machine.system}, with {versions}; "
        f"{first.device}, {first.threads} thread{'' if first.threads == 1 else 's'}. Milliseconds "
        "of one pass: median (10th to 90th percentile), the networks timed in turn.",
        "",
        *_table(headings, rows),
        "",
        speed_sentence(measured),
        "",
        *(f"Not measured: {text}.\n" for text in measured.left_out),
        *_table(["", *names], size_rows(measured.networks)),
        "",
        "Memory of a pass is counted in eager PyTorch: tensors that live at once, without weights "
        "and inputs. All of this is in `measurements.json`.",
        "",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _how_to_load_onnx(facts: ExportFacts) -> list[str]:
    if facts.onnx_fault:
        return [
            "",
            f"There is no `model.onnx`: the network cannot be converted ({facts.onnx_fault}).",
        ]
    if facts.onnx_difference is None:
        return []
    fed = ", ".join(f'"{name}": {name}' for name in facts.onnx_inputs)
    return [
        "",
        "In ONNX Runtime, with NumPy arrays:",
        "",
        "```python",
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        f"(outputs,) = session.run(None, {{{fed}}})",
        "```",
        "",
        "Before it was written, ONNX Runtime gave the pruned network's outputs to within "
        f"{facts.onnx_difference:.1e} of each value.",
    ]


def _how_to_load_from_hub(facts: ExportFacts) -> list[str]:
    if facts.hub_fault:
        return ["", f"It is no folder of transformers': {facts.hub_fault}."]
    if facts.hub_difference is None:
        return []
    tokenizer = "The tokenizer lies beside it."
    if facts.no_tokenizer:
        tokenizer = f"There is no tokenizer beside it ({facts.no_tokenizer})."
    return [
        "",
        "By transformers, as a folder or after an upload to the hub:",
        "",
        "```python",
        f"from transformers import {facts.hub_class}",
        "",
        f'model = {facts.hub_class}.from_pretrained(".")  # this folder',
        "```",
        "",
        "Before it was written, transformers gave the pruned network's outputs to within "
        f"{facts.hub_difference:.1e} of each value. {tokenizer}",
    ]


def _is_hub_name(name: str) -> bool:
    """Returns whether a hub knows a network by this name, which a folder here is not."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _how_to_load_csr(facts: ExportFacts) -> list[str]:
    if facts.csr_fault:
        return ["", f"There is no `model.csr.safetensors`: {facts.csr_fault}."]
    if not facts.csr_ratios:
        return []
    sizes = list(next(iter(facts.csr_ratios.values())))
    rows = [
        [name, *(f"{ratios[size]:.2f}" for size in sizes)]
        for name, ratios in facts.csr_ratios.items()
    ]
    return [
        "",
        "With sparse linear layers as compressed sparse rows, which compute with the weights that "
        "are left only (for inference on the processor):",
        "",
        "```python",
        "from load_csr import load_network",
        "from safetensors.torch import load_file",
        "",
        f"model = {facts.class_name}(...)  # the class that it was made from",
        'model = load_network(model, load_file("model.csr.safetensors"))',
        "```",
        "",
        "These layers were faster so on the machine that wrote this; others stay dense. Measured, "
        "dense / CSR:",
        "",
        *_table(["layer", *(f"batch {size}" for size in sizes)], rows),
    ]


def _how_to_load_compact(facts: ExportFacts) -> list[str]:
    """Explains the program, and the loader that cuts the user's class to the widths."""
    program = _load_program(facts)
    assert facts.loader_difference is not None
    found = [_compared("a fresh network, so loaded, gave", facts.loader_difference)]
    if program:
        found.insert(0, _compared("the loaded program gave", facts.difference))
    return [
        *(program or [_missing_program(facts)]),
        "",
        f"{'Or, to' if program else 'To'} train on, as the class that it was made from, which "
        "`load.py` cuts to the widths in `widths.json`; it needs PyTorch and safetensors:",
        "",
        "```python",
        "from load import load_network",
        "",
        f"model = load_network({facts.class_name}(...))",
        "```",
        "",
        "`model.safetensors` has the shapes of the smaller network. Before it was written, "
        f"{', and '.join(found)}.",
    ]


def _compared(what: str, difference: float) -> str:
    """Words how outputs differ from those of the pruned network."""
    exact = "to the bit" if difference == 0 else f"to within {difference:.1e} of each value"
    return f"{what} the pruned network's outputs {exact}"


def _load_program(facts: ExportFacts) -> list[str]:
    if facts.program_fault:
        return []
    return [
        "In plain PyTorch, without this package and without the network's class:",
        "",
        "```python",
        "import torch",
        "",
        'model = torch.export.load("model.pt2").module()',
        f"outputs = model({facts.arguments})",
        "```",
    ]


def _missing_program(facts: ExportFacts) -> str:
    return (
        f"There is no `model.pt2`: torch.export cannot take this network ({facts.program_fault})."
    )


def _how_to_load(facts: ExportFacts) -> list[str]:
    strict = ", strict=False" if facts.stored_once else ""
    state = [
        "```python",
        "from safetensors.torch import load_file",
        "",
        f"model = {facts.class_name}(...)  # the class that it was made from",
        f'model.load_state_dict(load_file("model.safetensors"){strict})',
        "```",
    ]
    if facts.stored_once:
        names = " and ".join(f"`{name}`" for name in facts.stored_once)
        state += ["", f"The file leaves out {names}, which the class ties to other weights."]
    if facts.has_tied_weights:
        state += [
            "",
            "Layers share weights; the file holds such a weight under each of its names, once for "
            "each, and the loaded layers are equal rather than tied.",
        ]
    if facts.program_fault:
        return [*state, "", _missing_program(facts)]
    return [
        *_load_program(facts),
        "",
        "Or its weights into the same class:",
        "",
        *state,
        "",
        f"Before it was written, {_compared('the loaded program gave', facts.difference)}.",
    ]
