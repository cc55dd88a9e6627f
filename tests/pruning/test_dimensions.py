"""Uniform widths: layers that are alike lose equally many units."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from chains import count_from_shapes, make_structure
from hypothesis import given
from hypothesis import strategies as st
from small_networks import job_config
from unit_rounds import Stacked, case_of

from gbp_ray.config.job import trial_id
from gbp_ray.config.prune import PruneConfig
from gbp_ray.errors import ConfigError, PruneError
from gbp_ray.pruning.budget import Bounds, Budget, check_budget, select_units
from gbp_ray.pruning.dimensions import alike
from gbp_ray.pruning.structure import Structure
from gbp_ray.pruning.whole_units import find_units

KINDS = ("sparsity", "parameters", "macs", "bytes")


def narrowed(structure: Structure, scores_U: np.ndarray, widths: list[int]) -> np.ndarray:
    """Keeps of each group so many units, the highest-scoring ones."""
    kept_U = np.zeros(structure.num_units, dtype=bool)
    for start, scores_G, width in zip(
        structure.bounds, structure.split(scores_U), widths, strict=False
    ):
        order = sorted(range(len(scores_G)), key=lambda unit: (scores_G[unit], unit))
        kept_U[[start + unit for unit in order[len(order) - width :]]] = True
    return kept_U


def below(width: int, round_to: int) -> int:
    return max(0, (width - 1) // round_to * round_to)


@given(data=st.data())
def test_layers_that_are_alike_take_the_step_of_the_lowest_price_together(
    data: st.DataObject,
) -> None:
    """Follows the greedy choice in fractions, without heap, one dimension at a time."""
    wide, narrow = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))
    structure = make_structure(data.draw(st.permutations([wide, wide, wide, narrow])))
    kind, round_to = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([1, 1, 2]))
    size = structure.num_units
    values = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    scores_U = np.array(data.draw(values), dtype=float)
    dense = [group.num_units for group in structure.groups]
    dimensions = [
        [number for number, width in enumerate(dense) if width == size]
        for size in dict.fromkeys(dense)
    ]
    assert sorted(map(sorted, dimensions)) == sorted(map(sorted, alike(structure)))

    def cost(widths: list[int]) -> int:
        return count_from_shapes(structure, kind, narrowed(structure, scores_U, widths))

    def steps(widths: list[int]) -> Iterator[tuple[Fraction, list[int]]]:
        for numbers in dimensions:
            low = below(widths[numbers[0]], round_to)
            if low:
                after = [low if n in numbers else width for n, width in enumerate(widths)]
                before_U, after_U = (narrowed(structure, scores_U, w) for w in (widths, after))
                gone = scores_U[before_U & ~after_U].sum()
                yield Fraction(int(gone), cost(widths) - cost(after)), after

    widths, least = dense, cost([min(round_to, width) for width in dense])
    limit = data.draw(st.integers(least, cost(dense)))
    while cost(widths) > limit:
        found = sorted(steps(widths))
        if len(found) > 1 and found[0][0] == found[1][0]:
            return  # Equal prices go by unit number.
        widths = found[0][1]
    bounds = Bounds(round_to=round_to, is_uniform=True)
    everything = structure.everything
    choice = select_units(structure, scores_U, everything, Budget(kind, limit), bounds=bounds)
    after = structure.widths(choice.kept_U)
    for numbers in dimensions:
        assert len({after[number] for number in numbers}) == 1
    # What the last step saved too much may come back; nothing else differs.
    assert all(width >= low for width, low in zip(after, widths, strict=True))
    assert np.array_equal(choice.kept_U, narrowed(structure, scores_U, after))
    assert choice.cost == cost(after) <= limit
    for numbers in dimensions:
        up = min(dense[numbers[0]], (after[numbers[0]] // round_to + 1) * round_to)
        if up > after[numbers[0]]:
            wider = [up if n in numbers else width for n, width in enumerate(after)]
            assert cost(wider) > limit


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_shares_of_one_layer_hold_for_all_that_are_alike(scope: str) -> None:
    structure = make_structure([8, 8, 8])
    scores_U = np.arange(24.0)
    limit = Budget("sparsity", 12.0)

    def widths(**bounds: object) -> list[int]:
        ask = {"scope": scope, "bounds": Bounds(is_uniform=True, **bounds)}
        everything = structure.everything
        return structure.widths(select_units(structure, scores_U, everything, limit, **ask).kept_U)

    assert widths() == [4, 4, 4]
    assert widths(round_to=3) == [3, 3, 3]
    with pytest.raises(PruneError, match=r"at least 18 of 24 do"):
        widths(max_sparsity={"l1.weight": 0.25})
    assert widths(min_sparsity={"l1.weight": 0.5}) == [4, 4, 4]
    with pytest.raises(PruneError, match=r"^prune\.layer_min_sparsity: leaves 6 units"):
        widths(min_sparsity={"l0.weight": 0.75})


def test_masks_of_unequal_widths_are_refused() -> None:
    structure = make_structure([4, 4])
    some_U = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    prune = PruneConfig(
        criterion="taylor", granularity="channel", sparsity=0.5, target={"uniform": True}
    )
    check_budget(structure, prune, structure.everything)
    with pytest.raises(
        ConfigError, match=r"^prune\.target\.uniform = true: 'l0\.weight' has 4 units left and 'l1"
    ):
        check_budget(structure, prune, some_U)


def test_a_layer_that_keeps_its_width_hinders_those_that_are_like_it() -> None:
    job, workload = case_of("uniform")
    whole = find_units(workload, Stacked(), job.prune)
    assert [len(numbers) for numbers in alike(whole)] == [3]
    some = job.prune.model_copy(update={"exclude": (*job.prune.exclude, "up.1.*")})
    with pytest.raises(
        ConfigError,
        match=r"^prune\.target\.uniform = true: 'up\.1\.weight' keeps its width \(.*'up\.\d\.w",
    ):
        find_units(workload, Stacked(), some)
    other = some.model_copy(update={"target": some.target.model_copy(update={"uniform": False})})
    assert len(find_units(workload, Stacked(), other).groups) == 2


def test_uniform_is_part_of_a_trial_only_where_it_is_set() -> None:
    prune = {"granularity": "channel", "sparsity": 0.2}
    plain = trial_id(job_config(prune=prune))
    assert trial_id(job_config(prune={**prune, "target": {"uniform": False}})) == plain
    told = {**prune, "target": {"sparsity": 0.2}}
    assert trial_id(job_config(prune=told)) == plain
    uniform = trial_id(job_config(prune={**prune, "target": {"uniform": True}}))
    assert uniform != plain
    told["target"]["uniform"] = True
    assert trial_id(job_config(prune=told)) == uniform
    costs = [{"macs": 0.5}, {"macs": 0.5, "uniform": True}]
    ids = [trial_id(job_config(prune={**prune, "target": target})) for target in costs]
    assert len({*ids, plain, uniform}) == 4


def test_single_weights_have_no_uniform_widths() -> None:
    with pytest.raises(ValueError, match=r"target\.uniform = true: is of whole units, and granul"):
        PruneConfig(criterion="taylor", sparsity=0.5, target={"uniform": True})
    with pytest.raises(ValueError, match=r"prune\.sparsity|Field required"):
        PruneConfig(criterion="taylor", granularity="channel", target={"uniform": True})
