"""Descriptions of the criteria, without torch: what each reads, costs and comes from.

Checks, estimates, caches, reports and the command line use these descriptions, so that nothing
outside this module and `pruning.criteria`, which holds the functions, compares names of criteria.

Symbols of the formulas: w weight, g gradient of the mean loss over a batch, g_i of one example,
H Hessian, sum_b over batches, n_b items in batch b, n in all, z random signs. An item is an
example, or what else the loss is a mean over (`metrics`); example i counts as n_i. Of a whole unit,
d is the gradient in its gate, a factor of 1 on all that reads the unit: the sum of w g over the
weights that read it.

Of a linear layer or a convolution: x is one of the r rows of its inputs (an example, a token, or
the patch that one position of its output sees), y = W x, e the gradient in y of the sum of the
items' losses; w multiplies x_j and adds to y_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BASELINES", "CRITERIA", "CriterionSpec", "describe_criterion"]

Reads = Literal["nothing", "weights", "gradients", "activations", "passes", "history"]
"""The source of scores. Gradients of each batch, taken weight by weight, and weights never need a
sharded network whole. Activations are what goes into linear layers and convolutions, whose weights
alone have a score then. Passes are forward and backward passes of the criterion's own. History is
gathered during fine-tuning."""


@dataclass(frozen=True)
class CriterionSpec:
    """The description of a criterion.

    Attributes:
        name: As written in a job.
        formula: In ASCII, symbols as in the module's docstring.
        summed: The quantity that is added over batches and workers.
        cost: Relative to one forward and backward pass over the calibration examples.
        source: Authors, year, arXiv id or venue, equation.
        num_passes: Passes over the calibration data; 0 reads none of them.
        is_signed: Scores below zero have a meaning: removal is expected to help.
        gate: The formula for a whole unit, where it has one by the gate of the unit.
        options: Fields of [prune] that only this criterion reads.
    """

    name: str
    formula: str
    summed: str
    cost: str
    source: str
    reads: Reads
    num_passes: int = 0
    is_signed: bool = False
    gate: str = ""
    options: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Returns whether calibration examples are read."""
        return self.num_passes > 0

    @property
    def needs_history(self) -> bool:
        """Returns whether scores are gathered during fine-tuning."""
        return self.reads == "history"

    @property
    def scores_layers(self) -> bool:
        """Returns whether only weights of linear layers and convolutions have scores."""
        return self.reads == "activations"

    @property
    def feeds_ones(self) -> bool:
        """Returns whether its passes take an input of ones instead of data."""
        return self.reads == "passes" and not self.needs_data


_OF_ROWS = ("reconstruct_damping", "reconstruct_positions")
_TAYLOR = "|w * (1/n) sum_b n_b g_b|"
_TAYLOR_GATE = "|(1/n) sum_b n_b d_b|"

