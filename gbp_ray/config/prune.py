"""The section of a job for pruning: criterion, schedule, scope, granularity, target, examples."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from gbp_ray.config.criteria import CRITERIA, CriterionSpec, describe_criterion
from gbp_ray.config.schema import (
    MOST_EXAMPLES,
    PLUG_IN,
    Idle,
    Section,
    Worded,
    nearest_name,
    refuse,
)
from gbp_ray.errors import ConfigError

__all__ = ["SCHEDULES", "UNIT_KINDS", "Cost", "PruneConfig", "PruneTarget", "sparsity_schedule"]

_PATTERN_N_M = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")
_NO_DATA = Idle(
    "criterion = {criterion}",
    lambda prune: not prune.spec.needs_data and prune.reconstruct == "none",
)
_NO_GRADIENTS = Idle(
    "criterion = {criterion}",
    lambda prune: prune.spec.reads != "gradients" and not prune.has_gates,
)
_REFIT = Idle("reconstruct = {reconstruct}", lambda prune: prune.reconstruct != "none")
_NO_REFIT = Idle(
    "reconstruct = none",
    lambda prune: prune.reconstruct == "none" and "reconstruct_damping" not in prune.spec.options,
)
_NO_SOLUTIONS = Idle(
    "reconstruct = {reconstruct}", lambda prune: prune.reconstruct in ("none", "sparsegpt")
)
_ONE_ROUND = Idle("rounds = 1", lambda prune: prune.rounds == 1)
_ONE_SHOT = Idle("schedule = one_shot", lambda prune: prune.schedule == "one_shot")
_NO_PROBES = Idle(
    "criterion = {criterion}", lambda prune: "hutchinson_probes" not in prune.spec.options
)
_NO_GATE = Idle("criterion = {criterion}", lambda prune: not prune.spec.gate)
_NO_RATE = Idle(
    "finetune.epochs = 0",
    lambda job: job.prune.rewind == "learning_rate" and job.finetune.epochs == 0,
    of_job=True,
)
_OF_COST = Idle("target.{target}", lambda prune: prune.target.is_of_cost and prune.sparsity > 0)
_NO_UNITS = Idle("granularity = {granularity}", lambda prune: not prune.unit_kinds)
_UNITS = Idle("granularity = {granularity}", lambda prune: bool(prune.unit_kinds))
_NO_MASKS = Idle("initial_masks unset", lambda prune: not prune.initial_masks)
_BOUNDS = Worded("must be a number, or a table of name globs with a number each")
UNIT_KINDS = {"channel": ("channel",), "head": ("head",), "channel+head": ("channel", "head")}
"""Kinds of whole units by granularity."""


Cost = Literal["sparsity", "parameters", "macs", "bytes"]
"""What a target limits."""


class PruneTarget(Section):
    """What stays where whole units go: one of these, met to within one unit, never exceeded."""

    sparsity: float | None = Field(None, ge=0.0, lt=1.0)
    """Removed units / units after the last round; another way to write prune.sparsity, which
    counts where no target is set."""
    parameters: float | None = Field(None, gt=0.0)
    """Weights that stay, of all parameters, also those that are never pruned: up to 1 a part of
    the dense network's, 0.3 keeps 30 % of them; above 1 a number, 2e6 keeps two million."""
    macs: float | None = Field(None, gt=0.0)
    """Multiply-adds of one example that stay: up to 1 a part of the dense network's, 0.5 makes
    half; above 1 a number."""
    bytes: float | None = Field(None, gt=0.0)
    """Bytes of all parameters that stay, as macs: up to 1 a part of the dense network's."""
    uniform: bool = False
    """Whether layers that are alike, such as the feed-forward layers of all blocks, keep equally
    many units, so that the network's own class can make the result. All of them take each step
    together, each losing its own lowest-scoring units. Goes with prune.sparsity, too."""

    @model_validator(mode="before")
    @classmethod
    def _offers_no_latency(cls, given: Any) -> Any:
        if isinstance(given, dict) and "latency_ms" in given:
            raise ValueError(
                "latency_ms: is not offered, as a latency is measured after a decision; set macs, "
                "and measure the result with gbp-ray export"
            )
        return given

    @model_validator(mode="after")
    def _is_one(self) -> PruneTarget:
        named = [name for name, value in self if value is not None and name != "uniform"]
        if len(named) > 1:
            raise ValueError(
                f"{', '.join(named[:-1])} and {named[-1]}: are {len(named)} targets; leave one"
            )
        return self

    def __str__(self) -> str:
        return f"{self.kind} = {self.value:.15g}" if self.kind else "unset"

    @property
    def kind(self) -> Cost | None:
        """Returns the name of the field that is set, None for none."""
        kinds: tuple[Cost, ...] = ("sparsity", "parameters", "macs", "bytes")
        return next((kind for kind in kinds if getattr(self, kind) is not None), None)

    @property
    def value(self) -> float:
        """Returns the value of the field that is set, NaN for none."""
        return math.nan if self.kind is None else float(getattr(self, self.kind))

    @property
    def is_of_cost(self) -> bool:
        """Returns True if what counts is another cost than the number of units."""
        return self.kind not in (None, "sparsity")


