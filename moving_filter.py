"""The filter for circles that move: a mixture of Kalman filters over the circles, and what its approximation costs.

With `--center-walk-std` the common centre c of all circles takes a random walk, and the series is

  x_t = c_t + m_t + noise,   c_{t+1} = c_t + a normal step of variance q per feature,   noise of variance σ²,

where m_t is the noise-free point of the circle that is visited. Circle, phase and revolution are hidden as in
`optimal_filter`. If they were known from the first step on, the rest would be linear and Gaussian, and a Kalman filter
would give the exact law of c_t. Walk and noise have the same variance in every direction, so the covariance of that law
is a number P_t times the identity, and it is the same number for every hidden path, because a Kalman variance doesn't
depend on what was observed. Hidden paths differ only in the mean of the centre. The exact law of the centre given the
past is therefore a mixture of normal distributions, one per hidden path (Rao-Blackwellisation: what can be integrated
in closed form is, and only the discrete part is enumerated).

A hypothesis here is a circle, the step at which its present revolution began, the law of how many revolutions are still
to come, a weight, and a mean of the centre. Their number would grow with every visit that may have ended. Two things
keep it small, as in the mixture Kalman filter of Chen & Liu (2000, Journal of the Royal Statistical Society B 62,
493-508) and in switching Kalman filters (Murphy 1998, Compaq technical report 98-10):

  - Hypotheses whose posterior probability is below exp(-`Limits.drop`) are dropped.
  - Hypotheses that begin a revolution of the same circle at the same step become one by moment matching, if that loses
    less than `Limits.merge` nats: mean and remaining revolutions become weighted means. What is lost is at most
    ½ w1 w2 / (w1 + w2) d² / P, where d is the distance of the two means (Runnalls 2007, IEEE Transactions on Aerospace
    and Electronic Systems 43, 989-999).

Nothing else is approximate. `optimal_filter.cost_of_limits` measures what both cost, by limits that are far wider.

With `--drift` the planes of the even-numbered circles tilt during a visit, along an axis w that is drawn anew for each,
a unit vector orthogonal to the plane; how far, depends on the length of the visit. A hypothesis about such a circle is
about a visit of a known length. Then the point of the circle is m_t + h_t w with known m_t and h_t. Given w, the mean
of the centre is c_t(0) - b_t w, and x_t is normal around what is expected for w = 0, plus (h_t - b_{t-1}) w, with

  b_t = b_{t-1} + K_t (h_t - b_{t-1}),    K_t the Kalman gain,

so that the likelihood of w is proportional to exp(κ · w) with κ = Σ_t (h_t - b_{t-1}) e_t / S_t, where e_t is the
error, orthogonal to the plane, that w = 0 leaves, and S_t its variance. That is a von Mises-Fisher law, exactly, and
its normalisation gives the likelihood of the hypothesis. What is lost is the spread of b w when a visit ends and the
centre also walks: the mean of the centre is right, its variance stays P. With planes that tilt around a centre that
stands still nothing is lost.

The filter of an observer who is told circle and phase has the variance P = -q/2 + √(q²/4 + q σ²) after each
observation; `told_floor` is its prediction error, which no filter can undercut.
"""

import math
from typing import NamedTuple

import numpy as np

import circle_process
import cli
from circle_process import survival
from kernels.numba_cache import njit

BLOCK = 1024  # steps filtered at a time
MOST_VALUES = 20_000_000  # numbers that the hypotheses of a filter may take, 160 MB
LOST = 30.0  # nats that a series has to be less likely than expected before the circles are searched anew
TABLE_STEP, TABLE_SIZE = 0.005, 3000  # of `sphere_tables`: up to a |κ| of 3 million times the dimension
JUMP = -10.0  # log-probability that is then given to a jump, which the process never makes


class Limits(NamedTuple):
    """What is dropped and merged; see the module's docstring."""

    drop: float = 28.0  # nats below the sum of all weights
    merge: float = 1e-9  # nats
    most: int = 4096  # hypotheses, and at least twice as many as circles have phases


WIDER_LIMITS = Limits(drop=300.0, merge=1e-30, most=16384)  # what the usual limits are held against


class Circles(NamedTuple):
    """A Process in the form that the kernels read. M: the most revolutions of a visit."""

    periods: np.ndarray  # (K,)
    offsets: np.ndarray  # (K,) first row of circle i in points
    points: np.ndarray  # (pairs, rank) noise-free points, in coordinates of the span of all planes
    cos: np.ndarray  # (pairs,) of the phase
    sin: np.ndarray
    log_transition: np.ndarray  # (K, K) from, to
    law: np.ndarray  # (K, M) P(R = m + 1)
    tilted: np.ndarray  # (K,) bool: whether the plane tilts during a visit
    tilt_rate: float  # radians at the end of a visit
    radii: np.ndarray  # (K,)
    planes: np.ndarray  # (K, 2, rank)
    dimension: float  # of the space that an axis of tilt is drawn from
    mean_length: np.ndarray  # (m,) table of |E[w]|, and
    log_phi: np.ndarray  # (m,) of log Φ: see `sphere_tables`


