"""The page of one trial: figures of its network after pruning, and of its answers.

Part of the report, without torch. What lives is read from the masks and weights of the round that
the trial is for; what needs the network to be run comes from the findings of `gbp-ray explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jinja2
import numpy as np

from gbp_ray import __version__
from gbp_ray.errors import StoreError
from gbp_ray.report import trial_figures, unit_figures
from gbp_ray.report.drawing import Sketch, draw_figures
from gbp_ray.results.findings import Findings, read_findings
from gbp_ray.results.records import RoundRecord, TrialRecord, UnitsRecord
from gbp_ray.results.store import Store
from gbp_ray.results.tensors import WEIGHTS, read_masks, read_weight

__all__ = [
    "make_trial_page",
]


def make_trial_page(
    store: Store,
    trial_id: str,
    stem: str,
    made: str,
    template: jinja2.Template,
    num_processes: int,
) -> dict[str, bytes]:
    """Makes the page of a finished trial, and its figures as PNG.

    Args:
        stem: What the files are called, without a suffix, relative to the report.
        made: When, for the page's foot.
        template: Of the page.
        num_processes: Draw the figures, as `drawing.draw_figures` says.

    Returns:
        File name to content, the page first.

    Raises:
        StoreError: The trial has not finished, or its files are damaged or missing.
    """
    trial = store.read_trial(trial_id)
    if trial is None:
        raise StoreError(f"'{store.trial_uri(trial_id)}': has not finished")
    left_out: list[str] = []
    found = read_findings(store, trial_id)
    # The findings may be of another round than the one that the trial is for.
    record = trial.chosen if found is None else trial.rounds[found.round]
    masks = _read_masks(store, trial_id, record)
    sketches: list[Sketch] = []
    if found is not None:
        left_out += found.left_out
        sketches += _sketch_differences(found)
    if record.cost.units is not None:
        sketches += _sketch_units(record.cost.units, masks)
    sketches += _sketch_living(masks)
    if found is not None and found.layers:
        sketches.append(_sketch_saliency(found))
    sketches += _sketch_filters(store, trial, record, masks)
    figures = draw_figures(sketches, lambda name: f"{stem}-{name}.png", "trial", num_processes)
    page = template.render(
        metric=trial.metric,
        version=__version__,
        made=made,
        trial=trial,
        record=record,
        uri=store.round_uri(trial_id, record.round),
        found=found,
        figures=figures,
        rows=[_describe_layer(name, mask) for name, mask in masks.items()],
        left_out=left_out,
    )
    pictures = {figure.name: figure.png for figure in figures}
    return {f"{stem}.html": page.encode(), **pictures}


def _read_masks(store: Store, trial_id: str, record: RoundRecord) -> dict[str, np.ndarray]:
    packed = read_masks(store, trial_id, record)
    # In the network's order, which the record keeps.
    order = [layer.name for layer in record.cost.layers if layer.name in packed]
    return {name: packed[name].unpack() for name in order}


def _describe_layer(name: str, mask: np.ndarray) -> dict[str, Any]:
    links = trial_figures.look_at_links(mask)
    filters, inputs = np.any(links, axis=1), np.any(links, axis=0)
    return {
        "name": name,
        "shape": "x".join(map(str, mask.shape)),
        "num_kept": int(mask.sum()),
        "sparsity": 100 * (1 - float(mask.mean())),
        "filters": f"{int(filters.sum())} of {filters.size}",
        "inputs": f"{int(inputs.sum())} of {inputs.size}",
    }


# -- figures ---------------------------------------------------------------------------------------


def _sketch_differences(found: Findings) -> Iterator[Sketch]:
    if found.classes:
        worst = min(
            found.classes, key=lambda c: (c.num_right_pruned - c.num_right_dense) / c.num_examples
        )
        points = 100 * (worst.num_right_pruned - worst.num_right_dense) / worst.num_examples
        yield Sketch(
            "classes",
            "Accuracy by class, dense and pruned",
            partial(trial_figures.draw_classes, found),
            "Accuracy of each class in the dense and the pruned network; "
            f"{found.name_class(worst.label)} changes most for the worse, by {points:+.2f} points.",
            "The most hurt first. A mean that hardly moves may hide a class that pays (Hooker et "
            "al. 2019, arXiv 1911.05248).",
        )
    if found.examples and len(found.images):
        words = ""
        if found.agreement:
            pairs = [f"{value:.2f} where the answer {_word(k)}" for k, value in
                     found.agreement.items()]  # fmt: skip
            words = f" Mean cosine of the two networks' gradients: {', '.join(pairs)}."
        changed = sum(item.is_changed for item in found.examples)
        yield Sketch(
            "examples",
            "Examples that the pruned network sees differently",
            partial(trial_figures.draw_examples, found),
            f"{changed} test examples whose answer changed and "
            f"{len(found.examples) - changed} whose answer stayed: the input, and where the "
            "output of the true class is sensitive, in the dense and in the pruned network.",
            "Each: the input; where the dense network's output for the true class is sensitive "
            "(size of its gradient by the input, yellow is most, each map on its own scale); the "
            "same for the pruned network. First those on which both are surest of different "
            f"answers, then some by chance.{words}",
        )


def _sketch_units(units: UnitsRecord, masks: Mapping[str, np.ndarray]) -> Iterator[Sketch]:
    widths = [
        unit_figures.Width(width.name, width.kind, width.num_units, width.num_kept)
        for width in units.widths
    ]
    gone = units.num_units - units.num_kept
    yield Sketch(
        "network",
        "The network before and after",
        partial(unit_figures.draw_networks, [("", widths)]),
        f"Units of each group, dense and left: {units.num_kept:,} of {units.num_units:,} are left.",
        "The network from the input, top, to the output: a bar for each group of units, named by "
        "the first weight that makes them, as wide as the dense network in grey and as what is "
        f"left in colour. {gone:,} units "
        + ("left the network." if units.is_compact else "are zeros in the network."),
    )
    living = {
        width.name: lives
        for width in units.widths
        if width.name in masks
        and (lives := unit_figures.find_living(masks[width.name], width.num_units, width.num_kept))
        is not None
    }
    if living:
        yield Sketch(
            "units",
            "Which units live",
            partial(unit_figures.draw_units, living),
            "For each group a strip of its units, coloured where they live; the numbers are in "
            "the table below.",
            "In the order that they have in the group's first weight, the first unit on the left. "
            "A unit lives or goes in all weights that it lies in.",
        )


def _sketch_living(masks: Mapping[str, np.ndarray]) -> Iterator[Sketch]:
    dead = 0
    for mask in masks.values():
        living = np.any(mask.reshape(mask.shape[0], -1), axis=1)
        dead += living.size - int(living.sum())
    yield Sketch(
        "living",
        "What lives in each layer",
        partial(trial_figures.draw_living, masks),
        "Share of each layer's weights, filters and input channels that are not all removed; the "
        "numbers are in the table below.",
        "A filter lives while any of its weights does, an input channel while any filter reads "
        f"it. {dead:,} filters are dead.",
    )
    yield Sketch(
        "links",
        "Which filter reads which input channel",
        partial(trial_figures.draw_kept_links, masks),
        "For some layers a matrix of filters and input channels, the brighter the more weights "
        "between them are kept.",
        "Dark: nothing is left between the two. A dark row is a dead filter, a dark column an "
        "input that nothing reads; large layers are averaged down. f: living filters, in: living "
        "input channels.",
    )


def _sketch_saliency(found: Findings) -> Sketch:
    return Sketch(
        "saliency",
        "Saliency by layer, before and after",
        partial(trial_figures.draw_saliency, found),
        f"Mean {found.criterion} saliency of a weight by layer: in the dense network, of those "
        "kept there, and of those kept in the pruned network.",
        "On a logarithmic axis, by the examples that the job was calibrated on. A layer whose "
        "kept weights came to be worth more carries what its removed ones did.",
    )


def _sketch_filters(
    store: Store,
    trial: TrialRecord,
    record: RoundRecord,
    masks: Mapping[str, np.ndarray],
) -> Iterator[Sketch]:
    first = next(iter(masks), None)
    if first is None or masks[first].ndim != 4:
        return
    pair = []
    for stored in (trial.dense, record):
        uri = store.round_uri(trial.trial_id, stored.round)
        data = store.read_file(trial.trial_id, stored, WEIGHTS)
        pair.append(read_weight(data, first, uri))
    dense, pruned = pair
    if dense is None or pruned is None:
        return
    yield Sketch(
        "filters",
        "The first layer's filters",
        partial(trial_figures.draw_first_filters, dense, pruned, masks[first]),
        f"The filters of {first}, dense and pruned.",
        f"{first}. Three input channels are shown as colour around grey; one as orange to purple, "
        "negative to positive. Both on one scale.",
    )


def _word(kind: str) -> str:
    return "stayed" if kind == "same" else kind
