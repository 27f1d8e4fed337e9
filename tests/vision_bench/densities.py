"""Density and distribution function of the laws of `vision_bench.separability`, for tests that integrate them."""

import numpy as np
from scipy.special import ndtr

from vision_bench.separability import Law


def density(law, z):
    """Density at `z` given the label, without noise that of the part beside the atom.

    `z` of shape (...) broadcasts against the arguments of `laws`; the result has shape (2, ...).
    """
    points, law = _aligned(law, z)
    clean = np.where((points > 0) & (points < 1), law.right_level + law.right_slope * points, 0.0)
    clean = clean + np.where((points < 0) & (points > -1), law.left_level - law.left_slope * points, 0.0)
    scale = _positive(law.scale)
    noisy = law.atom * _normal_density(points / scale) / scale
    noisy = noisy + _convolved(points, scale, law.right_level, law.right_slope)
    noisy = noisy + _convolved(-points, scale, law.left_level, law.left_slope)
    return np.where(law.scale > 0, noisy, clean)


def distribution(law, z):
    """P(Z <= z) given the label (Lemma B.2), shapes as for `density`."""
    points, law = _aligned(law, z)
    right, left = np.clip(points, 0, 1), np.clip(-points, 0, 1)
    left_mass = law.left_level + law.left_slope / 2
    clean = law.right_level * right + law.right_slope * right**2 / 2 + law.atom * (points >= 0)
    clean = clean + left_mass - law.left_level * left - law.left_slope * left**2 / 2
    scale = _positive(law.scale)
    noisy = law.atom * ndtr(points / scale) + left_mass
    noisy = noisy + _convolved_below(points, scale, law.right_level, law.right_slope)
    noisy = noisy - _convolved_below(-points, scale, law.left_level, law.left_slope)
    return np.where(law.scale > 0, noisy, clean)


def _aligned(law, z):
    """The points, and the law with axes after the first so that both broadcast from the right."""
    points = np.asarray(z, dtype=np.float64)
    missing = [1] * max(0, points.ndim - law.scale.ndim)
    fields = (field.reshape(2, *missing, *law.scale.shape) for field in law[:-1])
    return points, Law._make([*fields, law.scale])


def _normal_density(z):
    return np.exp(-(np.minimum(np.abs(z), 40) ** 2) / 2) / np.sqrt(2 * np.pi)  # exp(-800) is 0 already


def _convolved(z, scale, level, slope):
    """Density at z of t + N(0, scale^2), where t has the density level + slope * t on (0, 1)."""
    above, below = z / scale, (z - 1) / scale
    inside = ndtr(above) - ndtr(below)
    edges = _normal_density(above) - _normal_density(below)
    return (level + slope * z) * inside + slope * scale * edges


def _convolved_below(z, scale, level, slope):
    """P(t + N(0, scale^2) <= z), where t has the density level + slope * t on (0, 1)."""

    def integrals(end):
        """Antiderivatives of Phi(w) and w Phi(w) at w = end / scale, times scale and scale^2."""
        phi, density = ndtr(end / scale), scale * _normal_density(end / scale)
        return end * phi + density, ((end**2 - scale**2) * phi + end * density) / 2

    (upper, upper_first), (lower, lower_first) = integrals(z), integrals(z - 1)
    return (level + slope * z) * (upper - lower) - slope * (upper_first - lower_first)


def _positive(values):
    """The values, with 1 in the place of 0, to divide by where the quotient is not used."""
    return np.where(values > 0, values, 1.0)