class Anywhere(NamedTuple):
    """Every hidden state at a step chosen anywhere in a long series: what is known when nothing is."""

    circle: np.ndarray  # (n,)
    age: np.ndarray  # (n,) steps since the present revolution began
    visit_age: np.ndarray  # (n,) steps since the visit began, for those of a known length
    length: np.ndarray  # (n,) steps of the visit, 0 where the law of the revolutions is all that matters
    log_probability: np.ndarray  # (n,)
    law: np.ndarray  # (n, M) P(the visit ends with the q-th revolution after the present one)


class Hypotheses(NamedTuple):
    """The hypotheses after a step; the first count[0] rows of each array are in use. Kernels change them in place."""

    count: np.ndarray  # (1,)
    circle: np.ndarray  # (n,)
    begin: np.ndarray  # (n,) the step at which the present revolution began
    log_weight: np.ndarray  # (n,) of the posterior, which sums to 1
    law: np.ndarray  # (n, M) P(the visit ends with the q-th revolution after the present one)
    center: np.ndarray  # (n, rank) mean of the centre
    node: np.ndarray  # (n,) the revolution's number in the Tree
    visit: np.ndarray  # (n,) the step at which the visit began; these are only used where a plane tilts
    length: np.ndarray  # (n,) steps of the visit, 0 where the plane doesn't tilt
    tilt: np.ndarray  # (n, rank) κ: what was learnt about the axis of the tilt
    log_phi: np.ndarray  # (n,) log Φ(|κ|)
    lag: np.ndarray  # (n,) b: the mean of the centre is `center` - b E[w]


class Tree(NamedTuple):
    """Which revolution went over into which: what the smoother needs. All arrays have room for more."""

    used: np.ndarray  # (2,) nodes and links in use
    circle: np.ndarray  # (nodes,) circle of the revolution
    begin: np.ndarray  # (nodes,) its first step
    since: np.ndarray  # (nodes,) the first step at which it counts: later for one that a jump led into
    child: np.ndarray  # (links,) node
    parent: np.ndarray  # (links,) node
    log_mass: np.ndarray  # (links,) log of what the child got from the parent


class Account(NamedTuple):
    """What the limits did so far."""

    dropped: np.ndarray  # (1,) sum of the posterior probabilities dropped
    merged: np.ndarray  # (1,) sum of the nats lost to merging, at most
    hypotheses: np.ndarray  # (1,) sum over steps of their number
    surprise: np.ndarray  # (1,) nats by which the last steps were less likely than they should be


# ------------------------------------------------------------------------------------------------- the centre alone


def walk_variances(n, walk_std, noise_std, initial_variance):
    """The variance of the centre before each of n observations, and the Kalman gain at it: two arrays (n,)."""
    before, gain = np.empty(n), np.empty(n)
    variance = initial_variance
    for t in range(n):
        before[t] = variance
        gain[t] = variance / (variance + noise_std**2)
        variance = gain[t] * noise_std**2 + walk_std**2
    return before, gain


def told_variance(walk_std, noise_std):
    """The variance of the centre after many observations, for an observer who is told circle and phase."""
    q = walk_std**2
    return -q / 2 + math.sqrt(q * q / 4 + q * noise_std**2)


def told_gain(walk_std, noise_std):
    """The Kalman gain of that observer: the share of the centre's mean that each step replaces."""
    return told_variance(walk_std, noise_std) / noise_std**2


def told_floor(walk_std, noise_std, horizon=1):
    """The least mean squared error at a horizon when circle and phase are told: σ² + P + horizon q."""
    return noise_std**2 + told_variance(walk_std, noise_std) + horizon * walk_std**2


@njit(nogil=True, cache=True)
def kalman_means(values, gain, mean):
    """Means of a random walk seen through noise: values (n, d), gain (n,), mean (d,) before the first step.

    Returns the means after each step, (n, d), and how far, squared, each value was from the mean before it, (n,).
    """
    n, d = values.shape
    means, distance2 = np.empty((n, d)), np.zeros(n)
    for t in range(n):
        for c in range(d):
            before = means[t - 1, c] if t > 0 else mean[c]
            error = values[t, c] - before
            means[t, c] = before + gain[t] * error
            distance2[t] += error * error
    return means, distance2


def follow_walk(values, walk_std, noise_std, initial_variance=0.0):
    """A random walk that begins near 0 and is seen through noise: its mean given the past, and given everything.

    values (n, d): walk plus noise. Returns two (n, d) arrays: Kalman filter, and Rauch-Tung-Striebel smoother.
    """
    before, gain = walk_variances(len(values), walk_std, noise_std, initial_variance)
    filtered, _ = kalman_means(np.asarray(values, dtype=np.float64), gain, np.zeros(values.shape[1]))
    smoothed = filtered.copy()
    after = gain * noise_std**2
    back = np.divide(after[:-1], before[1:], out=np.ones(len(values) - 1), where=before[1:] > 0)
    smooth_means(smoothed, back)
    return filtered, smoothed


@njit(nogil=True, cache=True)
def smooth_means(means, back):
    for t in range(len(back) - 1, -1, -1):
        for c in range(means.shape[1]):
            means[t, c] += back[t] * (means[t + 1, c] - means[t, c])


# ------------------------------------------------------------------------------------------------- the hypotheses


