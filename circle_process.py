"""The process that makes the series: circles in many dimensions, and a Markov chain that visits one after the other.

A visit to circle i begins at the circle's entry angle and lasts a whole number of revolutions; within it the phase θ
advances by 2π / period_i per step. The noise-free point is r_i (cos θ v1 + sin θ v2), where v1 and v2 span the
circle's plane; white noise is added to every feature. When a visit ends, the transition matrix says where the next
one goes.

Here are the process as one class, its geometry, the law of its dwell times, and the drawing of a series. The
generator's script, the loader, the exact filter and the judgement of generated series all use these.
"""

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from cli import UserError

LARGEST_VALUE = 1e30  # data units: fits into float32, in which X is stored; its square is far from the end of float64
LONGEST_PERIOD = 2**40  # steps per revolution, and per visit: beyond any series, and sums of visits stay exact in int64
BLOCK_VALUES = 2**17  # values of X drawn at a time: few enough for the temporaries to stay in the cache
VISITS_PER_ROUND = 1024  # visits drawn at a time; another number gives another series
RAREST = 1e-15  # a dwell law ends where fewer than this share of the visits would last longer


@dataclass(frozen=True)
class Process:
    """K circles and the chain between them.

    radii (K,) in data units; entry_angles (K,) in radians; periods (K,) int64, steps per revolution; transition_matrix
    (K, K), row: from, column: to. The others are None where they aren't known: planes (K, 2, feature_dim),
    orthonormal pairs (v1, v2); noise_std, the standard deviation of the noise on each feature; dwell_law
    (K, max_revolutions), where dwell_law[i, r - 1] is the probability that a visit to circle i lasts r revolutions
    (only the filter needs it, and `optimal_filter.process_from_series` fills it in); basis
    (subspace_dim, feature_dim), orthonormal rows whose span holds all planes (known while a new process is drawn).
    center_walk_std, the standard deviation per step and feature of the walk of the common centre, and tilt_rate, the
    angle in radians by which the planes of even-numbered circles tilt during a visit, are filled in for the filter like
    dwell_law.
    """

    radii: np.ndarray
    entry_angles: np.ndarray
    periods: np.ndarray
    transition_matrix: np.ndarray
    planes: np.ndarray | None = None
    noise_std: float | None = None
    dwell_law: np.ndarray | None = None
    basis: np.ndarray | None = None
    center_walk_std: float = 0.0
    tilt_rate: float = 0.0

    @property
    def n_circles(self):
        return len(self.radii)

    @property
    def feature_dim(self):
        return self.planes.shape[2]


# ------------------------------------------------------------------------------------------------- geometry


def phases(process, circle, step):
    """Phase in [0, 2π) `step` steps after the entry into `circle`: both (n,) int to (n,) radians."""
    # The step is reduced first, so that each revolution repeats the same numbers exactly.
    period = process.periods[circle]
    return (process.entry_angles[circle] + 2 * np.pi * (step % period) / period) % (2 * np.pi)


def points(process, circle, theta, dtype=np.float64):
    """The noise-free points r (cos θ v1 + sin θ v2) of `circle` at the phase θ.

    circle (…) int and theta (…) radians are broadcast against each other; returns (…, feature_dim) of `dtype`.
    """
    r = process.radii[circle]
    in_plane = np.stack([r * np.cos(theta), r * np.sin(theta)], axis=-1).astype(dtype)
    return np.einsum("...p,...pd->...d", in_plane, process.planes.astype(dtype)[circle])


def plane_coordinates(process, X):
    """The coordinates of X (n, feature_dim) along v1 and v2 of each circle's plane: (n, K, 2) float64."""
    X = np.asarray(X, dtype=np.float64)
    return (X @ process.planes.reshape(-1, X.shape[1]).T).reshape(len(X), -1, 2)


def distance(process, X):
    """Distance from each row of X (n, feature_dim) to the nearest point of any circle: (n,), in data units."""
    X = np.asarray(X, dtype=np.float64)
    along_plane = np.linalg.norm(plane_coordinates(process, X), axis=2)
    from_plane = np.maximum(np.einsum("td,td->t", X, X)[:, None] - along_plane**2, 0)  # squared
    return np.sqrt((from_plane + (along_plane - process.radii)**2).min(axis=1))


