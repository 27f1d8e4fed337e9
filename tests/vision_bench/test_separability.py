"""The closed forms against their definition: scipy quadrature, simulation, limits, and what is proved about them."""

import itertools

import numpy as np
import pytest
from densities import density, distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad
from scipy.stats import norm

from vision_bench.separability import (
    CRITERIA,
    TIES,
    criterion,
    crossing,
    integrated_moments,
    laws,
    moments,
    simulated_moments,
)

SPARSITY = st.floats(0, 0.99)
RATE = st.floats(0, 0.5)
SIGMA = st.floats(0, 3)
RULE = st.sampled_from(TIES)


def by_definition(sparsity, noise_rate, input_noise, ties):
    """Means, variances and priors by integrating over (x1, x2): {z: (means, variances)}, priors."""
    active = 1 - sparsity
    tie = 0 if ties == "drop" else sparsity**2
    total = 1 - sparsity**2 + tie
    found = {}
    for name, z in (("mono", lambda a, b: a), ("poly", lambda a, b: a - b)):
        sums = np.zeros((2, 3))  # class, power
        for power in range(3):
            above = dblquad(lambda b, a: z(a, b) ** power, 0, 1, 0, lambda a: a, epsabs=1e-14)[0]  # noqa: B023
            below = dblquad(lambda a, b: z(a, b) ** power, 0, 1, 0, lambda b: b, epsabs=1e-14)[0]  # noqa: B023
            first = quad(lambda a: z(a, 0.0) ** power, 0, 1, epsabs=1e-14)[0]  # noqa: B023
            second = quad(lambda b: z(0.0, b) ** power, 0, 1, epsabs=1e-14)[0]  # noqa: B023
            sums[1, power] = active**2 * above + sparsity * active * first
            sums[0, power] = active**2 * below + sparsity * active * second
        share = {"zero": 0.0, "one": 1.0, "coin": 0.5, "drop": 0.5}[ties]
        sums[:, 0] += np.array([1 - share, share]) * tie
        sums = ((1 - noise_rate) * sums + noise_rate * sums[::-1]) / total
        priors, means = sums[:, 0], sums[:, 1] / sums[:, 0]
        spread = input_noise**2 * (1 if name == "mono" else 2)
        found[name] = (means, sums[:, 2] / priors - means**2 + spread)
    return found, priors