@njit(nogil=True, cache=True)
def new_node(tree, circle, begin, since):
    """Enter a revolution into the tree; -1 when no tree is kept."""
    if len(tree.circle) == 0:
        return -1
    node = tree.used[0]
    tree.circle[node], tree.begin[node], tree.since[node] = circle, begin, since
    tree.used[0] += 1
    return node


@njit(nogil=True, cache=True)
def link(tree, child, parent, log_mass):
    if len(tree.circle) > 0:
        tree.child[tree.used[1]], tree.parent[tree.used[1]] = child, parent
        tree.log_mass[tree.used[1]] = log_mass
        tree.used[1] += 1


@njit(nogil=True, cache=True)
def merging_cost(hyp, a, log_mass, center, law, variance, keep_laws):
    """Nats lost, at most, when a hypothesis of this mass, centre and law becomes one with hypothesis a."""
    distance2 = 0.0
    for c in range(len(center)):
        distance2 += (hyp.center[a, c] - center[c])**2
    mass_a, mass = math.exp(hyp.log_weight[a]), math.exp(log_mass)
    both = mass_a * mass / (mass_a + mass)
    cost = 0.0
    if distance2 > 0:
        cost = math.inf if variance == 0 else 0.5 * both * distance2 / variance
    if keep_laws:  # for the smoother, to which later steps may tell which of the two it was
        for q in range(len(law)):
            cost += both * abs(hyp.law[a, q] - law[q])
    return cost


@njit(nogil=True, cache=True)
def settle(hyp, tree, account, limits, t, circle, log_mass, law, center, length, parent, variance, born):
    """Let a hypothesis begin a revolution of `circle` at step t: merge it into one that does so, or add it.

    born: numbers of the hypotheses that began at t; born[-1] counts them. When there is no room it is dropped.
    """
    for b in range(born[-1]):
        a = born[b]
        if hyp.circle[a] != circle or hyp.length[a] != length:
            continue
        cost = merging_cost(hyp, a, log_mass, center, law, variance, len(tree.circle) > 0)
        if cost < limits.merge:
            account.merged[0] += cost
            top = max(hyp.log_weight[a], log_mass)
            total = top + math.log(math.exp(hyp.log_weight[a] - top) + math.exp(log_mass - top))
            share = math.exp(log_mass - total)
            for c in range(len(center)):
                hyp.center[a, c] += share * (center[c] - hyp.center[a, c])
            for q in range(len(law)):
                hyp.law[a, q] += share * (law[q] - hyp.law[a, q])
            hyp.log_weight[a] = total
            link(tree, hyp.node[a], parent, log_mass)
            return
    a = hyp.count[0]
    if a == len(hyp.circle):
        account.dropped[0] += math.exp(log_mass)
        return
    hyp.count[0] += 1
    hyp.circle[a], hyp.begin[a], hyp.log_weight[a] = circle, t, log_mass
    hyp.law[a], hyp.center[a] = law, center
    hyp.visit[a], hyp.length[a], hyp.tilt[a], hyp.log_phi[a], hyp.lag[a] = t, length, 0.0, 0.0, 0.0
    hyp.node[a] = new_node(tree, circle, t, t)
    link(tree, hyp.node[a], parent, log_mass)
    born[born[-1]] = a
    born[-1] += 1


@njit(nogil=True, cache=True)
def enter(circles, hyp, tree, account, limits, t, k, log_mass, center, parent, variance, born):
    """Let a visit to circle k begin at step t. Where its plane tilts, there is a hypothesis for each length of it."""
    if not circles.tilted[k]:
        settle(hyp, tree, account, limits, t, k, log_mass, circles.law[k], center, 0, parent, variance, born)
        return
    M = circles.law.shape[1]
    for r in range(M):
        if circles.law[k, r] == 0:
            continue
        log_share = log_mass + math.log(circles.law[k, r])
        if log_share < -limits.drop:
            account.dropped[0] += math.exp(log_share)
            continue
        law = np.zeros(M)
        law[r] = 1.0
        settle(hyp, tree, account, limits, t, k, log_share, law, center, (r + 1) * circles.periods[k], parent, variance,
               born)


@njit(nogil=True, cache=True)
def turn_over(circles, hyp, tree, account, limits, t, variance, born):
    """Bring the hypotheses from the steps before t to the beginning of step t.

    Those whose revolution has ended go on with another one or leave for the other circles.
    """
    K, M = circles.law.shape
    next_law, center = np.empty(M), np.empty(hyp.center.shape[1])
    born[-1] = 0
    for h in range(hyp.count[0]):
        i = hyp.circle[h]
        if t - hyp.begin[h] != circles.periods[i]:
            continue
        log_weight, leaving, parent = hyp.log_weight[h], hyp.law[h, 0], hyp.node[h]
        staying = 0.0
        for q in range(1, M):
            staying += hyp.law[h, q]
        for q in range(M - 1):
            next_law[q] = hyp.law[h, q + 1] / max(staying, 1e-300)
        next_law[M - 1] = 0.0
        if hyp.length[h] > 0 and staying > 0:  # the visit's length is known, and it isn't over
            hyp.begin[h], hyp.law[h], hyp.node[h] = t, next_law, new_node(tree, i, t, t)
            link(tree, hyp.node[h], parent, log_weight)
            continue
        hyp.log_weight[h] = -np.inf  # this row has had its time; `normalise` removes it
        mean_center(circles, hyp, h, center)
        if staying > 0 and log_weight + math.log(staying) > -limits.drop:
            settle(hyp, tree, account, limits, t, i, log_weight + math.log(staying), next_law, center, 0, parent,
                   variance, born)
        if leaving > 0:
            for k in range(K):
                log_mass = log_weight + math.log(leaving) + circles.log_transition[i, k]
                if log_mass > -limits.drop:
                    enter(circles, hyp, tree, account, limits, t, k, log_mass, center, parent, variance, born)
                elif log_mass > -np.inf:
                    account.dropped[0] += math.exp(log_mass)


