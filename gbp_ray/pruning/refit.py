"""Solves for the kept weights of one layer, from sums over the rows of its inputs.

A layer multiplies rows x of its inputs by its weights, and y are the outputs that it should come
to. With H = sum of x x^T and damping towards the weights w0 that it had, the best weights are

    w* = (sum of y x^T + s w0) (H + s I)^-1,    s = damping * mean(diag(H)),

over the inputs that are kept, and every other w costs (w - w*) (H + s I) (w - w*)^T more.

Shape suffixes: C = inputs, M = outputs, B = inputs of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gbp_ray.errors import PruneError
from gbp_ray.pruning.selection import share_out

__all__ = ["is_mostly_kept", "least_squares", "solve_whole", "sparsegpt"]

_MOSTLY_KEPT = 0.55
"""Above this share of kept inputs it is faster to solve for the pruned ones. Measured."""
_LEAST_SCALE = 1e-10
"""Ratio of pivots below which an inverse has lost too many of the 16 digits."""


def least_squares(
    inputs: Tensor,
    products: Tensor,
    columns: Tensor,
    support: Tensor,
    start: Tensor,
    damping: float,
    whole: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Solves for outputs that keep the same inputs, exactly.

    Costs the cube of the number of kept inputs, or, given `whole`, of pruned ones where these are
    fewer: from the solution w* on all inputs, with P the pruned ones and U = (H + s I)^-1,

        w = w* - w*_P (U_PP)^-1 U_P.

    Args:
        inputs: sum x x^T, (C, C) float64.
        products: sum x y^T, (C, M) float64.
        columns: Which of the M outputs.
        support: (C,) bool, the kept inputs.
        start: (outputs, C), the weights that damping draws to.
        damping: Relative to the mean of the diagonal of `inputs`.
        whole: What `solve_whole` returns for the same sums, weights and damping.

    Returns:
        (outputs, C) float64, zero outside of the support.

    Raises:
        PruneError: The kept inputs are linearly dependent, and damping is 0.
    """
    start = start.double()
    solution = torch.zeros_like(start)
    (kept,) = support.nonzero(as_tuple=True)
    strength = damping * inputs.diagonal().mean()
    if len(kept) == 0:
        return solution
    if whole is not None and is_mostly_kept(support):
        inverse, solution_MC = whole
        (pruned,) = (~support).nonzero(as_tuple=True)
        factor, fault = torch.linalg.cholesky_ex(inverse[pruned[:, None], pruned])
        if not int(fault):
            unkept = solution_MC[columns[:, None], pruned]
            multipliers = torch.zeros_like(solution)
            multipliers[:, pruned] = torch.cholesky_solve(unkept.T, factor).T
            found = solution_MC[columns] - multipliers @ inverse
            return found.masked_fill_(~support, 0)
    factor = _factor(inputs[kept[:, None], kept], strength, inputs)
    if factor is None:
        solution[:, kept] = start[:, kept]
        return solution
    target = products[kept[:, None], columns] + strength * start[:, kept].T
    solution[:, kept] = torch.cholesky_solve(target, factor).T
    return solution


def is_mostly_kept(support: Tensor) -> bool:
    """Returns whether solving for the pruned inputs of an output is faster."""
    return int(support.sum()) > _MOSTLY_KEPT * len(support)


def solve_whole(
    inputs: Tensor, products: Tensor, start: Tensor, damping: float
) -> tuple[Tensor, Tensor] | None:
    """Solves for outputs that keep all inputs.

    Args:
        start: (M, C), the weights that damping draws to.

    Returns:
        (H + s I)^-1, (C, C), and the solution, (M, C), both float64; None where the inputs are
        nearly dependent, so that digits would be lost, or nothing ever comes in.
    """
    strength = damping * inputs.diagonal().mean()
    system = inputs.clone()
    system.diagonal().add_(strength)
    factor, fault = torch.linalg.cholesky_ex(system)
    scales = factor.diagonal().square()
    if int(fault) or float(scales.min()) < _LEAST_SCALE * float(scales.max()):
        return None
    target = products + strength * start.double().T
    return torch.cholesky_inverse(factor), torch.cholesky_solve(target, factor).T.contiguous()


