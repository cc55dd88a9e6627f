"""Sparsity after each round: how fast a network is thinned, for `rounds` to follow."""

from __future__ import annotations

from gbp_ray.errors import ConfigError

__all__ = ["SCHEDULES", "sparsity_schedule"]

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
        geometric: 1 - (1 - s0) * ((1 - s) / (1 - s0))^t, the same share of what is left each round
            (Frankle and Carbin 2019, arXiv 1803.03635, section 2).

    Args:
        kind: One of `SCHEDULES`.
        sparsity: Final sparsity in [0, 1).
        rounds: At least 1.
        ramp_rounds: After how many of them s is reached, and the rest only fine-tune; all by
            default.
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