@njit(nogil=True, cache=True)
def look_up(circles, kappa):
    """|E[w]| and log Φ for the natural parameter `kappa` of an axis: see `sphere_tables`."""
    n, last = circles.dimension, len(circles.log_phi) - 1
    place = math.log1p(kappa / n) / TABLE_STEP
    if place >= last:  # beyond the table: the leading terms for a large kappa
        end = n * math.expm1(last * TABLE_STEP)
        return 1 - (n - 1) / (2 * kappa), circles.log_phi[last] + kappa - end - (n - 1) / 2 * math.log(kappa / end)
    a = int(place)
    x = place - a
    low, high = circles.mean_length[a], circles.mean_length[a + 1]
    # Φ by Hermite interpolation: its derivative to the place in the table is |E[w]| dκ/dplace.
    slope = low * n * math.exp(a * TABLE_STEP) * TABLE_STEP
    next_slope = high * n * math.exp((a + 1) * TABLE_STEP) * TABLE_STEP
    log_phi = (circles.log_phi[a] * (1 + 2 * x) * (1 - x)**2 + circles.log_phi[a + 1] * x * x * (3 - 2 * x)
               + slope * x * (1 - x)**2 - next_slope * x * x * (1 - x))
    return low + x * (high - low), log_phi


@njit(nogil=True, cache=True)
def axis_share(circles, hyp, h):
    """E[w] / κ, w the axis of the tilt."""
    kappa2 = 0.0
    for c in range(hyp.tilt.shape[1]):
        kappa2 += hyp.tilt[h, c]**2
    kappa = math.sqrt(kappa2)
    return look_up(circles, kappa)[0] / kappa if kappa > 0 else 0.0


@njit(nogil=True, cache=True)
def mean_center(circles, hyp, h, center):
    """Fill in the mean of the centre under hypothesis h."""
    center[:] = hyp.center[h]
    if hyp.length[h] > 0 and hyp.lag[h] != 0:
        share = hyp.lag[h] * axis_share(circles, hyp, h)
        for c in range(len(center)):
            center[c] -= share * hyp.tilt[h, c]


@njit(nogil=True, cache=True)
def tilt_angle(circles, hyp, h, t):
    return circles.tilt_rate * (t - hyp.visit[h]) / (hyp.length[h] - 1)


@njit(nogil=True, cache=True)
def see_tilted(circles, hyp, h, t, y, variance, gain):
    """`likelihoods` for a hypothesis whose plane tilts: see the module's docstring."""
    i, rank, S = hyp.circle[h], len(y), variance
    pair = circles.offsets[i] + t - hyp.begin[h]
    alpha = tilt_angle(circles, hyp, h, t)
    height = circles.radii[i] * circles.sin[pair]
    up, out = height * (math.cos(alpha) - 1), height * math.sin(alpha)
    v1, v2 = circles.planes[i, 0], circles.planes[i, 1]
    distance2, along1, along2 = 0.0, 0.0, 0.0
    error = np.empty(rank)
    for c in range(rank):
        error[c] = y[c] - circles.points[pair, c] - up * v2[c] - hyp.center[h, c]
        distance2 += error[c] * error[c]
        along1 += error[c] * v1[c]
        along2 += error[c] * v2[c]
        hyp.center[h, c] += gain * error[c]
    seen = out - hyp.lag[h]  # how far the axis moves what is expected of y
    hyp.lag[h] += gain * seen
    kappa2 = 0.0
    for c in range(rank):
        hyp.tilt[h, c] += seen / S * (error[c] - along1 * v1[c] - along2 * v2[c])
        kappa2 += hyp.tilt[h, c]**2
    log_phi = look_up(circles, math.sqrt(kappa2))[1]
    hyp.log_weight[h] += log_phi - hyp.log_phi[h] - (distance2 + seen * seen) / (2 * S)
    hyp.log_phi[h] = log_phi


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def likelihoods(circles, hyp, t, y, variance, gain):
    """Weigh each hypothesis with the likelihood of y (rank,) at step t, without the constant factor; move its centre.

    variance: of y around the mean of a hypothesis.
    """
    rank = len(y)
    for h in range(hyp.count[0]):
        if hyp.log_weight[h] == -np.inf:
            continue
        if hyp.length[h] > 0:
            see_tilted(circles, hyp, h, t, y, variance, gain)
            continue
        pair = circles.offsets[hyp.circle[h]] + t - hyp.begin[h]
        point, center, distance2 = circles.points[pair], hyp.center[h], 0.0
        for c in range(rank):
            error = y[c] - point[c] - center[c]
            distance2 += error * error
            center[c] += gain * error
        hyp.log_weight[h] -= distance2 / (2 * variance)


