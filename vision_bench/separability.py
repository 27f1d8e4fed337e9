"""Closed forms of section 4.3 and appendix B: how well one mono- or polysemantic feature separates two classes.

Two concepts x1, x2 are independent, each 0 with probability S (the sparsity) and otherwise uniform on (0, 1). The
label is y = 1[x1 > x2]. The monosemantic representation is u = x1, the polysemantic one the antipodal pair
v = x1 - x2. Samples with x1 = x2 (both 0, probability S^2) belong to no class until a tie rule says so:

    zero    they get label 0, as y = 1[x1 > x2] says        one     they get label 1, as an argmax over (x1, x2) does
    coin    they get a fair coin's label                    drop    they are dropped

With p = (1 - S^2) / 2 = P(x1 > x2) = P(x1 < x2), class j has the prior p_j and the share a_j of samples without a tie:

    zero    p_1 = p, p_0 = p + S^2, a_1 = 1, a_0 = p / p_0      coin    p_j = 1/2, a_j = 1 - S^2
    one     p_0 = p, p_1 = p + S^2, a_0 = 1, a_1 = p / p_1      drop    p_j = 1/2, a_j = 1

The printed formulas of the paper were not at hand; these are derived from its definitions. docs/theory.md says which
of its claims hold. Everything is float64 and broadcasts over arrays; results have the class (0, 1) as first axis.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from vision_bench.checks import check_name

Array = NDArray[np.float64]

TIES = ("zero", "one", "coin", "drop")
CRITERIA = ("fisher", "absolute", "weighted", "difference")
NOISES = ("label", "input")


class Law(NamedTuple):
    """The law of a representation z given the label: an atom at 0, a linear density on each side of it, normal noise.

    Without noise z is 0 with probability `atom`, has the density `right_level + right_slope * z` on (0, 1) and
    `left_level + left_slope * |z|` on (-1, 0). N(0, `scale`^2) is added to it. All fields but `scale` have shape
    (2, ...), class first.
    """

    atom: Array
    right_level: Array
    right_slope: Array
    left_level: Array
    left_slope: Array
    scale: Array

    @property
    def means(self) -> Array:
        """E[z | y], shape (2, ...) (Theorems B.1, B.3, B.5, B.7)."""
        right = self.right_level / 2 + self.right_slope / 3
        return right - (self.left_level / 2 + self.left_slope / 3)

    @property
    def variances(self) -> Array:
        """Var[z | y], shape (2, ...) (Theorems B.1, B.3, B.6, B.8)."""
        right = self.right_level / 3 + self.right_slope / 4
        second = right + self.left_level / 3 + self.left_slope / 4
        return second - self.means**2 + self.scale**2


class Laws(NamedTuple):
    """Laws of both representations given the (noisy) label, and the shares of the two labels."""

    mono: Law
    poly: Law
    priors: Array  # shape (2, ...)


class ClassMoments(NamedTuple):
    """Conditional moments of one representation, each of shape (2, ...) with the class first."""

    means: Array
    variances: Array


class Moments(NamedTuple):
    """Conditional moments of both representations, and the shares of the two labels, shape (2, ...)."""

    mono: ClassMoments
    poly: ClassMoments
    priors: Array


class Separability(NamedTuple):
    """A criterion of both representations, larger is better separated."""

    mono: Array
    poly: Array


def laws(sparsity: ArrayLike, noise_rate: ArrayLike = 0, input_noise: ArrayLike = 0, ties: str = "coin") -> Laws:
    """The laws of u = x1 and v = x1 - x2 given the label.

    Clean (Theorem B.1, Lemma B.2, Theorem B.3), with the rest of each class an atom at 0:

        f(u | 1) = a_1 2 [S + (1 - S) u] / (1 + S)      f(u | 0) = a_0 2 (1 - S) (1 - u) / (1 + S)       0 < u < 1
        f(v | 1) = a_1 2 [1 - (1 - S) v] / (1 + S)      f(v | 0) = a_0 2 [1 - (1 - S) |v|] / (1 + S)     0 < +-v < 1

    A label is flipped with probability eta: f(z | y~ = j) = sum_c P(y = c | y~ = j) f(z | c), which is
    (1 - eta) f(z | j) + eta f(z | 1 - j) for balanced classes (Lemma B.4). Input noise adds independent N(0, sigma^2)
    to x1 and x2 after the label is fixed: N(0, sigma^2) to u, N(0, 2 sigma^2) to v (section B.3).

    Args:
        sparsity: S in [0, 1]. At S = 1 a class may be empty; its law is then the limit S -> 1.
        noise_rate: eta in [0, 1], probability that a label is the other one.
        input_noise: sigma >= 0, standard deviation of the noise on each of x1, x2.
        ties: "zero", "one", "coin" or "drop", see above.

    Raises:
        ValueError: an argument is out of its range.
    """
    sparsity, noise_rate, sigma = np.broadcast_arrays(
        _in_range("sparsity", sparsity, 1),
        _in_range("noise_rate", noise_rate, 1),
        _in_range("input_noise", input_noise),
    )
    priors, untied = _classes(sparsity, ties)
    active, zero = 1 - sparsity, np.zeros_like(sparsity)
    height = 2 * untied / (1 + sparsity)
    left, right = height
    # Coefficients of `Law` in its order, shape (5, 2, ...).
    mono = np.array(
        [
            [1 - untied[0] + left * sparsity, 1 - untied[1]],
            [left * active, right * sparsity],
            [-left * active, right * active],
            [zero, zero],
            [zero, zero],
        ]
    )
    poly = np.array([1 - untied, [zero, right], [zero, -right * active], [left, zero], [-left * active, zero]])

    stay = np.eye(2).reshape(2, 2, *[1] * sparsity.ndim)
    joint = np.where(stay > 0, 1 - noise_rate, noise_rate) * priors  # [j, c] = P(noisy label j, label c)
    noisy_priors = joint.sum(axis=1)
    posterior = np.broadcast_to(stay, joint.shape).copy()
    np.divide(joint, noisy_priors[:, None], out=posterior, where=noisy_priors[:, None] > 0)
    mono, poly = (np.einsum("jc...,kc...->kj...", posterior, law) for law in (mono, poly))
    return Laws(Law._make([*mono, sigma]), Law._make([*poly, np.sqrt(2) * sigma]), noisy_priors)


def moments(sparsity: ArrayLike, noise_rate: ArrayLike = 0, input_noise: ArrayLike = 0, ties: str = "coin") -> Moments:
    """Conditional means and variances of u = x1 (mono) and v = x1 - x2 (poly), indexed by the (noisy) label.

    Clean (Theorems B.1, B.3), for every tie rule, Var[z | y] = E[z^2 | y] - E[z | y]^2:

        E[u | 1] = a_1 (2 + S) / (3 (1 + S))         E[u^2 | 1] = a_1 (3 + S) / (6 (1 + S))
        E[u | 0] = a_0 (1 - S) / (3 (1 + S))         E[u^2 | 0] = a_0 (1 - S) / (6 (1 + S))
        E[v | 1] = a_1 (1 + 2 S) / (3 (1 + S))       E[v^2 | 1] = a_1 (1 + 3 S) / (6 (1 + S))
        E[v | 0] = -a_0 (1 + 2 S) / (3 (1 + S))      E[v^2 | 0] = a_0 (1 + 3 S) / (6 (1 + S))

    Label noise, with w_jc = P(y = c | y~ = j), for balanced classes 1 - eta and eta (Theorems B.5, B.6):

        mu~_j = sum_c w_jc mu_c        var~_j = sum_c w_jc var_c + w_j0 w_j1 (mu_1 - mu_0)^2

    Input noise leaves the means (Theorem B.7) and adds sigma^2 to Var[u | y], 2 sigma^2 to Var[v | y] (Theorem B.8).
    Arguments and errors are those of `laws`.

    Example:
        >>> noisy = moments(sparsity=0.5, noise_rate=0.3)
        >>> criterion(noisy).mono, criterion(noisy).poly  # Fisher's ratio of both
    """
    mono, poly, priors = laws(sparsity, noise_rate, input_noise, ties)
    return Moments(ClassMoments(mono.means, mono.variances), ClassMoments(poly.means, poly.variances), priors)


def criterion(moments: Moments, kind: str = "fisher") -> Separability:
    """Linear separability of both representations (J of Theorems 4.1, 4.2 and B.9).

    With D = mu_1 - mu_0, V = var_1 + var_0 and the label shares p_j:

        fisher      D^2 / V, Fisher's ratio         weighted    D^2 / (p_1 var_1 + p_0 var_0), as in textbook LDA
        absolute    |D| / V                         difference  |D| - V

    A ratio is 0 where V is 0, which takes S = 1. Only fisher and weighted do not change when z is scaled.

    Raises:
        ValueError: `kind` is none of these.
    """
    check_name("kind", kind, CRITERIA)
    return Separability(*(_criterion(z, moments.priors, kind) for z in (moments.mono, moments.poly)))


def crossing(sparsity: float, noise: str = "label", kind: str = "fisher", ties: str = "coin") -> float | None:
    """Noise level at which the monosemantic representation overtakes the polysemantic one (Theorems 4.2 and B.9).

    That is eta in (0, 1/2), or sigma > 0, below which poly has the larger criterion and above which mono has. None
    where there is no such level: poly stays ahead, or mono is not behind without noise either. With
    K = (1 - 2 eta)^2, d = p_0 - p_1 and everything else of the clean moments:

        weighted    never: it is a function of the correlation of z and y, which label noise multiplies by the same
                    factor for u and v; and Var v = 2 Var u (D_v = 2 D_u for drop), so that sigma changes no order
        fisher      coin, drop: never, J~ grows with J. Else eta solves s r_1 + (2 - s) r_0 = 0, linear in
                    s = (1 - d) (1 + d K) / (1 - d^2 K), with r_j = var_j(u) / D_u^2 - var_j(v) / D_v^2
        absolute    coin: eta = 1/2 only, where both are 0. drop: eta = (1 - S) / (2 (1 + 2 S)). Else a quadratic in K
        difference  coin, drop: a quadratic in 1 - 2 eta. Else a bracketed root
        input noise always linear in sigma^2, for absolute with coin or drop without a solution as D_v = 2 D_u

    Args:
        sparsity: S in [0, 1]; None at 1, where no sample is active.
        noise: "label" or "input".
        kind: a criterion, see `criterion`.
        ties: a tie rule, see above.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_name("noise", noise, NOISES)
    clean = moments(float(sparsity), ties=ties)
    scores = criterion(clean, kind)
    # The order of two numbers that are equal in theory is rounding, hence the proofs come before the arithmetic.
    balanced = clean.priors[0] == clean.priors[1]
    if kind == "weighted" or sparsity == 1 or scores.poly <= scores.mono or (kind == "fisher" and balanced):
        return None
    if noise == "input":
        return None if kind == "absolute" and balanced else _input_crossing(clean, kind)
    if kind == "absolute" and balanced and (ties == "coin" or sparsity == 0):
        return None
    if kind == "difference" and not balanced:
        return _bracketed_crossing(float(sparsity), kind, ties)
    return _label_crossing(clean, kind)


