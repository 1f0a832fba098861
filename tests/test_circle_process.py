"""The process against its definition, written out step by step."""

import numpy as np
import pytest

import circle_process
import cli

CONFIG = {"n_steps": 700, "n_circles": 5, "ambient_dim": 7, "subspace_dim": 4, "radius_mean": 11.0, "radius_std": 3.0,
          "noise_std": 0.7, "dwell_mean": 33.0, "dwell_std": 17.0, "min_period": 3, "max_period": 29, "drift": False,
          "drift_rate": 0.4, "center_walk_std": 0.0, "seed": 12}


def circle_point(process, circle, theta):
    v1, v2 = process.planes[circle]
    return process.radii[circle] * (np.cos(theta) * v1 + np.sin(theta) * v2)


def drawn_step_by_step(config, n_steps, process_seed, series_seed):
    """A process and a series of it as the definition says, one circle, visit and step after the other."""
    rng = np.random.default_rng(process_seed).spawn(5)[0]
    K, D, S = config["n_circles"], config["ambient_dim"], config["subspace_dim"]
    mean = config["radius_mean"]
    radii = np.array([min(max(r, mean / 2), 1.5 * mean) for r in rng.normal(mean, config["radius_std"], K)])
    basis = np.linalg.qr(rng.standard_normal((D, S)))[0].T
    pairs = [np.linalg.qr(pair)[0].T for pair in rng.standard_normal((K, S, 2))]
    planes = np.stack([pair @ basis for pair in pairs])
    entry = rng.uniform(0, 2 * np.pi, K)
    step = (config["max_period"] - config["min_period"]) / (K - 1)
    periods = np.array([round(config["min_period"] + i * step) for i in range(K)])
    P = circle_process.draw_transition_matrix(K, rng)

    _, visit_rng, noise_rng, tilt_rng, walk_rng = np.random.default_rng(series_seed).spawn(5)
    n = circle_process.VISITS_PER_ROUND
    uniform, dwell = visit_rng.random(n), visit_rng.normal(config["dwell_mean"], config["dwell_std"], n)
    circle = int(uniform[0] * K)
    visits, covered = [], 0
    for v in range(n):
        if v > 0:
            circle = int(np.flatnonzero(np.cumsum(P[circle]) > uniform[v])[0])
        length = max(1, round(dwell[v] / periods[circle])) * periods[circle]
        visits.append((circle, length))
        covered += length
        if covered >= n_steps:
            break
    tilts = tilt_rng.standard_normal((len(visits), S)) @ basis
    noise = config["noise_std"] * noise_rng.standard_normal((n_steps, D), dtype=np.float32)
    moves = config["center_walk_std"] * walk_rng.standard_normal((n_steps, D))
    X, states, thetas, center = [], [], [], np.zeros(D)
    for (circle, length), tilt in zip(visits, tilts, strict=True):
        v1, v2 = planes[circle]
        axis = tilt - (tilt @ v1) * v1 - (tilt @ v2) * v2
        axis /= np.linalg.norm(axis)
        for j in range(length):
            if len(X) == n_steps:
                break
            theta = (entry[circle] + 2 * np.pi * j / periods[circle]) % (2 * np.pi)
            alpha = config["drift_rate"] * j / (length - 1) if config["drift"] and circle % 2 == 0 else 0
            tilted = np.cos(alpha) * v2 + np.sin(alpha) * axis
            point = radii[circle] * (np.cos(theta) * v1 + np.sin(theta) * tilted)
            X.append(point + center + noise[len(X)])
            states.append(circle)
            thetas.append(theta)
            center = center + moves[len(X) - 1]
    process = {"radii": radii, "entry_angles": entry, "periods": periods, "planes": planes, "basis": basis,
               "transition_matrix": P, "noise_std": config["noise_std"]}
    return process, np.array(X), np.array(states), np.array(thetas)


@pytest.mark.parametrize("change", [
    {}, {"drift": True}, {"center_walk_std": 0.3}, {"drift": True, "center_walk_std": 0.2, "drift_rate": 1.1},
    {"n_circles": 2, "subspace_dim": 7}, {"seed": 3, "noise_std": 0.0}, {"dwell_std": 0.0, "radius_std": 0.0},
])
def test_a_series_is_the_definition_step_by_step(change):
    config = CONFIG | change
    expected, X, states, thetas = drawn_step_by_step(config, 700, config["seed"], config["seed"])
    process = circle_process.draw_process(config)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(process, name), value, rtol=1e-12, atol=1e-14, err_msg=name)
    drawn = circle_process.draw_series(process, config, 700, config["seed"], block_values=7 * 33)
    assert drawn[0].dtype == np.float32 and drawn[1].dtype == np.int64 and drawn[2].dtype == np.float64
    np.testing.assert_allclose(drawn[0], X, atol=2e-5)
    np.testing.assert_array_equal(drawn[1], states)
    np.testing.assert_allclose(np.exp(1j * drawn[2]), np.exp(1j * thetas), atol=1e-12)