@njit(nogil=True, cache=True)
def normalise(hyp, account, limits):
    """Make the weights a posterior and drop what is negligible; returns the log of their sum before."""
    n = hyp.count[0]
    top = hyp.log_weight[:n].max()
    total = 0.0
    for h in range(n):
        total += math.exp(hyp.log_weight[h] - top)
    total = top + math.log(total)
    least = -limits.drop
    if n > limits.most:
        least = max(least, np.partition(hyp.log_weight[:n] - total, n - limits.most)[n - limits.most])
    kept = 0
    for h in range(n):
        log_weight = hyp.log_weight[h] - total
        if log_weight < least:
            account.dropped[0] += math.exp(log_weight)
            continue
        if kept < h:
            hyp.circle[kept], hyp.begin[kept], hyp.node[kept] = hyp.circle[h], hyp.begin[h], hyp.node[h]
            hyp.law[kept], hyp.center[kept] = hyp.law[h], hyp.center[h]
            hyp.visit[kept], hyp.length[kept], hyp.tilt[kept] = hyp.visit[h], hyp.length[h], hyp.tilt[h]
            hyp.log_phi[kept], hyp.lag[kept] = hyp.log_phi[h], hyp.lag[h]
        hyp.log_weight[kept] = log_weight
        kept += 1
    hyp.count[0] = kept
    account.hypotheses[0] += kept
    return total


@njit(nogil=True, cache=True)
def search_anew(hyp, tree, anywhere, t, center):
    """Add every hidden state with the tiny probability exp(JUMP) in all, at this centre.

    The process never jumps. A series that a model generates may, and would be lost for good without this.
    """
    likeliest = np.argmax(hyp.log_weight[:hyp.count[0]])
    for s in range(len(anywhere.circle)):
        h = hyp.count[0]
        if h == len(hyp.circle):
            return
        hyp.circle[h], hyp.begin[h] = anywhere.circle[s], t - anywhere.age[s]
        hyp.log_weight[h] = JUMP + anywhere.log_probability[s]
        hyp.law[h], hyp.center[h] = anywhere.law[s], center
        hyp.visit[h], hyp.length[h] = t - anywhere.visit_age[s], anywhere.length[s]
        hyp.tilt[h], hyp.log_phi[h], hyp.lag[h] = 0.0, 0.0, 0.0
        hyp.node[h] = new_node(tree, hyp.circle[h], hyp.begin[h], t + 1)
        link(tree, hyp.node[h], hyp.node[likeliest], hyp.log_weight[h])
        hyp.count[0] += 1


@njit(nogil=True, cache=True)
def is_lost(account, evidence, rank, variance):
    """Whether the last steps, this one with log-likelihood `evidence` included, are no longer those of the process.

    A cumulative sum: a step that fits has evidence -rank / 2 on average; each one's excess beyond twice that is added.
    """
    account.surprise[0] = max(0.0, account.surprise[0] - evidence - rank)
    if account.surprise[0] < LOST + rank:
        return False
    account.surprise[0] = 0.0
    return True


@njit(nogil=True, cache=True)
def look_ahead(circles, hyp, h, t, mass, horizons, ahead):
    """Add to ahead (H, rank), times mass, the points t + horizons of a tilting visit, as far as it lasts."""
    i, period, share = hyp.circle[h], circles.periods[hyp.circle[h]], axis_share(circles, hyp, h)
    for a in range(len(horizons)):
        later = t + horizons[a]
        if later >= hyp.visit[h] + hyp.length[h]:
            continue
        pair = circles.offsets[i] + (later - hyp.visit[h]) % period
        alpha = tilt_angle(circles, hyp, h, later)
        height = circles.radii[i] * circles.sin[pair]
        up, out = height * (math.cos(alpha) - 1), height * math.sin(alpha) * share
        for c in range(ahead.shape[1]):
            point = circles.points[pair, c] + up * circles.planes[i, 1, c] + out * hyp.tilt[h, c]
            ahead[a, c] += mass * point