CRITERIA: dict[str, CriterionSpec] = {
    spec.name: spec
    for spec in (
        CriterionSpec(
            *("magnitude", "|w|", "nothing", "0"),
            "Han et al. 2015 (1506.02626), section 3",
            reads="weights",
        ),
        CriterionSpec(
            *("random", "u, uniform in [0, 1)", "nothing", "0"),
            "the control of Blalock et al. 2020 (2003.03033)",
            reads="nothing",
        ),
        CriterionSpec(
            *("taylor", _TAYLOR, "gradients, n_b * g_b", "1"),
            "Molchanov et al. 2017 (1611.06440), eq. 7, per weight",
            reads="gradients",
            num_passes=1,
            gate=_TAYLOR_GATE,
        ),
        CriterionSpec(
            *("snip", f"{_TAYLOR}, on untrained weights (pretrain.epochs = 0)"),
            *("gradients, n_b * g_b", "1"),
            "Lee et al. 2019 (1810.02340), eq. 5, without its normalising factor",
            reads="gradients",
            num_passes=1,
            gate=_TAYLOR_GATE,
        ),
        CriterionSpec(
            *("taylor_squared", "sum_b (w g_b)^2"),
            *("(w g_b)^2; depends on calibration_batch_size", "1"),
            "Molchanov et al. 2019 (1906.10771), eq. 8",
            reads="gradients",
            num_passes=1,
            gate="sum_b d_b^2",
        ),
        CriterionSpec(
            *("fisher", "w^2 * (1/n) sum_i g_i^2", "squared gradients of single examples"),
            "2 to 4",
            "Theis et al. 2018 (1801.05787), eq. 6, per weight, empirical Fisher diagonal",
            reads="passes",
            num_passes=1,
            gate="(1/n) sum_i n_i d_i^2",
        ),
        CriterionSpec(
            *("obd", "w^2 * h / 2, h = (1/n) sum_b n_b mean_z z * (H_b z)"),
            "Hessian diagonals, by hutchinson_probes random probes per batch",
            "1 + 2 per probe",
            "LeCun et al. 1990 (NIPS 2), eq. 5; diagonal by Hutchinson 1989",
            reads="passes",
            num_passes=1,
            is_signed=True,
            options=("hutchinson_probes",),
        ),
        CriterionSpec(
            *("grasp", "w * (H G), G = (1/n) sum_b n_b g_b, H likewise"),
            *("gradients, then n_b * (H_b G)", "4, two passes"),
            "Wang et al. 2020 (2002.07376), eq. 8; its sign turned so that low is removed",
            reads="passes",
            num_passes=2,
            is_signed=True,
        ),
        CriterionSpec(
            *("synflow", "|w * dR/dw|, R = 1' prod_l |W_l| 1"),
            *("nothing; no data is read", "1 example"),
            "Tanaka et al. 2020 (2006.05467), eq. 4 and algorithm 1; biases taken as zero",
            reads="passes",
        ),
        CriterionSpec(
            *("wanda", "|w| * sqrt((1/r) sum x_j^2)"),
            *("squares of the inputs of layers, over all rows", "0.4, no backward pass"),
            "Sun et al. 2023 (2306.11695), eq. 1, with the mean over rows for their sum",
            reads="activations",
            num_passes=1,
        ),
        CriterionSpec(
            *(
                "obs",
                "w^2 / (2 [H^-1]_jj sum |y|^2), H = sum x x', damped, of the inputs kept for y_i",
            ),
            *("products of the inputs of layers", "1, no backward pass, an inverse for each"),
            "Hassibi and Stork 1993 (NIPS 5); by layer Frantar et al. 2022 (2208.11580), sec. 4; "
            "here relative to the layer's outputs, so that layers compete",
            reads="activations",
            num_passes=1,
            options=_OF_ROWS,
        ),
        CriterionSpec(
            *(
                "kfac",
                "w^2 / (2 [A^-1]_jj [B^-1]_ii), A = (1/r) sum x x', B = (1/n) sum e e', damped",
            ),
            *("products of the inputs of layers, and of gradients in outputs", "1.5"),
            "Martens and Grosse 2015 (1503.05671), convolutions: Grosse and Martens 2016 "
            "(1602.01581); for pruning Wang et al. 2019 (1905.05934)",
            reads="activations",
            num_passes=1,
            options=_OF_ROWS,
        ),
        CriterionSpec(
            *("movement", "-sum_t w_t g_t over fine-tuning steps t since the last prune"),
            *("-w g of each step, over the whole batch", "0, gathered while fine-tuning"),
            "Sanh et al. 2020 (2005.07683), eq. 4, without straight-through gradients",
            reads="history",
            is_signed=True,
        ),
    )
}
"""The built-in criteria by name; `gbp-ray criteria` prints them."""

BASELINES = ("random", "magnitude")
"""The criteria that every comparison should include."""


def describe_criterion(name: str) -> CriterionSpec:
    """Returns the description of a criterion; one named "module:attr" reads batches."""
    return CRITERIA.get(name) or CriterionSpec(
        *(name, "sum_b f(batch)", "what the function returns", "one call per batch", "yours"),
        reads="passes",
        num_passes=1,
        is_signed=True,
    )