def sparsegpt(
    inputs: Tensor,
    weights: Tensor,
    kept: Tensor,
    num_pruned: int,
    damping: float,
    *,
    pattern: tuple[int, int] | None = None,
    order: Tensor | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prunes weights of one layer, input after input, each made up for by the inputs behind it.

    This is algorithm 1 of Frantar and Alistarh 2023 (SparseGPT, arXiv 2301.00774), begun at the
    solution on all kept inputs instead of at the dense weights. In front of each block of inputs,
    those of its weights go that cost least, w^2 / d, where d is the input's entry on the diagonal
    of the inverse of H + s I without the inputs before it. All outputs compete in a block, and all
    blocks lose the same share, as far as the weights pruned before allow. Takes about C^3 + M C^2
    multiply-adds, and memory for C^2 numbers.

    Args:
        inputs: sum x x^T, (C, C) float64.
        weights: (M, C), the solution of `least_squares` on those kept.
        kept: (M, C) bool, False where pruned before; those stay pruned.
        num_pruned: Weights that are pruned in the end, those pruned before included.
        damping: Relative to the mean of the diagonal of `inputs`.
        pattern: (n, m): of each m inputs, in the order of the sweep, an output keeps n at least,
            and the choice is made in front of each m. None for single weights.
        order: (C,), the inputs in the order of the sweep; theirs by default.
        block: Inputs whose weights compete, where there is no pattern.

    Returns:
        The weights, (M, C) float64, and which of them are kept, (M, C) bool.

    Raises:
        PruneError: The inputs are linearly dependent, and damping is 0.
    """
    num_outputs, num_inputs = weights.shape
    device = inputs.device
    order = torch.arange(num_inputs, device=device) if order is None else order.to(device)
    inputs = inputs[order][:, order]
    w = weights.T.double()[order]  # (C, M), so that the weights of an input are neighbours
    stays = kept.T[order]
    # With H + s I = R R^T, R upper triangular, and U = R^-1, the inverse without the first inputs
    # is U^T U of the rest of U. R is the Cholesky factor for the inputs in reverse.
    strength = damping * inputs.diagonal().mean()
    factor = _factor(inputs.flip(0, 1), strength, inputs)
    eye = torch.eye(num_inputs, dtype=torch.float64, device=device)
    u = eye
    if factor is not None:
        u = torch.linalg.solve_triangular(factor.flip(0, 1), eye, upper=True)
    n, m = pattern or (0, 1)
    if pattern is None:
        width = block
    else:
        width, block = m, max(block // m, 1) * m
    sizes = [len(part) * num_outputs for part in stays.split(width)]
    before = [int((~part).sum()) for part in stays.split(width)]
    quotas = share_out(num_pruned, sizes, before, [size // m * (m - n) for size in sizes])
    for first in range(0, num_inputs, block):
        last = min(first + block, num_inputs)
        errors_BM = torch.zeros_like(w[first:last])
        for i in range(first, last):
            if i % width == 0:
                part = slice(i, min(i + width, last))
                scores_BM = (w[part] / u.diagonal()[part, None]).square()
                stays[part] = _choose(scores_BM, stays[part], quotas[i // width], pattern)
            error_M = (w[i] / u[i, i]).masked_fill(stays[i], 0)
            w[i:last] -= u[i, i:last, None] * error_M
            errors_BM[i - first] = error_M
        w[last:] -= u[first:last, last:].T @ errors_BM
    assert int((~stays).sum()) == num_pruned, "more or fewer weights than can be pruned"
    back = order.argsort()
    return w.masked_fill(~stays, 0)[back].T, stays[back].T


def _choose(
    scores_BM: Tensor, kept_BM: Tensor, quota: int, pattern: tuple[int, int] | None
) -> Tensor:
    """Returns which weights stay as the quota goes: what was pruned before, then lowest scores.

    Equal scores go by output, then input.
    """
    scores = scores_BM.masked_fill(~kept_BM, -1).T.contiguous()
    if pattern is not None:
        ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
        scores.masked_fill_(ranks >= pattern[1] - pattern[0], torch.inf)
    stays = torch.ones_like(scores, dtype=torch.bool)
    stays.view(-1)[scores.view(-1).argsort(stable=True)[:quota]] = False
    return stays.T


def _factor(system: Tensor, strength: Tensor, inputs: Tensor) -> Tensor | None:
    """Factors a system after damping it in place.

    Returns None where nothing ever comes in, so nothing is known.
    """
    system.diagonal().add_(strength)
    factor, fault = torch.linalg.cholesky_ex(system)
    if not int(fault):
        return factor
    if float(inputs.diagonal().max()) == 0:
        return None
    raise PruneError(
        "prune.reconstruct_damping: the kept inputs of a layer are linearly dependent; raise it"
    )