@njit(nogil=True, cache=True)
def forward(circles, hyp, tree, account, limits, start, y, before, gain, noise_variance, first, born, anywhere,
            horizons, out):
    """Filter the rows of y from `start` on, y[0] being step `first`; returns the row at which room in the tree ran out.

    y (b, rank); before, gain (b,) as from `walk_variances`. Fills out = (log_likelihood (b,), without the normal law's
    constant; posterior (b, K); phasor (b, K, 2); flux (b, K, reach); center (b, rank); ahead (b, H, rank)), all zeros
    before, posterior, phasor and flux as `optimal_filter.forward` does. Where the plane tilts there is no phasor: the
    last has what is expected of the points of that visit at the H horizons.
    """
    evidence, posterior, phasor, flux, center, ahead = out
    K, reach, rank = flux.shape[1], flux.shape[2], y.shape[1]
    mean = np.empty(rank)
    for row in range(start, len(y)):
        t, n = first + row, hyp.count[0]
        room = (n + 1) * (K + 1) * (circles.law.shape[1] if circles.tilt_rate > 0 else 1) + len(anywhere.circle)
        if len(tree.circle) > 0 and (tree.used[0] + room > len(tree.circle) or tree.used[1] + room > len(tree.child)):
            return row
        if t > 0:
            turn_over(circles, hyp, tree, account, limits, t, before[row], born)
        variance = before[row] + noise_variance
        likelihoods(circles, hyp, t, y[row], variance, gain[row])
        evidence[row] = normalise(hyp, account, limits)
        for h in range(hyp.count[0]):
            mass, i = math.exp(hyp.log_weight[h]), hyp.circle[h]
            pair = circles.offsets[i] + t - hyp.begin[h]
            posterior[row, i] += mass
            if hyp.length[h] > 0:
                look_ahead(circles, hyp, h, t, mass, horizons, ahead[row])
            else:
                phasor[row, i, 0] += mass * circles.cos[pair]
                phasor[row, i, 1] += mass * circles.sin[pair]
            mean_center(circles, hyp, h, mean)
            for c in range(rank):
                center[row, c] += mass * mean[c]
            end = circles.periods[i] - (t - hyp.begin[h])  # steps until this revolution is over
            q = 0
            while end <= reach and q < hyp.law.shape[1]:
                flux[row, i, end - 1] += mass * hyp.law[h, q]
                end += circles.periods[i]
                q += 1
        if is_lost(account, evidence[row], rank, variance):
            search_anew(hyp, tree, anywhere, t, center[row])
    return len(y)


@njit(nogil=True, cache=True)
def add_span(posterior, phasor, i, period, begin, low, high, probability):
    """Add to the differences over time of `trace_back` that circle i is visited at the steps [low, high)."""
    low, high = max(low, 0), min(high, len(posterior) - 1)
    if low >= high:
        return
    turned = 2 * math.pi * (begin % period) / period
    value = probability * complex(math.cos(turned), -math.sin(turned))
    posterior[low, i] += probability
    posterior[high, i] -= probability
    phasor[low, i] += value
    phasor[high, i] -= value


@njit(nogil=True, cache=True)
def trace_back(periods, tree, last, log_weight, posterior, phasor):
    """Add the differences over time of P(circle | all of x) and of its mean phasor to zeros, (n + 1, K) each.

    A revolution got its weight from its parents. Where only one could lead to it, all that was learnt about it later
    is true of the parent too; of parents that were merged, each gets its share. last: nodes of the last hypotheses.
    The phasor of a revolution that began at s is exp(-2πi s / period) as long as it is on.
    """
    n_nodes, n_links = tree.used
    total, probability = np.zeros(n_nodes), np.zeros(n_nodes)
    for e in range(n_links):
        total[tree.child[e]] += math.exp(tree.log_mass[e])
    for h in range(len(last)):
        probability[last[h]] += math.exp(log_weight[h])
    for e in range(n_links - 1, -1, -1):  # a node's links to its children come after those to its parents
        child, parent = tree.child[e], tree.parent[e]
        if probability[child] > 0:
            passed = probability[child] * math.exp(tree.log_mass[e]) / total[child]
            probability[parent] += passed
            if tree.since[child] > tree.begin[child]:  # a jump, which cut the parent's revolution short
                i = tree.circle[parent]
                add_span(posterior, phasor, i, periods[i], tree.begin[parent], tree.since[child],
                         tree.begin[parent] + periods[i], -passed)
    for node in range(n_nodes):
        i = tree.circle[node]
        add_span(posterior, phasor, i, periods[i], tree.begin[node], tree.since[node], tree.begin[node] + periods[i],
                 probability[node])


# ------------------------------------------------------------------------------------------------- whole series


