"""Records of what a network costs: weights, multiply-adds and bytes, by layer and by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    computed_field,
    model_serializer,
)

from gbp_ray.errors import name_some

__all__ = [
    "CostRecord",
    "Count",
    "LayerRecord",
    "Record",
    "UnitsRecord",
    "WidthRecord",
    "describe_unpruned",
    "without_empty",
]

Count = Annotated[int, Field(ge=0, lt=2**63)]


class Record(BaseModel):
    """The base of all records: frozen, and open to fields of later versions."""

    # "ignore": a reader of today opens the records of a later version that added fields.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


def without_empty(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    """Drops some entries where they are empty."""
    return {key: value for key, value in tree.items() if value or key not in names}


class LayerRecord(Record):
    """One prunable parameter, measured from its weights."""

    name: str
    shape: tuple[Count, ...]
    num_weights: Count
    num_nonzero: Count
    macs: Count
    macs_nonzero: Count

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Zero weights / weights."""
        return 1 - self.num_nonzero / max(1, self.num_weights)


def describe_unpruned(unpruned: Mapping[str, tuple[int, str]], num_prunable: int) -> str:
    """Describes matrices that cannot be pruned, naming a few; "" without any.

    Args:
        unpruned: Of each its weights, and the reason.
        num_prunable: Weights that can be pruned.
    """
    if not unpruned:
        return ""
    number = sum(num_weights for num_weights, _ in unpruned.values())
    named = [f"{name} ({n:,}, {why})" for name, (n, why) in unpruned.items()]
    return (
        f"{number:,} of {number + num_prunable:,} weights in matrices are not prunable: "
        f"{name_some(named)}"
    )


class WidthRecord(Record):
    """How many units a group has left.

    Attributes:
        name: Of the group: the first weight that makes them, with a number from its second on.
        kind: "channel" or "head".
    """

    name: str
    kind: str
    num_units: Count
    num_kept: Count

    @property
    def weight(self) -> str:
        """Returns the name of that weight."""
        return self.name.partition(" (")[0]


class UnitsRecord(Record):
    """What is left of a network that loses whole units, without them.

    Attributes:
        num_parameters: Weights of all parameters.
        macs: Multiply-adds of one example.
        num_bytes: Of all parameters, as `prune.target.bytes` limits them.
        is_compact: The removed units have left the network; else they are zeros in it.
        difference: Largest difference of outputs when units left in this round, over the greatest
            output; None where none did.
    """

    num_parameters: Count
    macs: Count
    num_bytes: Count
    is_compact: bool
    difference: float | None = None
    widths: tuple[WidthRecord, ...]

    @property
    def num_units(self) -> int:
        """Units of the dense network."""
        return sum(width.num_units for width in self.widths)

    @property
    def num_kept(self) -> int:
        """Units that are left."""
        return sum(width.num_kept for width in self.widths)


class CostRecord(Record):
    """The cost of a network: the whole model, and its prunable layers.

    Attributes:
        macs_fault: Why multiply-adds were not counted, which then are 0 everywhere; or, of a
            network whose were, in which layers it is not known what zeros save, so nothing.
        unpruned: Of each other parameter of two axes or more its weights, and why they were not
            prunable.
        units: Where whole units are removed. The other counts are then those of the dense network
            with zeros in their place.
    """

    num_parameters: Count
    num_nonzero: Count
    macs: Count
    macs_nonzero: Count
    macs_fault: str = ""
    num_bytes: Count
    num_bytes_sparse: Count
    layers: tuple[LayerRecord, ...]
    unpruned: dict[str, tuple[int, str]] = {}
    units: UnitsRecord | None = None

    @model_serializer(mode="wrap")
    def _without_units(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(write(self), "units")

    @property
    def unpruned_in_words(self) -> str:
        """Describe the matrices that cannot be pruned, naming a few; "" without any."""
        return describe_unpruned(self.unpruned, self.num_units)

    @property
    def left(self) -> dict[str, float | None]:
        """What is left of the dense network by column of the index, None where not counted.

        Of single weights what zeros could save: no measured file and no measured time.
        """
        parameters = self.num_nonzero if self.units is None else self.units.num_parameters
        return {
            "macs_left": self.macs_nonzero / self.macs if self.macs else None,
            "parameters_left": parameters / max(1, self.num_parameters),
            "bytes_left": self.num_bytes_sparse / max(1, self.num_bytes),
        }

    @property
    def reached(self) -> str:
        """What pruning has come to, in words: the sparsity, or of whole units what is left."""
        if self.units is None:
            return f"sparsity {self.sparsity:.2%}"
        macs = f"MACs {self.units.macs / self.macs:.1%}, " if self.macs else ""
        return f"{macs}parameters {self.left['parameters_left']:.1%} left"

    @property
    def headline(self) -> str:
        """What pruning has come to, as a title says it."""
        return f"{self.sparsity:.1%} sparse" if self.units is None else self.reached

    @property
    def num_units(self) -> int:
        """Prunable weights."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def num_kept(self) -> int:
        """Prunable weights that are not zero."""
        return sum(layer.num_nonzero for layer in self.layers)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        """Zero weights / prunable weights."""
        return 1 - self.num_kept / max(1, self.num_units)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def compression(self) -> float:
        """Parameters before / parameters left, whole model."""
        return self.num_parameters / max(1, self.num_nonzero)