def recover_planes(X, states, thetas, n_circles):
    """The planes (K, 2, feature_dim) of a series by least squares from X, states and thetas, made orthonormal.

    The regression of X on (cos θ, sin θ) over the visits to a circle estimates radius * plane; the nearest
    orthonormal pair is the orthogonal factor of its polar decomposition. Since they are fitted to the noise too,
    errors measured with them on the same data come out too low, by about
    noise_std² * K (2 feature_dim - 3) / X.size: 0.02 % at the default sizes. Raises cli.UserError when a circle is
    seen at too few angles.
    """
    planes = np.empty((n_circles, 2, X.shape[1]))
    for i in range(n_circles):
        steps = np.flatnonzero(states == i)
        angles = np.stack([np.cos(thetas[steps]), np.sin(thetas[steps])], axis=1)
        if len(steps) < 2 or np.linalg.matrix_rank(angles) < 2:
            raise UserError(f"data.npz has no planes, and circle {i} is seen at too few angles to recover its plane; "
                            "use data that markov_circles_timeseries.py made")
        fit, *_ = np.linalg.lstsq(angles, X[steps].astype(np.float64))
        left, _, right = np.linalg.svd(fit, full_matrices=False)
        planes[i] = left @ right
    return planes


# ------------------------------------------------------------------------------------------------- dwell times


def dwell_law(periods, dwell_mean, dwell_std):
    """The law of the revolutions per visit, a row per circle: (K, max_revolutions), rows filled up with zeros."""
    laws = [revolution_law(period, dwell_mean, dwell_std) for period in periods]
    law = np.zeros((len(laws), max(map(len, laws))))
    for i, row in enumerate(laws):
        law[i, :len(row)] = row
    return law


def revolution_law(period, dwell_mean, dwell_std):
    """The law of R = max(1, round(d / period)), d ~ N(dwell_mean, dwell_std): P(R = 1), P(R = 2), …

    Exact normal mass between the half-integers, cut where less than RAREST is left. All three arguments in steps.
    """
    last = max(1, math.ceil((dwell_mean + 9 * dwell_std) / period) + 1)
    if dwell_std == 0:
        law = np.zeros(last)
        law[max(1, round(dwell_mean / period)) - 1] = 1.0
    else:
        edges = [-math.inf, *(((r + 0.5) * period - dwell_mean) / dwell_std for r in range(1, last)), math.inf]
        law = np.array([normal_mass(low, high) for low, high in itertools.pairwise(edges)])
    beyond = law.sum() - np.cumsum(law)
    law = law[:np.argmax(beyond < RAREST) + 1]
    return law / law.sum()


def normal_mass(low, high):
    """P(low < z < high) for a standard normal z, without cancellation in the upper tail."""
    if low > 0:
        low, high = -high, -low
    return 0.5 * (math.erfc(-high / math.sqrt(2)) - math.erfc(-low / math.sqrt(2)))


def survival(process):
    """P(R > m) for m = 0, 1, …, R the revolutions of a visit: (K, max_revolutions), the first column 1."""
    return np.cumsum(process.dwell_law[:, ::-1], axis=1)[:, ::-1]


def entry_rates(process):
    """How many visits to each circle begin per step in the stationary process: (K,).

    They are the stationary law of the embedded chain (one transition per visit) over its mean sojourn. A time step
    chosen at random is in revolution m of a visit to circle i, at any given step of that revolution, with probability
    entry_rates[i] * P(R_i > m).
    """
    K = process.n_circles
    balance = np.vstack([process.transition_matrix.T - np.eye(K), np.ones(K)])
    visits, *_ = np.linalg.lstsq(balance, np.r_[np.zeros(K), 1.0])
    visits = np.maximum(visits, 0)
    sojourn = process.periods * survival(process).sum(axis=1)
    return visits / (visits @ sojourn)


# ------------------------------------------------------------------------------------------------- a new process


def random_streams(seed):
    """One random generator each for circles, visits, noise, tilts and the centre's walk.

    They are independent of each other: the same seed visits the same circles with and without noise, drift or a
    walking centre, and a longer series begins with the shorter one.
    """
    return np.random.default_rng(seed).spawn(5)


def draw_process(config):
    """Draw the circles and the chain between them; config as in config.json, its seed included."""
    rng = random_streams(config["seed"])[0]
    K, mean = config["n_circles"], config["radius_mean"]
    radii = rng.normal(mean, config["radius_std"], K).clip(0.5 * mean, 1.5 * mean)
    basis = np.linalg.qr(rng.standard_normal((config["ambient_dim"], config["subspace_dim"])))[0].T
    pairs = np.linalg.qr(rng.standard_normal((K, config["subspace_dim"], 2)))[0]
    return Process(
        radii=radii,
        entry_angles=rng.uniform(0, 2 * np.pi, K),
        periods=np.rint(np.linspace(config["min_period"], config["max_period"], K)).astype(np.int64),
        planes=pairs.transpose(0, 2, 1) @ basis,
        basis=basis,
        transition_matrix=draw_transition_matrix(K, rng),
        noise_std=config["noise_std"],
    )


