"""WUDI's least-squares problem in Gram form, solved by descent or in closed form.

    L(m) = sum_i ||(m - G_i) P_i^T||_F^2 / a_i,    grad L = 2 (m C - D),
    C = sum_i P_i^T P_i / a_i = X^T X,             D = sum_i G_i P_i^T P_i / a_i

WUDI takes G_i = P_i = delta_i. C is never formed where the stacked rows X are fewer than columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusekit.methods.matrix.linalg import eigen, gram, mean

NEGLIGIBLE = 1e-12
"""Task vectors whose squared norm lies below this carry no information."""

FLOOR = 1e-8
"""Smallest eigenvalue of C that the spectral filters see."""

Filter = Literal["exponential", "tikhonov", "landweber", "none"]
Init = Literal["sum", "mean", "zero"]


@dataclass(frozen=True)
class Quadratic:
    """The loss of one matrix: X (rows, n), D (m, n), and the constant that makes it a loss."""

    X: Tensor
    D: Tensor
    constant: float

    def hessian(self, m: Tensor) -> Tensor:
        """`m C`, by the cheaper order of products."""
        return (m @ self.X.T) @ self.X

    def gradient(self, m: Tensor) -> Tensor:
        """`2 (m C - D)`."""
        return 2.0 * (self.hessian(m) - self.D)

    def loss(self, m: Tensor) -> float:
        """`sum_i ||(m - G_i) P_i^T||^2 / a_i`, from `tr(m C m^T) - 2 tr(m D^T)` and a constant."""
        moved = (m @ self.X.T).square().sum() - 2.0 * (m * self.D).sum()
        return float(moved) + self.constant

    def formed(self) -> Gram:
        """The same loss with C formed, which costs less per product where X has more rows."""
        return Gram(self.X, self.D, self.constant, gram(self.X.T))

    def cheapest(self) -> Quadratic:
        """The form whose products with m cost least."""
        return self.formed() if 2 * self.X.shape[0] > self.X.shape[1] else self


@dataclass(frozen=True)
class Gram(Quadratic):
    """A `Quadratic` that holds C (n, n)."""

    C: Tensor

    def hessian(self, m: Tensor) -> Tensor:
        return m @ self.C


def problem(
    targets: Sequence[Tensor], projectors: Sequence[Tensor], norms: Sequence[float]
) -> Quadratic:
    """The quadratic of targets G_i (m, n), projectors P_i (k_i, n) and norms a_i > 0."""
    X = torch.cat([P / math.sqrt(a) for P, a in zip(projectors, norms, strict=True)])
    D = torch.zeros_like(targets[0])
    constant = 0.0
    for G, P, a in zip(targets, projectors, norms, strict=True):
        seen = G @ P.T
        D += (seen @ P) / a
        constant += float(seen.square().sum()) / a
    return Quadratic(X, D, constant)


def informative(deltas: Sequence[Tensor]) -> list[Tensor]:
    """The task vectors that are not zero, in float64."""
    wide = [delta.double() for delta in deltas]
    return [delta for delta in wide if float(delta.square().sum()) >= NEGLIGIBLE]


def task_norm(delta: Tensor, power: int = 2) -> float:
    """`||delta||_F^power`, the weight's denominator."""
    return float(torch.linalg.vector_norm(delta)) ** power


def wudi_problem(deltas: Sequence[Tensor], norm_power: int = 2) -> Quadratic:
    """WUDI's own quadratic: every task vector is its target and its projector."""
    return problem(deltas, deltas, [task_norm(delta, norm_power) for delta in deltas])


def starting_point(deltas: Sequence[Tensor], init: Init) -> Tensor:
    """m_0: the sum, the mean or nothing."""
    average = mean(deltas)
    return average * {"sum": float(len(deltas)), "mean": 1.0, "zero": 0.0}[init]


def adam(quadratic: Quadratic, start: Tensor, steps: int = 300, lr: float = 1e-5) -> Tensor:
    """Adam (0.9, 0.999, 1e-8) on the full gradient.

    Stops where the gradient is rounding noise, which Adam would otherwise blow up to full steps.
    """
    form = quadratic.cheapest()
    m, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    noise = 1e-12 * float(torch.linalg.vector_norm(form.D))
    for step in range(1, steps + 1):
        gradient = form.gradient(m)
        if float(torch.linalg.vector_norm(gradient)) <= noise:
            break
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = math.sqrt(1.0 - 0.999**step)
        m.addcdiv_(first, second.sqrt() / scale + 1e-8, value=-lr / (1.0 - 0.9**step))
    return m


def sgd(
    quadratic: Quadratic, start: Tensor, steps: int = 300, lr: float = 1e-4, momentum: float = 0.9
) -> Tensor:
    """Gradient descent with heavy-ball momentum: `v = momentum v + grad;  m -= lr v`."""
    form = quadratic.cheapest()
    m, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(steps):
        velocity.mul_(momentum).add_(form.gradient(m))
        m.sub_(velocity, alpha=lr)
    return m


@dataclass(frozen=True)
class Spectral:
    """A spectral solver: which share of each eigendirection of C is solved for.

    Attributes:
        filter: `exponential` 1 - exp(-l t), `tikhonov` l / (l + a), `landweber`
            1 - (1 - 0.9 l / l_max)^n, `none` 1.
        time: t of the exponential filter.
        strength: a of the Tikhonov filter.
        iterations: n of the Landweber filter.
        ratio: keep the filter on the floor(n ratio + 0.999) largest eigenvalues only.
        adaptive: how many to keep, read off the spectrum (see `adaptive_rank`); replaces ratio.
    """

    filter: Filter = "exponential"
    time: float = 300.0
    strength: float = 0.01
    iterations: int = 150
    ratio: float | None = None
    adaptive: str | None = None

    def shares(self, values: Tensor) -> Tensor:
        """The filter's value at each eigenvalue (clamped to the floor)."""
        if self.filter == "exponential":
            return -torch.expm1(-values * self.time)
        if self.filter == "tikhonov":
            return values / (values + self.strength)
        if self.filter == "landweber":
            base = (1.0 - 0.9 * values / values.max()).clamp(0.0, 1.0)
            return 1.0 - base**self.iterations
        return torch.ones_like(values)