def integrated_moments(sparsity: float, noise_rate: float = 0, input_noise: float = 0, ties: str = "coin") -> Moments:
    """The moments by Gauss quadrature of their definition over (x1, x2) and the noise, for checking `moments`.

    The integrands are polynomials of degree 2, for which the rules are exact. Scalars only, S < 1; else as `moments`.
    """
    priors = laws(sparsity, noise_rate, input_noise, ties).priors
    node, weight = np.polynomial.legendre.leggauss(3)
    node, weight = (node + 1) / 2, weight / 2
    large, share = (grid.ravel() for grid in np.meshgrid(node, node))
    small, area = large * share, large * np.outer(weight, weight).ravel()  # the triangle small < large
    active = 1 - sparsity
    none, off = np.zeros(1), np.zeros_like(node)
    x1 = np.concatenate([none, node, off, large, small])
    x2 = np.concatenate([none, off, node, small, large])
    single, both = sparsity * active * weight, active**2 * area
    mass = np.concatenate([np.full(1, sparsity**2), single, single, both, both])

    tie_label = {"zero": 0.0, "one": 1.0, "coin": 0.5, "drop": 0.5}[ties]
    label = np.where(x1 == x2, tie_label, x1 > x2)
    if ties == "drop":
        mass[0] = 0
    noisy_label = (1 - noise_rate) * label + noise_rate * (1 - label)
    mass = mass / mass.sum() * np.stack([1 - noisy_label, noisy_label])  # (2, nodes)
    hermite, hermite_weight = np.polynomial.hermite_e.hermegauss(3)
    hermite_weight = hermite_weight / hermite_weight.sum()

    def conditional(z: Array, scale: float) -> ClassMoments:
        noisy = z[:, None] + scale * hermite
        first, second = ((mass @ (noisy**power) @ hermite_weight) / priors for power in (1, 2))
        return ClassMoments(first, second - first**2)

    return Moments(conditional(x1, input_noise), conditional(x1 - x2, np.sqrt(2) * input_noise), mass.sum(axis=1))