@settings(max_examples=25, deadline=None)
@given(SPARSITY, RATE, SIGMA, RULE)
def test_moments_equal_the_integrals_of_the_definition(sparsity, noise_rate, input_noise, ties):
    closed = moments(sparsity, noise_rate, input_noise, ties)
    found, priors = by_definition(sparsity, noise_rate, input_noise, ties)
    for name, (means, variances) in found.items():
        np.testing.assert_allclose(getattr(closed, name).means, means, rtol=0, atol=1e-12)
        np.testing.assert_allclose(getattr(closed, name).variances, variances, rtol=0, atol=1e-12)
    np.testing.assert_allclose(closed.priors, priors, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(SPARSITY, RATE, SIGMA, RULE)
def test_gauss_quadrature_equals_the_closed_form(sparsity, noise_rate, input_noise, ties):
    for ours, theirs in zip(
        flat(moments(sparsity, noise_rate, input_noise, ties)),
        flat(integrated_moments(sparsity, noise_rate, input_noise, ties)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("noise_rate", "input_noise"), [(0, 0), (0.3, 0), (0, 0.4), (0.2, 0.3)])
def test_simulation_agrees_within_four_standard_errors(ties, noise_rate, input_noise):
    generator = np.random.default_rng(5)
    draws = [flat(simulated_moments(20_000, generator, 0.4, noise_rate, input_noise, ties)) for _ in range(50)]
    for values, exact in zip(np.swapaxes(draws, 0, 1), flat(moments(0.4, noise_rate, input_noise, ties)), strict=True):
        error = values.std(axis=0, ddof=1) / 50**0.5
        assert (np.abs(values.mean(axis=0) - exact) < 4 * error + 1e-12).all()


def flat(found):
    """The five arrays of Moments."""
    return [*found.mono, *found.poly, found.priors]


@pytest.mark.parametrize("arm", ["mono", "poly"])
@settings(max_examples=12, deadline=None)
@given(sparsity=SPARSITY, noise_rate=RATE, input_noise=st.one_of(st.just(0.0), st.floats(0.05, 2)), ties=RULE)
def test_density_distribution_and_moments_belong_to_one_law(arm, sparsity, noise_rate, input_noise, ties):
    law = getattr(laws(sparsity, noise_rate, input_noise, ties), arm)
    edges = [-1.0, 0.0, 1.0] if input_noise == 0 else [-1 - 15 * input_noise, -1.0, 0.0, 1.0, 1 + 15 * input_noise]
    atom = law.atom if input_noise == 0 else np.zeros(2)
    for y in (0, 1):
        for point in (-0.7, -0.1, 0.3, 0.9):
            pieces = [e for e in edges if e < point] + [point]
            mass = sum(
                quad(lambda z: density(law, z)[y], *ends, limit=200)[0]  # noqa: B023
                for ends in itertools.pairwise(pieces)
            )
            assert distribution(law, point)[y] == pytest.approx(mass + atom[y] * (point >= 0), abs=1e-8)
        for power, expected in ((0, 1), (1, law.means[y]), (2, law.variances[y] + law.means[y] ** 2)):
            value = sum(
                quad(lambda z: z**power * density(law, z)[y], *ends, limit=200)[0]  # noqa: B023
                for ends in itertools.pairwise(edges)
            )
            assert value + atom[y] * (power == 0) == pytest.approx(expected, abs=1e-8)


def test_input_noise_convolves_the_clean_law():
    clean, noisy = laws(0.6, 0.2, 0, "zero"), laws(0.6, 0.2, 0.3, "zero")
    for arm, sigma in (("mono", 0.3), ("poly", 0.3 * 2**0.5)):
        before, after = getattr(clean, arm), getattr(noisy, arm)
        for y, z in itertools.product((0, 1), (-0.5, 0.1, 1.2)):
            total = before.atom[y] * norm.pdf(z, scale=sigma)
            for ends in ((-1, 0), (0, 1)):
                total += quad(lambda t: density(before, t)[y] * norm.pdf(z - t, scale=sigma), *ends)[0]  # noqa: B023
            assert density(after, z)[y] == pytest.approx(total, abs=1e-12)


def test_lemma_b2_marginal_distribution_of_dense_samples():
    found = laws(0.0)
    v = np.linspace(-1.5, 1.5, 61)
    marginal = (found.priors[:, None] * distribution(found.poly, v)).sum(axis=0)
    inside = np.clip(v, -1, 1)
    np.testing.assert_allclose(marginal, np.where(v < 0, (1 + inside) ** 2 / 2, 1 - (1 - inside) ** 2 / 2), atol=1e-15)


def test_theorem_4_1_values_of_dense_samples():
    for ties in TIES:
        found = moments(0, ties=ties)
        np.testing.assert_allclose(found.mono.means, [1 / 3, 2 / 3], atol=1e-15)
        np.testing.assert_allclose(found.poly.means, [-1 / 3, 1 / 3], atol=1e-15)
        np.testing.assert_allclose([found.mono.variances, found.poly.variances], 1 / 18, atol=1e-15)
        assert criterion(found) == pytest.approx((1, 4))
        assert criterion(found, "absolute") == pytest.approx((3, 6))


@settings(max_examples=50, deadline=None)
@given(SPARSITY, st.floats(0, 0.499), st.sampled_from(("coin", "drop")))
def test_p1_label_noise_is_one_increasing_function_of_fishers_ratio(sparsity, rate, ties):
    clean, noisy = criterion(moments(sparsity, ties=ties)), criterion(moments(sparsity, rate, ties=ties))
    for before, after in zip(clean, noisy, strict=True):
        assert after == pytest.approx((1 - 2 * rate) ** 2 * before / (1 + 2 * rate * (1 - rate) * before), rel=1e-10)
    assert noisy.poly > noisy.mono


@settings(max_examples=50, deadline=None)
@given(SPARSITY, RATE, SIGMA, RULE)
def test_p2_the_weighted_criterion_is_a_function_of_the_correlation(sparsity, rate, sigma, ties):
    noisy, (p0, p1) = moments(sparsity, rate, sigma, ties), moments(sparsity, rate, sigma, ties).priors
    for z, value in zip(noisy[:2], criterion(noisy, "weighted"), strict=True):
        between = p0 * p1 * (z.means[1] - z.means[0]) ** 2
        correlation = between / (between + p0 * z.variances[0] + p1 * z.variances[1])
        assert value * p0 * p1 == pytest.approx(correlation / (1 - correlation), rel=1e-9, abs=1e-12)
        clean = moments(sparsity, 0, sigma, ties)
        c = clean.mono if z is noisy.mono else clean.poly
        covariance = clean.priors.prod() * (c.means[1] - c.means[0])
        assert p0 * p1 * (z.means[1] - z.means[0]) == pytest.approx((1 - 2 * rate) * covariance, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(SPARSITY, SIGMA, st.sampled_from(("coin", "drop")))
def test_p3_input_noise_changes_no_order_of_balanced_classes(sparsity, sigma, ties):
    found = moments(sparsity, 0, sigma, ties)
    distances = [z.means[1] - z.means[0] for z in found[:2]]
    assert distances[1] == pytest.approx(2 * distances[0], abs=1e-15)
    for kind in ("fisher", "absolute", "weighted"):
        scores = criterion(found, kind)
        assert scores.poly > scores.mono


@settings(max_examples=50, deadline=None)
@given(SPARSITY)
def test_p4_absolute_criteria_of_a_coin_meet_only_at_one_half(sparsity):
    found = moments(sparsity, ties="coin")
    u, v = found.mono.variances.sum(), found.poly.variances.sum()
    assert 2 * u - v == pytest.approx((found.mono.means[1] - found.mono.means[0]) ** 2, abs=1e-14)
    assert crossing(sparsity, "label", "absolute", "coin") is None


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 0.999))
def test_p5_absolute_crossing_without_ties(sparsity):
    expected = (1 - sparsity) / (2 * (1 + 2 * sparsity))
    assert crossing(sparsity, "label", "absolute", "drop") == pytest.approx(expected, rel=1e-7)


def test_p6_crossings_of_the_literal_label():
    S = 0.58
    rate = (9 * S**4 + 12 * S**3 + 2 * S**2 - 4 * S - 1) / (2 * S**4 * (1 + 2 * S) ** 2)
    assert crossing(S, "label", "fisher", "zero") == pytest.approx((1 - rate**0.5) / 2, rel=1e-12)
    sigma = (1 - S) * (1 + 3 * S) * (1 + 4 * S - S**2 - 8 * S**3 - 8 * S**4)
    sigma /= 12 * (1 + S**2) * (9 * S**4 + 12 * S**3 + 2 * S**2 - 4 * S - 1)
    assert crossing(S, "input", "fisher", "zero") == pytest.approx(sigma**0.5, rel=1e-12)
    assert crossing(0.194430, "label", "absolute", "zero") == pytest.approx(0.25, abs=1e-5)
    for edge, kind in ((0.534473559125, "fisher"), (0.620486867172, "fisher"), (0.445754531694, "absolute")):
        inside = {edge - 1e-9: crossing(edge - 1e-9, "label", kind, "zero") is not None}
        inside[edge + 1e-9] = crossing(edge + 1e-9, "label", kind, "zero") is not None
        assert sorted(inside.values()) == [False, True]


def test_difference_crossings_of_dense_samples():
    for ties in TIES:
        assert crossing(0, "label", "difference", ties) == pytest.approx(1 - 2**-0.5, rel=1e-12)
        assert crossing(0, "input", "difference", ties) == pytest.approx(6**-0.5, rel=1e-12)


@pytest.mark.parametrize(("ties", "kind"), list(itertools.product(TIES, CRITERIA)))
@pytest.mark.parametrize("noise", ["label", "input"])
def test_crossing_is_the_only_change_of_order_in_a_dense_scan(ties, kind, noise):
    levels = np.linspace(0, 0.4995, 800) if noise == "label" else np.geomspace(1e-3, 1e3, 800) - 1e-3
    for sparsity in (0, 0.03, 0.2, 0.44, 0.5, 0.56, 0.61, 0.63, 0.8, 0.97):
        setting = (levels, 0) if noise == "label" else (0, levels)
        scores = criterion(moments(sparsity, *setting, ties), kind)
        ahead = scores.mono > scores.poly * (1 + 1e-12 * np.sign(scores.poly))
        changes = np.flatnonzero(np.diff(ahead.astype(int)))
        level = crossing(sparsity, noise, kind, ties)
        if level is None:
            assert len(changes) == 0
        else:
            assert [levels[i] <= level <= levels[i + 1] for i in changes] == [True]


@given(SPARSITY, RULE)
@settings(max_examples=50, deadline=None)
def test_limits(sparsity, ties):
    clean = moments(sparsity, ties=ties)
    for near in (moments(sparsity, 1e-12, ties=ties), moments(sparsity, 0, 1e-7, ties)):
        for a, b in zip(flat(near), flat(clean), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
    half = moments(sparsity, 0.5, ties=ties)
    for z in half[:2]:  # a label without information
        assert z.means[0] == pytest.approx(z.means[1], abs=1e-14)
        assert z.variances[0] == pytest.approx(z.variances[1], abs=1e-14)
    swapped = moments(sparsity, 1, ties=ties)
    np.testing.assert_allclose(swapped.mono.means, clean.mono.means[::-1], atol=1e-14)
    for a, b in zip(flat(moments(1e-9, ties=ties)), flat(moments(0, ties="drop")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("ties", TIES)
def test_only_inactive_samples_give_finite_numbers_and_no_crossing(ties):
    with np.errstate(all="raise"):
        for noise_rate, sigma in ((0, 0), (0.2, 0), (1, 0), (0, 0.5)):
            found = moments(1, noise_rate, sigma, ties)
            assert all(np.isfinite(array).all() for array in flat(found))
            assert all(np.isfinite(value) for kind in CRITERIA for value in criterion(found, kind))
    assert all(crossing(1, noise, kind, ties) is None for noise in ("label", "input") for kind in CRITERIA)


def test_arrays_broadcast():
    sparsity, rate = np.array([0.0, 0.5, 0.9]), np.array([[0.0], [0.3]])
    found = moments(sparsity, rate, 0.1, "zero")
    assert found.mono.means.shape == found.priors.shape == (2, 2, 3)
    single = moments(0.9, 0.3, 0.1, "zero")
    np.testing.assert_array_equal(found.poly.variances[:, 1, 2], single.poly.variances)
    assert criterion(found, "weighted").mono.shape == (2, 3)
    law = laws(sparsity, 0.2, 0.1).poly
    points = np.linspace(-1, 1, 5)[:, None]
    assert density(law, points).shape == distribution(law, points).shape == (2, 5, 3)
    np.testing.assert_array_equal(density(law, points)[:, 3, 1], density(laws(0.5, 0.2, 0.1).poly, 0.5))
    assert found.mono.means.dtype == np.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.2}, "sparsity is 1.2; it must be in"),
        ({"sparsity": np.nan}, "sparsity is nan"),
        ({"sparsity": 0.5, "noise_rate": -0.1}, "noise_rate is -0.1"),
        ({"sparsity": 0.5, "input_noise": -1}, "input_noise is -1"),
        ({"sparsity": 0.5, "input_noise": np.inf}, "input_noise is inf"),
        ({"sparsity": 0.5, "ties": "both"}, "ties is 'both'; it must be one of 'zero', 'one', 'coin', 'drop'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        moments(**arguments)


def test_unknown_criterion_or_noise_is_named():
    with pytest.raises(ValueError, match="kind is 'lda'"):
        criterion(moments(0), "lda")
    with pytest.raises(ValueError, match="noise is 'both'"):
        crossing(0, "both")
    with pytest.raises(ValueError, match="left a class without samples"):
        simulated_moments(10, np.random.default_rng(0), 1.0, ties="zero")