def closed_form(quadratic: Quadratic, start: Tensor, spectral: Spectral) -> Tensor:
    """`m_0 - m_0 E diag(f) E^T + D E diag(f / l) E^T` for `C = E diag(l) E^T`.

    f = 1 gives the minimiser `D C^+`, f = 0 the start. Eigenvalues are clamped to 1e-8. Directions
    in which C vanishes need no eigenvectors: the task vectors, hence m_0 and D, have no part there.

    References:
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
        Vectors", arXiv 2503.08099.
    """
    X = quadratic.X
    rows, columns = X.shape
    if rows < columns:
        values, Y = eigen(gram(X))
        sound = values > values[-1] * 1e-13
        values, Y = values[sound], Y[:, sound]
        E = (X.T @ Y) / values.sqrt()
    else:
        values, E = eigen(gram(X.T))
    values, E = values.flip(0).clamp(min=FLOOR), E.flip(1)
    f = spectral.shares(values)
    f[_kept(spectral, values, quadratic.D.shape) :] = 0.0
    change = (quadratic.D @ E) * (f / values) - (start @ E) * f
    solution: Tensor = start + change @ E.T
    return solution


def _kept(spectral: Spectral, values: Tensor, shape: Sequence[int]) -> int:
    columns = shape[1]
    if spectral.adaptive is not None:
        missing = columns - len(values)
        full = torch.cat([values, values.new_full((missing,), FLOOR)])
        return adaptive_rank(full, spectral.adaptive, shape)
    if spectral.ratio is None:
        return columns
    return max(1, math.floor(columns * spectral.ratio + 0.999))


ADAPTIVE = (
    "participation_sqrt",
    "participation",
    "entropy",
    "stable_rank",
    "gavish_donoho",
)
"""Rank rules by name, besides `cumvar_x` with x a share such as 0.95."""


def adaptive_rank(values: Tensor, rule: str, shape: Sequence[int]) -> int:
    """How many of the descending eigenvalues of C count, without any parameter to tune.

    Args:
        values: all n eigenvalues, clamped to the floor.
        rule: one of `ADAPTIVE`, or `cumvar_<share>`.
        shape: (m, n) of the matrix that is merged.

    Raises:
        ValueError: another rule.
    """
    mass = values.sum()
    if rule == "participation_sqrt":
        rank = math.ceil(float(values.sqrt().sum() ** 2 / mass))
    elif rule == "participation":
        rank = math.ceil(float(mass**2 / values.square().sum()))
    elif rule == "entropy":
        parts = values / mass
        rank = math.ceil(math.exp(float(-(parts * parts.log()).sum())))
    elif rule == "stable_rank":
        rank = math.ceil(float(values.square().sum() / values.max() ** 2))
    elif rule == "gavish_donoho":
        rank = int((values.sqrt() > _gavish_donoho(shape) * values.sqrt().median()).sum())
    elif rule.startswith("cumvar_"):
        share = float(rule.removeprefix("cumvar_"))
        reached = values.cumsum(0) / mass >= share
        rank = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)
    else:
        raise ValueError(f"{', '.join(ADAPTIVE)} or cumvar_<share>")
    return min(max(rank, 1), len(values))


def _gavish_donoho(shape: Sequence[int]) -> float:
    """The hard threshold in units of the median singular value, for an unknown noise level."""
    beta = min(shape) / max(shape)
    shift = 8.0 * beta / ((beta + 1.0) + math.sqrt(beta**2 + 14.0 * beta + 1.0))
    coefficient = math.sqrt(2.0 * (beta + 1.0) + shift)
    if beta < 0.9999:
        median = math.sqrt(max((1.0 - beta) ** 2 + beta, 1e-3))
    else:
        median = math.sqrt(2.0 + math.sqrt(3.0))
    return coefficient / max(median, 1e-3)


def wudi_adam(
    deltas: Sequence[Tensor],
    *,
    steps: int = 300,
    lr: float = 1e-5,
    norm_power: int = 2,
    init: Init = "sum",
) -> Tensor:
    """WUDI-Merging as published: Adam from the sum of the task vectors.

    Args:
        deltas: task vectors (m, n); zero ones are left out.
        steps, lr: their product bounds how far an entry can move.
        norm_power: 2 weights tasks by 1 / ||delta||^2, 1 by 1 / ||delta||.
        init: the starting point.

    References:
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
        Vectors", arXiv 2503.08099.
    """
    used = informative(deltas)
    if not used:
        return mean(deltas).to(deltas[0].dtype)
    merged = adam(wudi_problem(used, norm_power), starting_point(deltas, init), steps, lr)
    return merged.to(deltas[0].dtype)


def wudi_closed(
    deltas: Sequence[Tensor],
    spectral: Spectral,
    *,
    norm_power: int = 2,
    init: Init = "sum",
) -> Tensor:
    """The closed-form members of WUDI's family (filters, truncation, adaptive rank)."""
    used = informative(deltas)
    if not used:
        return mean(deltas).to(deltas[0].dtype)
    start = starting_point(deltas, init)
    return closed_form(wudi_problem(used, norm_power), start, spectral).to(deltas[0].dtype)