def simulated_moments(
    draws: int,
    generator: np.random.Generator,
    sparsity: float,
    noise_rate: float = 0,
    input_noise: float = 0,
    ties: str = "coin",
) -> Moments:
    """The moments of `draws` samples drawn by the definition, for checking `moments`.

    Scalars only, otherwise as `moments`; "drop" leaves fewer samples than drawn.

    Raises:
        ValueError: an argument is out of its range, or a class got no sample.
    """
    laws(sparsity, noise_rate, input_noise, ties)
    x = generator.random((2, draws)) * (generator.random((2, draws)) >= sparsity)
    label, tied = x[0] > x[1], x[0] == x[1]
    if ties == "one":
        label |= tied
    elif ties == "coin":
        label = np.where(tied, generator.random(draws) < 0.5, label)
    elif ties == "drop":
        x, label = x[:, ~tied], label[~tied]
    label = label ^ (generator.random(label.size) < noise_rate)
    if input_noise > 0:
        x = x + input_noise * generator.standard_normal(x.shape)
    if label.all() or not label.any():
        raise ValueError(f"{draws} draws left a class without samples; raise draws or lower sparsity ({sparsity}).")

    def conditional(z: Array) -> ClassMoments:
        classes = z[~label], z[label]
        return ClassMoments(np.array([c.mean() for c in classes]), np.array([c.var() for c in classes]))

    return Moments(conditional(x[0]), conditional(x[0] - x[1]), np.array([1 - label.mean(), label.mean()]))