@pytest.mark.parametrize("K", [2, 3, 4, 5, 8])
def test_shortcuts_of_the_chain_are_half_as_likely_as_neighbours_on_average(K):
    rng, found = np.random.default_rng(6), circle_process.draw_transition_matrix(K, np.random.default_rng(6))
    n_shortcuts = {2: 0, 3: 0, 4: 1, 5: 1}.get(K, 2)
    for i in range(K):
        row = np.zeros(K)
        for neighbour, weight in zip(((i - 1) % K, (i + 1) % K), 0.5 + rng.random(2), strict=True):
            row[neighbour] = weight
        if n_shortcuts:
            others = [(i + 2 + j) % K for j in range(K - 3)]
            for far, weight in zip(rng.choice(K - 3, n_shortcuts, replace=False), 0.25 + rng.random(n_shortcuts) / 2,
                                   strict=True):
                row[others[far]] = weight
        np.testing.assert_allclose(found[i], row / row.sum(), rtol=1e-12)


@pytest.mark.parametrize("drift", [False, True])
def test_another_seed_draws_a_fresh_series_of_the_same_process(drift):
    """Also from a process that was read from a file, which doesn't say in which subspace the circles lie."""
    config = CONFIG | {"drift": drift}
    process = circle_process.draw_process(config)
    loaded = circle_process.Process(**{name: getattr(process, name) for name in (
        "radii", "entry_angles", "periods", "planes", "transition_matrix", "noise_std")})
    _, X, states, _ = drawn_step_by_step(config, 500, config["seed"], 99)
    fresh = circle_process.draw_series(loaded, config, 500, 99)
    np.testing.assert_array_equal(fresh[1], states)
    still = states % 2 == 1 if drift else slice(None)
    np.testing.assert_allclose(fresh[0][still], X[still], atol=2e-5)
    np.testing.assert_allclose(fresh[0], circle_process.draw_series(loaded, config, 500, 99)[0])
    first = circle_process.draw_series(process, config, 500, config["seed"])
    assert (first[1] != fresh[1]).any() and len(fresh[0]) == 500