def draw_transition_matrix(K, rng):
    """A sparse chain over K >= 2 circles on a ring: (K, K), rows sum to 1, the diagonal is zero.

    Each circle leads to its two ring neighbours (one when K is 2) and, from K = 4 on, to one or two circles further
    away, a shortcut being on average half as likely as a neighbour.
    """
    P = np.zeros((K, K))
    n_shortcuts = min(2, (K - 2) // 2)
    for i in range(K):
        neighbours = [(i - 1) % K, (i + 1) % K]
        P[i, neighbours] = rng.uniform(0.5, 1.5, 2)
        far = (i + 2 + rng.choice(max(K - 3, 0), n_shortcuts, replace=False)) % K if n_shortcuts else []
        P[i, far] = rng.uniform(0.25, 0.75, n_shortcuts)
    return P / P.sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------- a series


@dataclass(frozen=True)
class Visits:
    """The visits in their order: circles (n_visits,) int64; starts (n_visits + 1,) int64, the first step of each
    visit and then the end of the last one, which may lie beyond the series."""

    circles: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Plan:
    """A series whose visits are drawn and whose values are not yet: what `draw_points` needs.

    tilt_axes (n_visits, feature_dim), unit vectors, or None without drift; drift_rate in radians; center_walk_std in
    data units per step and feature.
    """

    process: Process
    n_steps: int
    visits: Visits
    tilt_axes: np.ndarray | None
    drift_rate: float
    center_walk_std: float
    noise_rng: np.random.Generator
    walk_rng: np.random.Generator


def draw_series(process, config, n_steps, seed, block_values=BLOCK_VALUES):
    """Draw a series of a process: X (n_steps, feature_dim) float32, states (n_steps,) int64, thetas (n_steps,) radians.

    config gives dwell_mean and dwell_std in steps and, for the variants, drift, drift_rate and center_walk_std, as
    config.json does. Another seed gives another series of the same process. The memory taken is that of the series.
    """
    plan = plan_series(process, config, n_steps, seed)
    X = np.empty((n_steps, process.feature_dim), np.float32)
    states, thetas = np.empty(n_steps, np.int64), np.empty(n_steps)
    for steps, values in draw_points(plan, block_values):
        X[steps] = values
        states[steps], thetas[steps], _, _ = hidden_states(plan, steps)
    return X, states, thetas


def plan_series(process, config, n_steps, seed):
    """Draw the visits of a series, and what tilts them: a Plan. Arguments as for `draw_series`."""
    _, visit_rng, noise_rng, tilt_rng, walk_rng = random_streams(seed)
    visits = draw_visits(process, config["dwell_mean"], config["dwell_std"], n_steps, visit_rng)
    return Plan(
        process=process, n_steps=n_steps, visits=visits,
        tilt_axes=draw_tilt_axes(process, visits, tilt_rng) if config.get("drift") else None,
        drift_rate=config.get("drift_rate", 0.0), center_walk_std=config.get("center_walk_std", 0.0),
        noise_rng=noise_rng, walk_rng=walk_rng,
    )


def draw_visits(process, dwell_mean, dwell_std, n_steps, rng):
    """Draw visits until they cover n_steps steps: a Visits.

    The first circle is uniform, the next ones follow the transition matrix. A visit lasts max(1, round(d / period))
    whole revolutions with d ~ N(dwell_mean, dwell_std).
    """
    cumulative = process.transition_matrix.cumsum(axis=1)
    cumulative /= cumulative[:, -1:]  # ends in exactly 1, above every draw
    rows = cumulative.tolist()
    circle = None
    circles, lengths, n_covered = [], [], 0
    while n_covered < n_steps:
        uniform = rng.random(VISITS_PER_ROUND).tolist()
        dwell = rng.normal(dwell_mean, dwell_std, VISITS_PER_ROUND)
        chain = []
        for u in uniform:
            circle = int(u * len(rows)) if circle is None else bisect_right(rows[circle], u)
            chain.append(circle)
        periods = process.periods[chain]
        revolutions = np.rint(dwell / periods).clip(1, np.maximum(1, LONGEST_PERIOD // periods)).astype(np.int64)
        circles.append(chain)
        lengths.append(revolutions * periods)
        n_covered += int(lengths[-1].sum())
    starts = np.concatenate([[0], *lengths]).cumsum()
    n_visits = int(np.searchsorted(starts, n_steps))
    return Visits(np.concatenate(circles)[:n_visits], starts[:n_visits + 1])


def draw_tilt_axes(process, visits, rng):
    """A unit vector per visit, in the process's subspace and orthogonal to the circle's plane: (n_visits, dim)."""
    planes, basis = process.planes[visits.circles], subspace(process)
    axes = rng.standard_normal((len(visits.circles), len(basis))) @ basis
    axes -= np.einsum("vp,vpd->vd", np.einsum("vpd,vd->vp", planes, axes), planes)
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def subspace(process):
    """Orthonormal rows that span the subspace of all circles: the process's basis, or the span of its planes."""
    if process.basis is not None:
        return process.basis
    _, sizes, rows = np.linalg.svd(process.planes.reshape(-1, process.feature_dim), full_matrices=False)
    return rows[sizes > 1e-6 * sizes[0]]


def step_blocks(plan, block_values=BLOCK_VALUES):
    """The steps of the series as consecutive slices, block_values values of X in each."""
    size = max(1, block_values // plan.process.feature_dim)
    return (slice(first, min(first + size, plan.n_steps)) for first in range(0, plan.n_steps, size))


def hidden_states(plan, steps):
    """For each step in the slice `steps`: its circle, its phase, its visit and how many steps into it, (n,) each."""
    visit, step = locate(plan.visits, steps.start, steps.stop)
    circle = plan.visits.circles[visit]
    return circle, phases(plan.process, circle, step), visit, step


def locate(visits, first, last):
    """The visit of each step in [first, last), and how many steps into it: two (last - first,) int64 arrays."""
    low = np.searchsorted(visits.starts, first, side="right") - 1
    high = np.searchsorted(visits.starts, last)
    steps_in_block = np.diff(visits.starts[low:high + 1].clip(first, last))
    visit = np.repeat(np.arange(low, high), steps_in_block)
    return visit, np.arange(first, last) - visits.starts[visit]


def draw_points(plan, block_values=BLOCK_VALUES):
    """Draw X block by block; yields (steps, X[steps]), `steps` a slice. The size of a block changes no value.

    A plan is good for one pass: its random generators move on.
    """
    dim = plan.process.feature_dim
    center = np.zeros(dim)
    for steps in step_blocks(plan, block_values):
        circle, theta, visit, step = hidden_states(plan, steps)
        X = plan.noise_rng.standard_normal((len(circle), dim), dtype=np.float32)
        X *= np.float32(plan.process.noise_std)
        clean = points(plan.process, circle, theta, np.float32)
        if plan.tilt_axes is not None:
            add_tilt(clean, plan, visit, step, theta)
        if plan.center_walk_std > 0:
            path, center = walk(center, len(clean), plan.center_walk_std, plan.walk_rng)
            clean += path
        X += clean
        yield steps, X


def add_tilt(clean, plan, visit, step, theta):
    """Move the points of even-numbered circles onto planes that tilt as the visit goes on; changes `clean`.

    v2 becomes cos α v2 + sin α axis, where α grows from 0 at the first step of the visit to drift_rate at its last.
    """
    process, visits = plan.process, plan.visits
    rows = np.flatnonzero(visits.circles[visit] % 2 == 0)
    visit = visit[rows]
    circle = visits.circles[visit]
    alpha = plan.drift_rate * step[rows] / (np.diff(visits.starts)[visit] - 1)
    height = (process.radii[circle] * np.sin(theta[rows]))[:, None]
    clean[rows] += height * ((np.cos(alpha) - 1)[:, None] * process.planes[circle, 1]
                             + np.sin(alpha)[:, None] * plan.tilt_axes[visit])


def centers_again(config, n_steps, dim):
    """The centres of the first n_steps of the series that config.json tells of, (n_steps, dim), drawn once more.

    None when config.json doesn't give what is needed.
    """
    seed, std = config.get("seed"), config.get("center_walk_std", 0.0)
    if not isinstance(seed, int) or seed < 0 or not isinstance(std, int | float):
        return None
    return walk(np.zeros(dim), n_steps, std, random_streams(seed)[4])[0]


def walk(center, n, std, rng):
    """The next n positions of the centre's random walk, (n, dim), the first being `center`, and the one after."""
    steps = rng.standard_normal((n, len(center)))
    path = np.concatenate([center[None], std * steps]).cumsum(axis=0)
    return path[:-1], path[-1]