def _classes(sparsity: Array, ties: str) -> tuple[Array, Array]:
    """Priors of the classes and their shares of samples without a tie, each of shape (2, ...)."""
    check_name("ties", ties, TIES)
    tie = sparsity**2
    strict = (1 - tie) / 2
    half, certain = np.full_like(tie, 0.5), np.ones_like(tie)
    if ties == "coin":
        return np.stack([half, half]), np.stack([1 - tie, 1 - tie])
    if ties == "drop":
        return np.stack([half, half]), np.stack([certain, certain])
    priors, untied = [strict + tie, strict], [strict / (strict + tie), certain]
    return (np.stack(priors), np.stack(untied)) if ties == "zero" else (np.stack(priors[::-1]), np.stack(untied[::-1]))


def _criterion(z: ClassMoments, priors: Array, kind: str) -> Array:
    distance = np.abs(z.means[1] - z.means[0])
    scatter = (priors * z.variances).sum(axis=0) if kind == "weighted" else z.variances.sum(axis=0)
    if kind == "difference":
        return distance - scatter
    ratio = distance if kind == "absolute" else distance**2
    return np.divide(ratio, scatter, out=np.zeros_like(ratio), where=scatter > 0)


def _label_crossing(clean: Moments, kind: str) -> float | None:
    """eta by closed form, where poly is ahead without noise (`crossing` excludes the other cases)."""
    (u_means, u), (v_means, v), (p0, p1) = clean
    u_distance, v_distance, d = u_means[1] - u_means[0], v_means[1] - v_means[0], p0 - p1
    if kind == "fisher":
        r0, r1 = u / u_distance**2 - v / v_distance**2
        # s goes monotonically from 1 at eta = 0, where poly leads as r_1 + r_0 > 0, to 2 p_1 at eta = 1/2.
        if p1 * r1 + p0 * r0 >= 0:
            return None
        s = 2 * r0 / (r0 - r1)
        level = (s - 1 + d) / (d * (1 - d + s * d))
    elif kind == "absolute":
        # Both sides of V~_u / D~_u = V~_v / D~_v times M^2, as polynomials in K; s = N / M.
        q0, q1 = u / u_distance - v / v_distance
        N, M = np.polynomial.Polynomial([1 - d, d - d**2]), np.polynomial.Polynomial([1, -(d**2)])
        spread = N * M - N * N + np.polynomial.Polynomial([0.5, -0.5]) * (1 - d) ** 2 * M
        gap = N * M * (q1 - q0) + 2 * q0 * M * M + spread * (u_distance - v_distance)
        level = _root(*gap.coef)
    else:
        squares = (v_distance**2 - u_distance**2) / 2
        level = _root(u.sum() - v.sum() - squares, v_distance - u_distance, squares) ** 2
    return float((1 - np.sqrt(level)) / 2) if 0 < level < 1 else None