def test_without_a_basis_the_tilt_stays_in_the_span_of_the_planes():
    config = CONFIG | {"drift": True, "drift_rate": 1.5, "noise_std": 0.0}
    process = circle_process.draw_process(config)
    loaded = circle_process.Process(process.radii, process.entry_angles, process.periods, process.transition_matrix,
                                    planes=process.planes, noise_std=0.0)
    assert circle_process.subspace(process) is process.basis
    span = circle_process.subspace(loaded)
    np.testing.assert_allclose(span @ span.T, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(process.basis @ span.T @ span, process.basis, atol=1e-12)
    X, states, _ = circle_process.draw_series(loaded, config, 700, 5)
    np.testing.assert_allclose(X @ process.basis.T @ process.basis, X, atol=1e-4)
    in_plane = np.einsum("td,tpd->tp", X, process.planes[states])
    assert (np.linalg.norm(in_plane, axis=1) < 0.9 * process.radii[states]).any()  # it does tilt


def test_config_json_of_before_the_variants_draws_a_plain_series():
    process = circle_process.draw_process(CONFIG)
    older = {"dwell_mean": CONFIG["dwell_mean"], "dwell_std": CONFIG["dwell_std"]}
    for a, b in zip(circle_process.draw_series(process, older, 300, 4),
                    circle_process.draw_series(process, CONFIG, 300, 4), strict=True):
        np.testing.assert_array_equal(a, b)


def test_points_broadcast_and_have_the_type_asked_for():
    process = circle_process.draw_process(CONFIG)
    circles, thetas = np.array([[0, 3, 4]]), np.linspace(0, 7, 6).reshape(6, 1)
    points = circle_process.points(process, circles, thetas)
    assert points.shape == (6, 3, 7) and points.dtype == np.float64
    for a in range(6):
        for b in range(3):
            np.testing.assert_allclose(points[a, b], circle_point(process, circles[0, b], thetas[a, 0]), atol=1e-12)
    assert circle_process.points(process, np.array([1]), np.array([0.5]), np.float32).dtype == np.float32


def test_phases_of_each_step_of_a_revolution():
    process = circle_process.draw_process(CONFIG)
    for circle, period in enumerate(process.periods):
        steps = np.arange(3 * period)
        phases = circle_process.phases(process, np.full(len(steps), circle), steps)
        assert phases.min() >= 0 and phases.max() < 2 * np.pi
        expected = np.exp(1j * (process.entry_angles[circle] + 2 * np.pi * steps / period))
        np.testing.assert_allclose(np.exp(1j * phases), expected, atol=1e-12)
        np.testing.assert_array_equal(phases[:period], phases[period:2 * period])


def test_plane_coordinates_and_distance_by_brute_force():
    process = circle_process.draw_process(CONFIG)
    X = np.random.default_rng(5).standard_normal((20, 7)).astype(np.float32) * 6
    X[0] = 0
    X[1] = circle_point(process, 2, 1.0)
    coordinates = circle_process.plane_coordinates(process, X)
    assert coordinates.shape == (20, 5, 2) and coordinates.dtype == np.float64
    np.testing.assert_allclose(coordinates[7, 3, 1], X[7].astype(float) @ process.planes[3, 1])
    angles = np.linspace(0, 2 * np.pi, 4001)
    everywhere = np.concatenate([[circle_point(process, i, angle) for angle in angles] for i in range(5)])
    brute = [np.linalg.norm(everywhere - x, axis=1).min() for x in X.astype(float)]
    np.testing.assert_allclose(circle_process.distance(process, X), brute, atol=1e-2)
    assert circle_process.distance(process, X)[0] == pytest.approx(process.radii.min())


def test_locate_by_brute_force():
    visits = circle_process.Visits(np.array([2, 0, 1]), np.array([0, 4, 5, 11]))
    visit_of, step_of = [0] * 4 + [1] + [2] * 6, [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]
    for first in range(10):
        for last in range(first + 1, 11):
            visit, step = circle_process.locate(visits, first, last)
            assert visit.tolist() == visit_of[first:last] and step.tolist() == step_of[first:last]


def test_no_visit_and_no_period_is_longer_than_the_limit():
    assert circle_process.LONGEST_PERIOD == 2**40 and circle_process.LARGEST_VALUE == 1e30
    config = CONFIG | {"dwell_mean": 1e300, "n_steps": 10}
    process = circle_process.draw_process(config)
    visits = circle_process.draw_visits(process, 1e300, 1.0, 10, np.random.default_rng(0))
    assert 0 <= 2**40 - visits.starts[1] < process.periods.max()


def test_dwell_law_has_a_row_per_circle():
    law = circle_process.dwell_law(np.array([10, 25, 400]), 100.0, 20.0)
    assert law.shape[0] == 3
    for row, period in zip(law, (10, 25, 400), strict=True):
        alone = circle_process.revolution_law(period, 100.0, 20.0)
        np.testing.assert_array_equal(row[:len(alone)], alone)
        assert not row[len(alone):].any()
    draws = np.maximum(1, np.rint(np.random.default_rng(1).normal(100, 20, 100_000) / 25))
    assert law[1] @ np.arange(1, law.shape[1] + 1) == pytest.approx(draws.mean(), rel=5e-3)
    process = circle_process.Process(*[np.ones(3)] * 4, dwell_law=law)
    survival = circle_process.survival(process)
    for m in range(law.shape[1]):
        np.testing.assert_allclose(survival[:, m], [row[m:].sum() for row in law], atol=1e-14)


def test_entry_rates_by_counting_visits():
    config = CONFIG | {"n_circles": 3, "min_period": 4, "max_period": 12}
    process = circle_process.draw_process(config)
    visits = circle_process.draw_visits(process, 33.0, 17.0, 2_000_000, np.random.default_rng(2))
    law = circle_process.dwell_law(process.periods, 33.0, 17.0)
    rates = circle_process.entry_rates(circle_process.Process(
        process.radii, process.entry_angles, process.periods, process.transition_matrix, dwell_law=law))
    np.testing.assert_allclose(np.bincount(visits.circles) / visits.starts[-1], rates, rtol=0.03)


def test_planes_are_recovered_without_noise_and_not_from_too_few_angles():
    process = circle_process.draw_process(CONFIG | {"noise_std": 0.0})
    X, states, thetas = circle_process.draw_series(process, CONFIG, 3000, 1)
    np.testing.assert_allclose(circle_process.recover_planes(X, states, thetas, 5), process.planes, atol=1e-4)
    with pytest.raises(cli.UserError, match="circle 0 is seen at too few angles"):
        circle_process.recover_planes(X, states, np.zeros(len(X)), 5)
    with pytest.raises(cli.UserError, match="circle 5 is seen at too few angles"):  # it is never visited
        circle_process.recover_planes(X, states, thetas, 6)
    quarter = np.array([0.0, np.pi / 2])
    np.testing.assert_allclose(circle_process.recover_planes(3 * np.eye(2), np.zeros(2, int), quarter, 1), [np.eye(2)],
                               atol=1e-12)


@pytest.mark.parametrize("config", [
    {"seed": 0}, {"seed": 7, "center_walk_std": 2}, {}, {"seed": None}, {"seed": "7"}, {"seed": 7.0}, {"seed": -1},
    {"seed": 7, "center_walk_std": "2"}, {"seed": 7, "center_walk_std": None}])
def test_the_centres_are_drawn_again_only_where_the_seed_and_the_walk_are_known(config):
    found = circle_process.centers_again(config, 4, 3)
    if config in ({"seed": 0}, {"seed": 7, "center_walk_std": 2}):
        assert found.shape == (4, 3) and found.any() == ("center_walk_std" in config)
    else:
        assert found is None
