"""Layers pruned and refitted by numpy, one output and one weight at a time, from rows of inputs."""

from __future__ import annotations

import numpy as np


def lstsq(
    x: np.ndarray, y: np.ndarray, kept: np.ndarray, start: np.ndarray, damping: float
) -> np.ndarray:
    """Solves for one output: the damping is further rows of the same system."""
    strength = np.sqrt(damping * np.mean(np.sum(x**2, axis=0)))
    rows = np.concatenate([x[:, kept], strength * np.eye(kept.sum())])
    wanted = np.concatenate([y, strength * start[kept]])
    solution = np.zeros(len(kept))
    solution[kept] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return solution


def lstsq_behind_relu(
    x: np.ndarray,
    y: np.ndarray,
    kept: np.ndarray,
    start: np.ndarray,
    damping: float,
    affine: tuple[float, float],
    steps: int,
) -> np.ndarray:
    """Solves for one output that ReLU follows, again with other targets in each step.

    Args:
        affine: Scale and shift from the output to what ReLU gets.
    """
    scale, shift = affine
    solution = lstsq(x, y, kept, start, damping)
    for _ in range(steps):
        targets = y.copy()
        for row in range(len(x)):
            if y[row] * scale + shift <= 0:
                targets[row] = (min(x[row] @ solution * scale + shift, 0) - shift) / scale
        solution = lstsq(x, targets, kept, start, damping)
    return solution


def surgeon(
    x: np.ndarray,
    y: np.ndarray,
    kept: np.ndarray,
    start: np.ndarray,
    damping: float,
    quotas: list[int],
    width: int,
    most: int | None = None,
) -> np.ndarray:
    """Removes weights of all outputs by the optimal brain surgeon, inputs in their order.

    Args:
        quotas: Weights that go in each `width` inputs, those not `kept` first.
        most: So many of each output at most.
    """
    w = np.stack([lstsq(x, y[:, r], kept[r], start[r], damping) for r in range(len(start))])
    hessian = x.T @ x
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    goes = ~kept
    for j in range(len(hessian)):
        if j % width == 0:
            costs = []
            for i in range(j, min(j + width, len(hessian))):
                variance = np.linalg.inv(hessian[i:, i:])[0, 0]
                costs += [
                    (w[r, i] ** 2 / variance if kept[r, i] else -1.0, r, i) for r in range(len(w))
                ]
            goes[:, j : j + width] = False
            left = quotas[j // width]
            for _, r, i in sorted(costs):
                if left and (most is None or goes[r, j : j + width].sum() < most):
                    goes[r, i] = True
                    left -= 1
        inverse = np.linalg.inv(hessian[j:, j:])
        for r in np.flatnonzero(goes[:, j]):
            w[r, j:] -= w[r, j] / inverse[0, 0] * inverse[0]
            w[r, j] = 0
    return w