class PruneConfig(Section):
    """Which weights are removed, and by which criterion."""

    criterion: str
    """A built-in criterion (see `gbp-ray criteria`) or your own as "module:attr"."""
    sparsity: Annotated[float, _OF_COST] = Field(ge=0.0, lt=1.0)
    """Removed units / prunable units after the last round. Required, unless a target is set."""
    rounds: int = Field(1, ge=1, le=999)
    """How often score, select, reconstruct and fine-tune are repeated."""
    schedule: Annotated[Literal["one_shot", "linear", "cubic", "geometric"], _ONE_ROUND] = (
        "geometric"
    )
    """Sparsity after each round, or, with a target, the part of its cost that is gone; one_shot
    removes everything in round 1 and fine-tunes on."""
    ramp_rounds: Annotated[int | None, _ONE_ROUND, _ONE_SHOT] = Field(None, ge=1, le=999)
    """Rounds after which the sparsity is reached; later ones only fine-tune. Unset: all rounds."""
    scope: Literal["global", "layer", "row"] = "global"
    """Which scores compete: those of all weights, or of each layer at the same sparsity, or of each
    row of a layer, the inputs of one output, at the same sparsity (Sun et al. 2023, with wanda). Of
    whole units: all by score per cost, or each group at the same sparsity of its units."""
    granularity: str = "weight"
    """Unit of removal: "weight", or "n:m" such as "2:4", which keeps n of every m inputs; or whole
    units with all that is coupled to them: "channel" (output channels, neurons, hidden units),
    "head" (attention heads), "channel+head" (both, in one decision)."""
    round_to: Annotated[int, _NO_UNITS] = Field(1, ge=1, le=4096)
    """Widths that pruning may leave: multiples of this many units. Kernels compute channels in
    blocks of 8, 16 or 32, and odd widths can take longer than the dense network's. A group that
    loses no unit keeps its width, whatever that is."""
    min_width: Annotated[int, _NO_UNITS] = Field(1, ge=1, le=MOST_EXAMPLES)
    """Least number of units that stay in a group; a smaller group loses none."""
    compact: Annotated[bool, _NO_UNITS] = True
    """Whether removed units leave the network after each round, so that later rounds train a
    smaller one, or stay in it as zeros."""
    unit_score: Annotated[Literal["gate", "sum"], _NO_UNITS, _NO_GATE] = "gate"
    """Score of a whole unit: "gate" takes the criterion of the unit's gate, a factor on all that
    reads it; "sum" sums the scores of its weights."""
    calibration_examples: Annotated[int, _NO_DATA] = Field(512, ge=1, le=MOST_EXAMPLES)
    """Training examples the scores are computed on."""
    calibration_batch_size: int = Field(64, ge=1, le=MOST_EXAMPLES)
    """Examples per scoring batch; part of the definition of taylor_squared."""
    calibration_augment: Annotated[bool, _NO_DATA] = True
    """Whether scoring sees training examples augmented, as training does, or plain."""
    calibration_precision: Annotated[Literal["float32", "bfloat16"], _NO_GRADIENTS] = "float32"
    """Data type of passes forward and back whose gradients are summed (torch.autocast); sums stay
    float64. Criteria with passes of their own, such as fisher's of single examples, stay float32,
    unless they score whole units by their gates."""
    hutchinson_probes: Annotated[int, _NO_PROBES] = Field(4, ge=1, le=10_000)
    """Random probes per batch for the Hessian diagonal of obd."""
    batchnorm_examples: Annotated[int, _REFIT] = Field(2048, ge=0, le=MOST_EXAMPLES)
    """Training examples that re-estimate BatchNorm statistics after each prune; 0 keeps them, and
    so does reconstruct, which fits the weights to them."""
    reconstruct: Literal["none", "least_squares", "sparsegpt", "sparsegpt_least_squares"] = "none"
    """After each prune: "least_squares" refits the kept weights of each linear layer and
    convolution, from input to output, to the dense network's outputs on the calibration examples;
    "sparsegpt" takes from the criterion only how many weights each of them loses, and chooses which
    itself, and "sparsegpt_least_squares" then refits those exactly, at some more cost. They read no
    labels, and need no fine-tuning after them."""
    reconstruct_damping: Annotated[float, _NO_REFIT] = Field(0.01, ge=0.0, le=1e6)
    """Strength of the pull towards the dense weights, relative to the mean square of the inputs;
    of criteria that invert moments of a layer, what is added to their diagonals, relative to it."""
    reconstruct_positions: Annotated[int, _NO_REFIT] = Field(16, ge=0, le=MOST_EXAMPLES)
    """Positions of a convolution's outputs, or tokens, that are refitted on, and that obs and kfac
    take products of inputs at, drawn by the seed for each example; 0 takes all."""
    reconstruct_relu_steps: Annotated[int, _NO_SOLUTIONS] = Field(2, ge=0, le=100)
    """Further solutions of a layer that ReLU follows: outputs that it sets to zero in both networks
    need not agree below zero, which leaves the weights free for the others."""
    rewind: Annotated[Literal["none", "weights", "learning_rate"], _NO_RATE] = "none"
    """After each prune: "weights" puts kept weights back to their dense values, "learning_rate"
    starts the schedule anew, "none" runs one schedule through all rounds."""
    initial_masks: str = ""
    """Masks to start from: a mask file, a round's or a trial's folder. They hold from the first
    weights on, in pretraining, too, and the schedule goes on from their sparsity."""
    initial_masks_digest: Annotated[str, _NO_MASKS] = ""
    """Digest of those masks, by which the trial is known; filled in when the job is read."""
    include: Annotated[tuple[str, ...], _UNITS] = ()
    """Name globs of parameters that are pruned beside the weights of convolutions and linear
    layers, such as "*.in_proj_weight", "rnn.weight_*", "embedding.weight" (n:m: along each entry)
    or the original of a parametrized weight; also layers that no pass in eval mode reaches."""
    exclude: tuple[str, ...] = ()
    """Name globs of parameters that are never pruned, such as "conv1.*"; wins over include."""
    layer_min_sparsity: Annotated[float | dict[str, float], _BOUNDS] = 0.0
    """Least sparsity of every layer, or of those matching a glob: { "layer3.*" = 0.5 }. Of whole
    units: of every group, or of those with a tensor that matches; the last match counts."""
    layer_max_sparsity: Annotated[float | dict[str, float], _BOUNDS] = 1.0
    """Greatest sparsity of every layer, or of those matching a glob. One weight always stays, of
    whole units one unit of each group, or round_to."""
    target: PruneTarget = PruneTarget()

    @field_validator("criterion")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in CRITERIA and not PLUG_IN.fullmatch(value):
            raise ValueError(
                f"is not a criterion{nearest_name(value, CRITERIA)} (allowed: "
                f'{", ".join(CRITERIA)}, or your own as "module:attr")'
            )
        return value

    @field_validator("granularity")
    @classmethod
    def _is_granularity(cls, value: str) -> str:
        match = _PATTERN_N_M.fullmatch(value)
        is_known = value == "weight" or value in UNIT_KINDS
        if not is_known and not (match and 0 < int(match[1]) < int(match[2])):
            raise ValueError(
                'must be "weight" or "n:m" with 0 < n < m, such as "2:4"; or, of whole units, '
                '"channel", "head" or "channel+head"'
            )
        return value

    @field_validator("layer_min_sparsity", "layer_max_sparsity")
    @classmethod
    def _are_fractions(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        for bound in value.values() if isinstance(value, dict) else [value]:
            if not 0.0 <= bound <= 1.0:
                raise ValueError(f"{bound} is outside [0, 1]")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _needs_no_sparsity_beside_a_target(
        cls, given: Any, handler: ModelWrapValidatorHandler[PruneConfig]
    ) -> PruneConfig:
        if not isinstance(given, dict) or "sparsity" in given:
            return handler(given)
        target = given.get("target")
        named = dict(target) if isinstance(target, dict | PruneTarget) else {}
        named.pop("uniform", None)
        if all(value is None for value in named.values()):
            return handler(given)
        try:
            sparsity = PruneTarget.model_validate(named).sparsity or 0.0
        except ValidationError:
            sparsity = 0.0  # The section's own check names the fault.
        made = handler({**given, "sparsity": sparsity})
        # It counts as unset, or an override of the target would contradict it.
        made.model_fields_set.discard("sparsity")
        return made

    @model_validator(mode="after")
    def _agree(self) -> PruneConfig:
        n, m = self.pattern or (0, 0)
        implied = 1 - n / m if m else self.sparsity
        # Bounds are shares of units, which say little of a cost.
        low = None if self.target.is_of_cost else self.layer_min_sparsity
        high = None if self.target.is_of_cost else self.layer_max_sparsity
        refuse(
            self.target.kind is not None
            and not self.unit_kinds
            and f"target.{self.target}: is met by removing whole units, not with granularity = "
            f'"{self.granularity}"; set granularity to channel, head or channel+head',
            self.target.uniform
            and not self.unit_kinds
            and f'target.uniform = true: is of whole units, and granularity = "{self.granularity}" '
            "removes weights; set granularity to channel, head or channel+head, or uniform to "
            "false",
            self.target.kind == "sparsity"
            and self.target.sparsity != self.sparsity
            and f"target.{self.target}: contradicts sparsity = "
            f"{self.sparsity:g}; leave one of them out",
            self.target.kind is None
            and not math.isclose(self.sparsity, implied, abs_tol=1e-9)
            and f'granularity = "{self.granularity}" means sparsity = {implied:g}, not '
            f"{self.sparsity:g}; set prune.sparsity={implied:g}",
            self.reconstruct.startswith("sparsegpt")
            and bool(self.unit_kinds)
            and f'reconstruct = "{self.reconstruct}": chooses single weights, and granularity = '
            f'"{self.granularity}" removes whole units; set granularity to weight or n:m, or '
            "reconstruct to least_squares",
            self.scope == "row"
            and self.granularity != "weight"
            and f'scope = "row": compares single weights, and granularity = "{self.granularity}" '
            'removes others; set scope to layer or global, or granularity to "weight"',
            bool(self.initial_masks and m)
            and f'initial_masks with granularity = "{self.granularity}": masks of single weights '
            'leave no whole groups; set granularity to "weight"',
            (self.ramp_rounds or 0) > self.rounds
            and f"ramp_rounds = {self.ramp_rounds} exceeds rounds = {self.rounds}; lower it",
            isinstance(low, float)
            and low > self.sparsity
            and f"layer_min_sparsity = {low:g} exceeds sparsity = {self.sparsity:g}; lower it",
            isinstance(high, float)
            and high < self.sparsity
            and f"layer_max_sparsity = {high:g} is below sparsity = {self.sparsity:g}; raise it",
        )
        return self

    @property
    def spec(self) -> CriterionSpec:
        """Returns the description of the criterion."""
        return describe_criterion(self.criterion)

    @property
    def norm_examples(self) -> int:
        """Returns how many examples re-estimate BatchNorm statistics after a prune."""
        # Measured: of a refitted ResNet-20 at 90 %, re-estimation costs two points.
        return self.batchnorm_examples if self.reconstruct == "none" else 0

    @property
    def num_relu_steps(self) -> int:
        """Counts the further solutions of a layer that ReLU follows."""
        return self.reconstruct_relu_steps if self.reconstruct.endswith("least_squares") else 0

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """Returns the kinds of whole units that are removed; empty where weights are."""
        return UNIT_KINDS.get(self.granularity, ())

    @property
    def has_gates(self) -> bool:
        """Returns True if whole units are scored by their gates."""
        return bool(self.unit_kinds and self.spec.gate) and self.unit_score == "gate"

    @property
    def goal(self) -> str:
        """Returns what pruning ends at, such as "sparsity = 0.9" or "macs = 0.5"."""
        return str(self.target) if self.target.kind else f"sparsity = {self.sparsity:.15g}"

    @property
    def pattern(self) -> tuple[int, int] | None:
        """Returns (n, m) of an n:m granularity, None for single weights."""
        match = _PATTERN_N_M.fullmatch(self.granularity)
        return (int(match[1]), int(match[2])) if match else None


SCHEDULES = ("one_shot", "linear", "cubic", "geometric")


def sparsity_schedule(
    kind: str,
    sparsity: float,
    rounds: int,
    ramp_rounds: int | None = None,
    start: float = 0.0,
) -> list[float]:
    """Lists the sparsity after each of `rounds` rounds; the last is `sparsity` exactly.

    With t = min(1, round / ramp_rounds), s = sparsity and s0 = start:
        one_shot: s at once; later rounds only fine-tune.
        linear: s0 + (s - s0) * t, the same number of units each round.
        cubic: s0 + (s - s0) * (1 - (1 - t)^3), fast first and slow last (Zhu and Gupta 2017,
            arXiv 1710.01878, eq. 1).
        geometric: 1 - (1 - s0) * ((1 - s) / (1 - s0))^t, the same part of the rest in each round
            (Frankle and Carbin 2019, arXiv 1803.03635, section 2).

    Args:
        kind: One of `SCHEDULES`.
        ramp_rounds: Rounds after which s is reached; later ones only fine-tune. All by default.
        start: Sparsity before the first round, at most `sparsity`.

    Raises:
        ConfigError: The kind is unknown.
    """
    ramp = ramp_rounds or rounds
    shares = [min(1.0, number / ramp) for number in range(1, rounds + 1)]
    if kind == "one_shot":
        steps = [sparsity for _ in shares]
    elif kind == "linear":
        steps = [start + (sparsity - start) * t for t in shares]
    elif kind == "cubic":
        steps = [start + (sparsity - start) * (1 - (1 - t) ** 3) for t in shares]
    elif kind == "geometric":
        left = (1 - sparsity) / (1 - start)
        steps = [1 - (1 - start) * left**t for t in shares]
    else:
        raise ConfigError(
            f"prune.schedule = '{kind}': not a schedule (allowed: {', '.join(SCHEDULES)})"
        )
    return [step if share < 1 else sparsity for step, share in zip(steps, shares, strict=True)]