class MovingFilter:
    """Filters one series of a Process whose centre walks or whose planes tilt, or both.

    starts, past: (K,) each, as from `optimal_filter.initial_law`; initial_variance: of the centre, per feature,
    before the first step; horizons: steps ahead that are to be predicted; limits: Limits; keep_tree: remember what
    `state_sums` needs. `account` tells what the limits did.
    """

    def __init__(self, process, starts, past, initial_variance, horizons=(), limits=None, keep_tree=False):
        self.process, self.initial_variance = process, initial_variance
        self.horizons, self.reach = np.array(horizons, np.int64), max(horizons, default=0)
        self.span = circle_process.subspace(process) if process.tilt_rate else span_of_planes(process)
        self.circles = circle_tables(process, self.span)
        limits = limits or Limits()
        self.anywhere = hidden_states(process, self.circles, -limits.drop)
        self.limits = limits._replace(most=max(limits.most, 2 * len(self.anywhere.circle)))
        self.tree = empty_tree(2**17 if keep_tree else 0)
        self.hypotheses = self.first_hypotheses(starts, past)
        self.account = Account(*np.zeros((4, 1)))

    def first_hypotheses(self, starts, past):
        """What is known before the first step: visits that begin there, or any pair when some may be under way."""
        anywhere, K = self.anywhere, self.process.n_circles
        if not np.any(past):  # only visits that begin with the first step
            anywhere = first_states(self.circles, starts)
        n, M, rank = len(anywhere.circle), self.circles.law.shape[1], len(self.span)
        room = self.limits.most + len(self.anywhere.circle) + K
        tilts = rank if self.process.tilt_rate else 0
        if room * (rank + tilts + M) > MOST_VALUES:
            raise cli.UserError(f"the circles have {len(self.circles.points)} phases in {rank} dimensions, and a visit "
                                f"may last {M} revolutions: too many for the filter of circles that move; use data "
                                "with shorter periods")
        hyp = Hypotheses(
            count=np.array([n]), circle=np.zeros(room, np.int64), begin=np.zeros(room, np.int64),
            log_weight=np.full(room, -np.inf), law=np.zeros((room, M)), center=np.zeros((room, rank)),
            node=np.full(room, -1, np.int64), visit=np.zeros(room, np.int64), length=np.zeros(room, np.int64),
            tilt=np.zeros((room, tilts)), log_phi=np.zeros(room), lag=np.zeros(room))
        hyp.circle[:n], hyp.begin[:n], hyp.law[:n] = anywhere.circle, -anywhere.age, anywhere.law
        hyp.visit[:n], hyp.length[:n] = -anywhere.visit_age, anywhere.length
        hyp.log_weight[:n] = anywhere.log_probability
        if len(self.tree.circle):
            self.grow_tree(n)
            self.tree.circle[:n], self.tree.begin[:n], hyp.node[:n] = anywhere.circle, -anywhere.age, np.arange(n)
            self.tree.since[:n] = -anywhere.age
            self.tree.used[0] = n
        return hyp

    def grow_tree(self, least=0):
        """Twice the room in the tree, and at least so much."""
        size = max(2 * len(self.tree.circle), 2 * least)
        larger = empty_tree(size)
        for old, new in zip(self.tree, larger, strict=True):
            new[:len(old)] = old
        self.tree = larger

    def blocks(self, X):
        """Filter X (n, feature_dim) block by block.

        Yields (first, log_likelihood, posterior, phasor, flux, center (b, feature_dim), ahead (b, H, feature_dim)): the
        first step of the block, log p(x_t | x_{<t}) in nats, what `optimal_filter.forward` fills in, E[c_t | x_{<=t}],
        and what is expected at the horizons of circles whose plane tilts, as long as the present visit lasts.
        """
        process, K, rank = self.process, self.process.n_circles, len(self.span)
        noise_variance, dim, n = process.noise_std**2, process.feature_dim, len(X)
        before, gain = walk_variances(n, process.center_walk_std, process.noise_std, self.initial_variance)
        rest_mean = np.zeros(dim)
        born = np.zeros(len(self.hypotheses.circle) + 1, np.int64)
        for first in range(0, n, BLOCK):
            values = np.asarray(X[first:first + BLOCK], dtype=np.float64)
            b, steps = len(values), slice(first, first + BLOCK)
            y = values @ self.span.T
            out = np.zeros(b), np.zeros((b, K)), np.zeros((b, K, 2)), np.zeros((b, K, self.reach)), np.zeros((b, rank))
            out = *out, np.zeros((b, len(self.horizons), rank))
            row = 0
            while row < b:
                row = forward(self.circles, self.hypotheses, self.tree, self.account, self.limits, row, y,
                              before[steps], gain[steps], noise_variance, first, born, self.anywhere, self.horizons,
                              out)
                if row < b:
                    self.grow_tree()

            # Outside the span of the planes no circle has a part: there one Kalman filter is all.
            log_likelihood, posterior, phasor, flux, center, ahead = out
            center = center @ self.span
            variance = before[steps] + noise_variance
            if rank < dim:
                rest, distance2 = kalman_means(values - y @ self.span, gain[steps], rest_mean)
                rest_mean = rest[-1]
                center += rest
                log_likelihood -= distance2 / (2 * variance)
            log_likelihood -= 0.5 * dim * np.log(2 * np.pi * variance)
            yield first, log_likelihood, posterior, phasor, flux, center, ahead @ self.span

    @property
    def n_hypotheses(self):
        """The sum over the steps so far of the number of hypotheses."""
        return float(self.account.hypotheses[0])

    def state_sums(self, n):
        """P(circle | all n steps) and the mean of exp(iθ) times it, (n, K) each; after `blocks`."""
        periods, count = self.circles.periods, self.hypotheses.count[0]
        posterior = np.zeros((n + 1, len(periods)))
        phasor = np.zeros((n + 1, len(periods)), np.complex128)
        trace_back(periods, self.tree, self.hypotheses.node[:count], self.hypotheses.log_weight[:count], posterior,
                   phasor)
        theta = self.process.entry_angles + 2 * np.pi * (np.arange(n)[:, None] % periods) / periods
        return posterior.cumsum(axis=0)[:n], phasor.cumsum(axis=0)[:n] * np.exp(1j * theta)


def empty_tree(size):
    return Tree(np.zeros(2, np.int64), *(np.empty(size, np.int64) for _ in range(5)), np.empty(size))