def _root(constant: float, linear: float, quadratic: float = 0.0) -> float:
    """The root in (0, 1) of a quadratic that is positive at 1, or a number <= 0 if it is not negative at 0."""
    if constant >= 0:
        return 0.0
    return -2 * constant / (linear + np.sqrt(linear**2 - 4 * quadratic * constant))


def _bracketed_crossing(sparsity: float, kind: str, ties: str) -> float | None:
    def lead(noise_rate: float) -> float:
        scores = criterion(moments(sparsity, noise_rate, ties=ties), kind)
        return float(scores.mono - scores.poly)

    return float(brentq(lead, 0, 0.5, xtol=1e-15)) if lead(0) < 0 < lead(0.5) else None


def _input_crossing(clean: Moments, kind: str) -> float | None:
    """sigma by closed form: the lead of poly is lead - slope * sigma^2 up to a positive factor."""
    u, v = clean.mono.variances.sum(), clean.poly.variances.sum()
    u_distance, v_distance = clean.mono.means[1] - clean.mono.means[0], clean.poly.means[1] - clean.poly.means[0]
    if kind == "difference":
        lead, slope = (v_distance - v) - (u_distance - u), 2.0
    else:
        power = 2 if kind == "fisher" else 1
        lead = v_distance**power * u - u_distance**power * v
        slope = 4 * u_distance**power - 2 * v_distance**power
    return float(np.sqrt(lead / slope)) if lead > 0 and slope > 0 else None


def _in_range(name: str, value: ArrayLike, high: float = np.inf) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not np.all((array >= 0) & (array <= high) & np.isfinite(array)):
        wrong = array[~((array >= 0) & (array <= high) & np.isfinite(array))].flat[0]
        raise ValueError(
            f"{name} is {wrong}; it must be in [0, {high:g}]" + (" and finite." if high == np.inf else ".")
        )
    return array