def span_of_planes(process):
    """Orthonormal rows (rank, feature_dim) that span the planes of all circles."""
    _, sizes, rows = np.linalg.svd(process.planes.reshape(-1, process.feature_dim), full_matrices=False)
    return rows[sizes > 1e-9 * sizes[0]]


def circle_tables(process, span):
    """Circles of a Process; span: as from `span_of_planes`."""
    periods = process.periods.astype(np.int64)
    circle = np.repeat(np.arange(process.n_circles), periods)
    step = np.concatenate([np.arange(period) for period in periods])
    theta = circle_process.phases(process, circle, step)
    with np.errstate(divide="ignore"):
        log_transition = np.log(process.transition_matrix)
    return Circles(
        periods=periods, offsets=np.cumsum(periods) - periods, cos=np.cos(theta), sin=np.sin(theta),
        points=circle_process.points(process, circle, theta) @ span.T,
        log_transition=log_transition, law=np.ascontiguousarray(process.dwell_law, dtype=np.float64),
        tilted=(np.arange(process.n_circles) % 2 == 0) & (process.tilt_rate > 0), tilt_rate=float(process.tilt_rate),
        radii=process.radii, planes=process.planes @ span.T, dimension=max(len(span) - 2.0, 1.0),
        **sphere_tables(len(span) - 2 if process.tilt_rate else 1))


def hidden_states(process, circles, least):
    """Every hidden state, as an Anywhere; where planes tilt, those whose log-probability is above `least`.

    A step chosen at random is at a given step of revolution m of a visit of R > m revolutions to circle i with the
    probability entry_rates[i] P(R). Where it doesn't matter, all R and m are one state.
    """
    alive, rates = survival(process), circle_process.entry_rates(process)
    M, rows = alive.shape[1], []
    for i, period in enumerate(circles.periods.tolist()):
        ages = np.arange(period)
        if rates[i] == 0:
            continue
        if not circles.tilted[i]:
            mean = alive[i].sum()
            rows.append((ages, 0 * ages, 0, i, rates[i] * mean, alive[i] / mean))
            continue
        for revolutions in np.flatnonzero(rates[i] * circles.law[i] > math.exp(least)) + 1:
            for m in range(revolutions):
                law = np.zeros(M)
                law[revolutions - 1 - m] = 1.0
                probability = rates[i] * circles.law[i, revolutions - 1]
                rows.append((ages, ages + m * period, revolutions * period, i, probability, law))
    counts = [len(row[0]) for row in rows]
    return Anywhere(
        circle=np.repeat([row[3] for row in rows], counts), age=np.concatenate([row[0] for row in rows]),
        visit_age=np.concatenate([row[1] for row in rows]), length=np.repeat([row[2] for row in rows], counts),
        log_probability=np.repeat(np.log([row[4] for row in rows]), counts),
        law=np.repeat(np.array([row[5] for row in rows]), counts, axis=0))


def first_states(circles, starts):
    """The hidden states at the first step of a visit to a circle with the probabilities `starts` (K,): an Anywhere."""
    rows = []
    for i in np.flatnonzero(starts).tolist():
        if not circles.tilted[i]:
            rows.append((i, 0, starts[i], circles.law[i]))
            continue
        for r in np.flatnonzero(circles.law[i]).tolist():
            law = np.zeros(circles.law.shape[1])
            law[r] = 1.0
            rows.append((i, (r + 1) * circles.periods[i], starts[i] * circles.law[i, r], law))
    none = np.zeros(len(rows), np.int64)
    return Anywhere(circle=np.array([row[0] for row in rows]), age=none, visit_age=none,
                    length=np.array([row[1] for row in rows]), log_probability=np.log([row[2] for row in rows]),
                    law=np.array([row[3] for row in rows]))


def sphere_tables(n):
    """Of a unit vector w in n dimensions with a density proportional to exp(κ · w): tables of |E[w]| and of log Φ.

    Φ(|κ|) = E[exp(κ · w)] for a uniform w (Mardia & Jupp 2000, Directional statistics, 9.3: von Mises-Fisher). The
    ratio of Bessel functions A_n = |E[w]| obeys A_n(κ) = κ / (n + κ A_{n + 2}(κ)), which is evaluated from a far one
    on, and log Φ is its integral (Simpson). The far one is a bound that is right up to 1 / κ²: where κ is large,
    the recurrence forgets nothing of it (Hornik & Grün 2013, Journal of Mathematical Analysis and Applications 408).
    The entry at place p is that of |κ| = n (exp(p TABLE_STEP) - 1).
    """
    place = np.arange(2 * TABLE_SIZE - 1) * (TABLE_STEP / 2)
    kappa = n * np.expm1(place)
    order = n / 2 + 498.5  # of A_{n + 998}: I of this order + 1 / 2 over I of this order - 1 / 2
    ratio = kappa / (order + np.sqrt(order * (order + 1) + kappa**2))
    for later in range(498, -1, -1):
        ratio = kappa / (n + 2 * later + kappa * ratio)
    slope = ratio * n * np.exp(place)  # of log Φ
    steps = (slope[:-2:2] + 4 * slope[1:-1:2] + slope[2::2]) * TABLE_STEP / 6
    return {"mean_length": ratio[::2].copy(), "log_phi": np.concatenate([[0.0], np.cumsum(steps)])}
