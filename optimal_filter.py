"""The exact floor: the Bayes-optimal predictor of the generator, and the states it infers.

The generator is a hidden semi-Markov process whose parameters are known, so E[x_{t+k} | x_1 … x_t] can be computed
exactly. No predictor that sees the same past can have a lower expected mean squared error. Reads
DATA_DIR/data.npz and config.json; prints the noise floor noise_std², the mean squared error of the filter a horizon,
and how often it names the true circle; writes SAVE_DIR/optimal_filter.json and optimal_filter.png.

Three columns: the whole series, its validation part, and windows of --seq-len steps in the validation part that
start with no past at all: the floor of a model that sees one window at a time, averaged over the same targets as
its validation loss.

Examples:
  python optimal_filter.py --data-dir data
  python optimal_filter.py --data-dir data --horizons 1,2,4,8 --seq-len 512 --save-dir plots
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np

import circle_process
import cli
import dataset
import figures
from circle_process import Process, entry_rates, survival

BLOCK = 1024  # steps filtered at a time: bounds the memory for predictions, large enough for an efficient GEMM
MOST_REVOLUTIONS = 10_000  # per visit: the work per step grows with it
MOST_STATES = 1_000_000  # phases times revolutions: the memory grows with it
LEAST_NOISE = 1e-30  # below, the variance leaves float64
NEGLIGIBLE = -45.0  # exp(-45) < 3e-20: adding it to a sum that holds a 1 changes nothing in float64


def horizon_list(text):
    """`1,2,4` as a sorted list of distinct steps ahead."""
    return sorted({cli.positive_int(part) for part in text.split(",")})


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    targets = parser.add_argument_group("what is predicted")
    targets.add_argument("--val-fraction", type=cli.fraction, default=0.1, metavar="F",
                         help="part of the series, at its end, that is validation")
    targets.add_argument("--horizons", type=horizon_list, default="1,2,4,8,16,32,64", metavar="K,K,…",
                         help="steps ahead to predict")
    targets.add_argument("--seq-len", type=cli.positive_int, default=1024, metavar="N",
                         help="steps in a window without a past")
    targets.add_argument("--stride", type=cli.positive_int, default=256, metavar="N",
                         help="steps between the starts of these windows")
    files = parser.add_argument_group("files")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    if args.seq_len <= max(args.horizons):
        parser.error(f"--seq-len {args.seq_len} must be longer than the largest of --horizons, {max(args.horizons)}")
    return args


# ---------------------------------------------------------------------------------------------- the process


def process_from_series(series):
    """The Process that made a `dataset.Series`; planes that the file lacks are recovered from its arrays.

    Raises cli.UserError for drifting data, for data without noise, and when config.json lacks what is needed.
    """
    config = series.config
    noise_std, dwell_mean, dwell_std = (config_number(config, name) for name in
                                        ("noise_std", "dwell_mean", "dwell_std"))
    drifting = [name for name in ("drift", "center_walk_std") if config.get(name)]
    if drifting:
        raise cli.UserError(f"these data were made with {' and '.join(drifting)}: the exact filter knows only fixed "
                            "circles; use data made without --drift and --center-walk-std")
    if noise_std < LEAST_NOISE:
        raise cli.UserError(f"these data have noise_std {noise_std:g}, where the filter's likelihoods are not defined; "
                            "use data with --noise-std above 0")
    if (dwell_mean + 9 * dwell_std) / series.periods.min() > MOST_REVOLUTIONS:
        raise cli.UserError(f"a visit may last more than {MOST_REVOLUTIONS} revolutions, too many for the "
                            "exact filter; use data with longer periods or shorter visits")
    phases, revolutions = int(series.periods.sum()), (dwell_mean + 9 * dwell_std) / series.periods.min() + 1
    if phases * revolutions > MOST_STATES:
        raise cli.UserError(f"the circles have {phases} phases, and a visit may last {revolutions:.0f} revolutions: "
                            "too many states for the exact filter; use data with shorter periods")
    planes = series.planes
    if planes is None:
        planes = circle_process.recover_planes(series.X, series.states, series.thetas, series.n_circles)
    return Process(
        radii=series.radii, entry_angles=series.entry_angles, periods=series.periods,
        transition_matrix=series.transition_matrix, planes=planes, noise_std=noise_std,
        dwell_law=circle_process.dwell_law(series.periods, dwell_mean, dwell_std),
    )


def known_process(series, missed):
    """process_from_series, or None for data that the filter doesn't know, after a line that says what is `missed`
    without it, and why."""
    try:
        return process_from_series(series)
    except cli.UserError as error:
        print(f"{missed}: {error}")
        return None


def config_number(config, name):
    """A number, 0 or more, of config.json. Raises cli.UserError."""
    value = config.get(name)
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise cli.UserError(f"config.json has no usable {name} ({value}); the filter needs the generator's parameters, "
                            "so make the data anew with markov_circles_timeseries.py")
    return float(value)


def initial_law(process, initial):
    """The laws that `initial` names: (K,) visits that begin at the first step, (K,) rate of those begun before."""
    K = process.n_circles
    if isinstance(initial, str):
        if initial == "stationary":
            return entry_rates(process), entry_rates(process)
        if initial == "visit start":
            return np.full(K, 1 / K), np.zeros(K)
        raise ValueError(f"initial must be 'visit start', 'stationary' or {K} probabilities, not {initial!r}")
    law = np.asarray(initial, dtype=np.float64)
    if law.shape != (K,) or law.min() < 0 or abs(law.sum() - 1) > 1e-6:
        raise ValueError(f"initial must be 'visit start', 'stationary' or {K} probabilities")
    return law, np.zeros(K)


# ---------------------------------------------------------------------------------------------- the filter
#
# Hidden state: (circle i, revolutions m done in this visit, step j of the revolution), about 9000 at the default
# sizes. Emissions depend on (i, j) alone and a visit can only end with a revolution, so all states of circle i whose
# revolution began at the same time s share what they have seen since. Hence the usual forward recursion of an
# explicit-duration model (Yu 2010, Artificial Intelligence 174, 215-243) over the starts of visits and revolutions:
#
#   entry[s, i]       log p(a visit to i begins at s, x_{<s})
#   revolution[s, i]  log p(the period_i steps of x from s on | a revolution of circle i begins at s)
#   weight            log p(a revolution of i begins at s, x_{<s}) = logsumexp over m of
#                       entry[s - m period, i] + the m revolutions since + log P(R > m)
#   leave             the same with log P(R = m + 1): the visit ends with the revolution that begins at s
#
# and the posterior of (i, j) at t is proportional to exp(weight at t - j + log-likelihood of x_{t-j} … x_t). One step
# costs an addition a pair (i, j), 2200 by default, and the recursion once a circle, for the revolution that begins.
#
# Everything kept is a logarithm, never exponentiated before its own maximum is taken away. Nothing can underflow, so
# a state that a burst of outliers made hopeless is still there when the data come back to it.


class Tables(NamedTuple):
    """A Process in the form that the kernels read. M: the most revolutions of a visit."""

    periods: np.ndarray  # (K,)
    offsets: np.ndarray  # (K,) first of the period_i places of circle i among all pairs (i, j)
    cos: np.ndarray  # (2 * pairs,) the circle's points, two revolutions long: no index wraps around
    sin: np.ndarray
    gain: np.ndarray  # (K,) r / σ²
    half: np.ndarray  # (K,) r² / 2σ²
    log_transition: np.ndarray  # (K, K) from, to
    log_law: np.ndarray  # (K, M) log P(R = m + 1)
    log_survival: np.ndarray  # (K, M) log P(R > m)


class Run(NamedTuple):
    """What a filter run keeps. A pair's place is offsets[i] + (j - t) mod period_i: it stays put as time goes on."""

    entry: np.ndarray  # (n, K)
    revolution: np.ndarray  # (n + max period, K), row s + max period: those cut by the first or last step included
    past: np.ndarray  # (K,) log rate of the visits that began before the first step
    partial: np.ndarray  # (pairs,) log-likelihood since the revolution began
    weight: np.ndarray  # (pairs,)
    leave: np.ndarray  # (pairs,)
    exits: np.ndarray  # (pairs, Q) P(the visit ends with the q-th revolution from now | it is on)
    score: np.ndarray  # (pairs,) scratch
    scratch: np.ndarray


def tables(process):
    """Tables of a Process."""
    periods = process.periods.astype(np.int64)
    angles = [entry + 2 * np.pi / period * (np.arange(2 * period) % period)
              for entry, period in zip(process.entry_angles, periods, strict=True)]
    angles, variance = np.concatenate(angles), process.noise_std**2
    with np.errstate(divide="ignore"):
        return Tables(
            periods=periods, offsets=np.cumsum(periods) - periods, cos=np.cos(angles), sin=np.sin(angles),
            gain=process.radii / variance, half=process.radii**2 / (2 * variance),
            log_transition=np.log(process.transition_matrix), log_law=np.log(process.dwell_law),
            log_survival=np.log(survival(process)),
        )


def start_run(process, n_steps, initial, max_horizon):
    """A Run for n_steps steps, its past set to what `initial` says."""
    starts, past = initial_law(process, initial)
    periods, pairs = process.periods, int(process.periods.sum())
    M, Q = process.dwell_law.shape[1], -(-max_horizon // int(periods.min()))
    law = np.pad(process.dwell_law, ((0, 0), (0, Q)))
    ends = np.stack([law[:, q:q + M].sum(axis=1) for q in range(Q)] + [np.zeros(len(past))], axis=1)[:, :Q]
    with np.errstate(divide="ignore"):
        log_past, begins = np.log(past), np.log(past * survival(process).sum(axis=1))
        entry = np.full((n_steps, len(past)), -np.inf)
        entry[0] = np.log(starts)
    each = np.repeat(np.arange(len(past)), periods)
    return Run(
        entry=entry, revolution=np.zeros((n_steps + int(periods.max()), len(past))), past=log_past,
        partial=np.zeros(pairs), weight=begins[each], leave=log_past[each],
        exits=(ends / survival(process).sum(axis=1, keepdims=True))[each],
        score=np.empty(pairs), scratch=np.empty(max(M, len(past))),
    )


@numba.njit(nogil=True, cache=True)
def log_sum_exp(values):
    top = -np.inf
    for value in values:
        top = max(top, value)
    if top == -np.inf:
        return top
    total = 0.0
    for value in values:
        if value - top > NEGLIGIBLE:
            total += math.exp(value - top)
    return top + math.log(total)


@numba.njit(nogil=True, cache=True)
def log_add_exp(a, b):
    top, low = max(a, b), min(a, b)
    return top if low - top < NEGLIGIBLE or top == -np.inf else top + math.log1p(math.exp(low - top))


@numba.njit(nogil=True, cache=True)
def visits_on(tab, run, t, i, history):
    """history[m] = log p(a visit to i began m revolutions before t, x_{<t} given it lasts); -> how many m count."""
    period, pad = tab.periods[i], len(run.revolution) - len(run.entry)
    seen = 0.0
    for m in range(tab.log_law.shape[1]):
        s = t - m * period
        if m > 0 and s > -period:
            seen += run.revolution[s + pad, i]
        if s < 0 and run.past[i] == -np.inf:
            return m
        history[m] = seen + (run.entry[s, i] if s >= 0 else run.past[i])
    return tab.log_law.shape[1]


@numba.njit(nogil=True, cache=True)
def begin_revolutions(tab, run, t):
    """At each circle's place whose revolution ended before t: who leaves, who enters, what begins."""
    K, M = tab.log_law.shape
    pad = len(run.revolution) - len(run.entry)
    history, terms = np.empty(M), run.scratch
    leaving = np.empty(K)
    for i in range(K):
        place = tab.offsets[i] + (-t) % tab.periods[i]
        run.revolution[t - tab.periods[i] + pad, i] = run.partial[place]
        leaving[i] = run.leave[place] + run.partial[place]
    if t > 0:
        for k in range(K):
            for i in range(K):
                terms[i] = leaving[i] + tab.log_transition[i, k]
            run.entry[t, k] = log_sum_exp(terms[:K])
    for i in range(K):
        place = tab.offsets[i] + (-t) % tab.periods[i]
        n = visits_on(tab, run, t, i, history)
        run.partial[place] = 0.0
        for m in range(n):
            terms[m] = history[m] + tab.log_survival[i, m]
        run.weight[place] = weight = log_sum_exp(terms[:n])
        for m in range(n):
            terms[m] = history[m] + tab.log_law[i, m]
        run.leave[place] = log_sum_exp(terms[:n])
        if weight > -np.inf:
            for q in range(run.exits.shape[1]):
                run.exits[place, q] = 0.0
                for m in range(min(n, M - q)):
                    run.exits[place, q] += math.exp(history[m] + tab.log_law[i, m + q] - weight)


@numba.njit(nogil=True, cache=True)
def forward(tab, run, plane, baseline, first, log_evidence, posterior, phasor, flux):
    """Filter len(posterior) steps from step `first` on.

    plane (n, K, 2): x in the planes; baseline (n,), taken from every log-likelihood of a step. Fills log_evidence,
    log p(x_{<=t}) less the baselines so far, and adds to zeros, all times one factor a step: posterior (K,) over
    circles; phasor (K, 2), E[(cos θ, sin θ) on the circle]; flux (K, max horizon), P(the next visit begins r + 1
    steps on, after this circle).
    """
    K, horizon = flux.shape[1], flux.shape[2]
    for row in range(len(posterior)):
        t = first + row
        begin_revolutions(tab, run, t)
        top = -np.inf
        for i in range(K):
            period, a = tab.periods[i], tab.offsets[i]
            phase = t % period
            cos, sin = tab.cos[2 * a + phase:2 * a + phase + period], tab.sin[2 * a + phase:2 * a + phase + period]
            partial, weight, score = run.partial[a:a + period], run.weight[a:a + period], run.score[a:a + period]
            along, across = tab.gain[i] * plane[t, i, 0], tab.gain[i] * plane[t, i, 1]
            drop = tab.half[i] + baseline[t]
            for p in range(period):
                partial[p] += along * cos[p] + across * sin[p] - drop
                score[p] = partial[p] + weight[p]
            for p in range(period):
                top = max(top, score[p])
        total = 0.0
        for i in range(K):
            period, a = tab.periods[i], tab.offsets[i]
            phase = t % period
            for p in range(period):
                if run.score[a + p] - top > NEGLIGIBLE:
                    mass = math.exp(run.score[a + p] - top)
                    total += mass
                    posterior[row, i] += mass
                    phasor[row, i, 0] += mass * tab.cos[2 * a + phase + p]
                    phasor[row, i, 1] += mass * tab.sin[2 * a + phase + p]
                    left = period - (phase + p) % period
                    for q in range(run.exits.shape[1]):
                        if left + q * period <= horizon:
                            flux[row, i, left + q * period - 1] += mass * run.exits[a + p, q]
        log_evidence[row] = top + math.log(total)


@numba.njit(nogil=True, cache=True)
def backward(tab, run, log_evidence, occupancy):
    """occupancy[s + max period, i] = P(a revolution of circle i begins at s | all of x), from a finished run.

    The backward recursion over the same starts: rest[m] = log p(x_{>=s} | revolution m of a visit to i begins at s),
    after[e, i] = log p(x_{>=e} | a visit to i ended before e). The forward half needs only `entry` and
    `revolution`, a number a step and circle each, so that there is nothing to checkpoint.
    """
    K, M = tab.log_law.shape
    n, pad = len(run.entry), len(run.revolution) - len(run.entry)
    rest = np.empty((len(run.partial), M))
    after, begins, terms, history = np.empty((n, K)), np.empty(K), np.empty(K), np.empty(M)
    for s in range(n - 1, -pad, -1):
        for i in range(K):
            period = tab.periods[i]
            if s <= -period or (s < 0 and run.past[i] == -np.inf):
                continue
            place, end = tab.offsets[i] + (-s) % period, s + period
            if end >= n:  # cut by the end of the series: `forward` had no occasion to store it
                run.revolution[s + pad, i] = run.partial[place]
            counts = visits_on(tab, run, s, i, history)
            for m in range(M):
                log_survival = tab.log_survival[i, m]
                if log_survival == -np.inf:
                    rest[place, m] = -np.inf
                    continue
                value = run.revolution[s + pad, i]
                if end < n:
                    stays = -np.inf
                    if m + 1 < M:
                        stays = tab.log_survival[i, m + 1] + rest[place, m + 1]
                    value += log_add_exp(stays, tab.log_law[i, m] + after[end, i]) - log_survival
                rest[place, m] = value
                if m < counts:
                    occupancy[s + pad, i] += math.exp(history[m] + log_survival + value - log_evidence)
            begins[i] = rest[place, 0]
        if s >= 0:
            for i in range(K):
                for k in range(K):
                    terms[k] = tab.log_transition[i, k] + begins[k]
                after[s, i] = log_sum_exp(terms)


def in_planes(process, X):
    """What the kernels need of X (n, feature_dim): plane (n, K, 2), its coordinates; baseline (n,); norm2 (n,).

    The log-likelihood of a step is that of x given the point of the circle over that of x given the origin. The
    baseline, its maximum over all points of all circles, is taken away: sums over a long series stay small.
    """
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or X.shape[1] != process.feature_dim or len(X) == 0:
        raise ValueError(f"X must be (n_steps, {process.feature_dim}), not {X.shape}")
    if not np.isfinite(X).all():
        raise cli.UserError("the series holds NaN or infinity; the filter needs finite numbers")
    plane = circle_process.plane_coordinates(process, X)
    length = np.hypot(plane[..., 0], plane[..., 1])
    baseline = ((process.radii * length - process.radii**2 / 2) / process.noise_std**2).max(axis=1)
    return plane, baseline, np.einsum("td,td->t", X, X)


def prediction_map(process, horizons):
    """The matrices that turn phasor and flux into E[x_{t+k}]: (K * 2, H * dim) and (K * max horizon, H * dim).

    If nobody left, x_{t+k} would be the phasor turned on by k steps. Whoever leaves r steps on adds the difference
    between what follows after leaving and that: what follows depends on the circle left and k - r alone.
    """
    K, dim, reach = process.n_circles, process.feature_dim, max(horizons, default=0)
    circles = np.arange(K)
    turn = 2 * np.pi * np.arange(reach + 1)[:, None] / process.periods
    staying = circle_process.points(process, circles, process.entry_angles + turn)  # (n, K, dim), n steps into a visit
    alive, law = survival(process), process.dwell_law
    begun = np.zeros((reach + 1, K, dim))  # E[x] n steps after a visit to i began
    left = np.zeros((reach + 1, K, dim))  # E[x] n steps after the end of a visit to i
    for n in range(reach):
        for i, period in enumerate(process.periods):
            done = n // period
            begun[n, i] = alive[i, done] * staying[n, i] if done < alive.shape[1] else 0.0
            for r in range(1, min(done, law.shape[1]) + 1):
                begun[n, i] += law[i, r - 1] * left[n - r * period, i]
        left[n] = process.transition_matrix @ begun[n]
    by_phasor, by_flux = np.zeros((K, 2, len(horizons), dim)), np.zeros((K, reach, len(horizons), dim))
    for h, k in enumerate(horizons):
        by_phasor[:, 0, h] = circle_process.points(process, circles, turn[k])
        by_phasor[:, 1, h] = circle_process.points(process, circles, turn[k] + np.pi / 2)
        for r in range(1, k + 1):
            by_flux[:, r - 1, h] = left[k - r] - staying[k - r]
    width = len(horizons) * dim
    return by_phasor.reshape(K * 2, width), by_flux.reshape(K * reach, width)


def filter_blocks(process, tab, maps, run, plane, baseline, horizons):
    """Filter a series block by block; yields (first, log_evidence, posterior, prediction (b, H, dim))."""
    K, reach, n = process.n_circles, max(horizons, default=0), len(plane)
    for first in range(0, n, BLOCK):
        b = min(BLOCK, n - first)
        evidence, posterior, phasor = np.empty(b), np.zeros((b, K)), np.zeros((b, K, 2))
        flux = np.zeros((b, K, reach))
        forward(tab, run, plane, baseline, first, evidence, posterior, phasor, flux)
        total = posterior.sum(axis=1, keepdims=True)
        prediction = (phasor.reshape(b, K * 2) @ maps[0] + flux.reshape(b, K * reach) @ maps[1]) / total
        yield first, evidence, posterior / total, prediction.reshape(b, len(horizons), process.feature_dim)


def step_log_likelihood(process, evidence, baseline, norm2):
    """log p(x_t | x_1 … x_{t-1}) in nats, (n,), from what `forward` accumulated."""
    constant = 0.5 * process.feature_dim * math.log(2 * math.pi * process.noise_std**2)
    return np.diff(evidence, prepend=0.0) + baseline - norm2 / (2 * process.noise_std**2) - constant


def check_horizons(horizons):
    horizons = [int(k) for k in horizons]
    if min(horizons, default=1) < 1:
        raise ValueError(f"horizons must be 1 or more, not {horizons}")
    return horizons


def predict(process, X, horizons=(1,), initial="visit start", keep_predictions=True):
    """Filter X (n_steps, feature_dim) and predict it `horizons` steps ahead, in float64.

    initial: "visit start", a visit to a circle chosen uniformly begins at the first step (how the generator
    starts); K probabilities, the same with another law; "stationary", X was cut out of a long series anywhere.

    Returns a dict: `prediction` {k: (n, feature_dim)}, row t being E[x_{t+k} | x_1 … x_t] (without
    keep_predictions None, which saves its memory); `squared_error` {k: (n - k,)}, row t the mean over features of
    (x_{t+k} - prediction)²; `circle_posterior` (n, K), given x_1 … x_t; `log_likelihood` (n,), of x_t given
    x_1 … x_{t-1}, in nats.
    """
    horizons, n = check_horizons(horizons), len(X)
    plane, baseline, norm2 = in_planes(process, X)
    run = start_run(process, n, initial, max(horizons, default=0))
    evidence, posterior = np.empty(n), np.empty((n, process.n_circles))
    kept = {k: np.empty((n, process.feature_dim)) for k in horizons} if keep_predictions else None
    errors = {k: np.empty(max(n - k, 0)) for k in horizons}
    maps = prediction_map(process, horizons)
    for first, block_evidence, block_posterior, prediction in filter_blocks(
            process, tables(process), maps, run, plane, baseline, horizons):
        last = first + len(block_posterior)
        evidence[first:last], posterior[first:last] = block_evidence, block_posterior
        for h, k in enumerate(horizons):
            if keep_predictions:
                kept[k][first:last] = prediction[:, h]
            stop = max(min(last, n - k), first)
            error = X[first + k:stop + k] - prediction[:stop - first, h]
            errors[k][first:stop] = np.einsum("td,td->t", error, error) / process.feature_dim
    return {"prediction": kept, "squared_error": errors, "circle_posterior": posterior,
            "log_likelihood": step_log_likelihood(process, evidence, baseline, norm2)}


def window_mse(process, series, starts, seq_len, horizons=(1,)):
    """The floor of a model that sees one window at a time: {k: mean squared error}.

    The filter begins each window X[start : start + seq_len] anew, knowing only that it was cut out of a long series
    (stationary prior). The mean is over windows, features, and the positions t = 0 … seq_len - 1 - k whose target
    t + k lies in the window: the targets of the model's own loss. starts: (n,) first steps.
    """
    horizons = check_window(series, starts, seq_len, horizons)
    tab, maps = tables(process), prediction_map(process, horizons)

    def window_errors(start):
        X = series.X[start:start + seq_len]
        plane, baseline, _ = in_planes(process, X)
        run = start_run(process, seq_len, "stationary", max(horizons))
        blocks = filter_blocks(process, tab, maps, run, plane, baseline, horizons)
        prediction = np.concatenate([block[-1] for block in blocks])
        errors = [np.mean((X[k:] - prediction[:seq_len - k, h])**2) for h, k in enumerate(horizons)]
        dataset.release(X)
        return errors

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the kernels release the interpreter lock
        errors = np.mean(list(pool.map(window_errors, np.asarray(starts).tolist())), axis=0)
    return dict(zip(horizons, errors.tolist(), strict=True))


def check_window(series, starts, seq_len, horizons):
    horizons = check_horizons(horizons)
    if len(starts) == 0 or min(starts) < 0 or max(starts) + seq_len > series.n_steps:
        raise ValueError(f"windows of {seq_len} steps must lie in the series of {series.n_steps}")
    if not horizons or max(horizons) >= seq_len:
        raise ValueError(f"horizons {horizons} must be shorter than the window, {seq_len} steps")
    return horizons


def smooth(process, X, initial="visit start"):
    """The hidden states of X (n_steps, feature_dim) given all of it (forward-backward).

    Returns a dict: `circle_posterior` (n, K); `circle` (n,) int, the likeliest one at each step; `theta` (n,)
    radians in [0, 2π), its mean angle on that circle. So that a series that may leave the process can be judged:
    `log_likelihood` (n,) of x_t given x_1 … x_{t-1}, in nats, and `distance` (n,) from x_t to the nearest point of
    any circle (noise_std * sqrt(feature_dim - 1), about, when x_t belongs to the process).

    Memory: a few arrays of (n, K). `initial` as in `predict`; "stationary" for a series that begins anywhere.
    """
    plane, baseline, norm2 = in_planes(process, X)
    n, K = len(X), process.n_circles
    tab, run = tables(process), start_run(process, n, initial, 0)
    evidence = np.concatenate([block[1] for block in filter_blocks(
        process, tab, prediction_map(process, ()), run, plane, baseline, ())])
    pad = int(process.periods.max())
    occupancy = np.zeros((n + pad, K))
    backward(tab, run, evidence[-1], occupancy)

    # A step belongs to the revolution that began at most period - 1 steps before: sums over a sliding window.
    turn = 2 * np.pi / process.periods * (np.arange(-pad, n)[:, None] % process.periods)
    posterior, phasor = sliding_sum(occupancy, process.periods), np.exp(-1j * turn)
    phasor = sliding_sum(occupancy * phasor, process.periods) * np.exp(1j * (process.entry_angles + turn[pad:]))
    posterior = np.maximum(posterior, 0)
    posterior /= posterior.sum(axis=1, keepdims=True)
    circle = posterior.argmax(axis=1)
    return {"circle_posterior": posterior, "circle": circle,
            "theta": np.angle(phasor[np.arange(n), circle]) % (2 * np.pi),
            "log_likelihood": step_log_likelihood(process, evidence, baseline, norm2),
            "distance": circle_process.distance(process, X)}


def sliding_sum(values, widths):
    """Sums of values (pad + n, K) over the last widths[i] <= pad rows of column i, for the last n rows."""
    total = np.concatenate([np.zeros((1, values.shape[1]), values.dtype), np.cumsum(values, axis=0)])
    pad = int(widths.max())
    return np.stack([total[pad + 1:, i] - total[pad + 1 - width:len(total) - width, i]
                     for i, width in enumerate(widths)], axis=1)


# ---------------------------------------------------------------------------------------------- the script


def draw(path, report, posterior, states, start):
    """Circle posterior over a stretch of time with the true circles above it, and error against horizon."""
    K = posterior.shape[1]
    fig, axes = figures.new_figure(3, 1, panel=(9.0, 2.4), title="Bayes-optimal filter",
                                   gridspec_kw={"height_ratios": [0.12, 1, 1]})
    strip, heat, curve = axes[:, 0]
    figures.state_strip(strip, states, K, start=start, label="true circle")
    figures.heatmap_panel(fig, heat, posterior, start=start, ylabel="circle", unit="P(circle | past)",
                          cmap="Greys", limits=(0, 1))
    heat.set_xlabel("time step")
    figures.circle_legend(fig, K)
    horizons = [row["horizon"] for row in report["horizons"]]
    for key, label, marker in (("mse", "whole series", "o"), ("val_mse", "validation part", "s"),
                               ("val_window_mse", f"windows of {report['seq_len']} steps", "^")):
        curve.plot(horizons, [row[key] for row in report["horizons"]], marker=marker, markersize=4, label=label)
    curve.axhline(report["noise_floor"], color="0.4", linestyle="--", label="noise floor")
    curve.set_xscale("log", base=2)
    curve.set_xticks(horizons, [str(k) for k in horizons])
    curve.minorticks_off()
    curve.set(xlabel="horizon (steps)", ylabel="mean squared error")
    curve.legend()
    figures.save(fig, path)


def main(args):
    save_dir = cli.output_folder(args.save_dir)
    series = dataset.load_series(args.data_dir)
    process = process_from_series(series)
    _, windows, boundary = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)

    filtered = predict(process, series.X, args.horizons, keep_predictions=False)
    smoothed = smooth(process, series.X)
    in_windows = window_mse(process, series, windows, args.seq_len, args.horizons)
    right = filtered["circle_posterior"].argmax(axis=1) == series.states
    right_smoothed = smoothed["circle"] == series.states

    report = {
        "noise_floor": process.noise_std**2,
        "planes_recovered": series.planes is None,
        "n_steps": series.n_steps, "first_validation_step": boundary, "seq_len": args.seq_len, "stride": args.stride,
        "horizons": [{"horizon": k, "mse": float(errors.mean()), "val_mse": float(errors[boundary:].mean()),
                      "val_window_mse": in_windows[k]} for k, errors in filtered["squared_error"].items()],
        "circle_accuracy": float(right.mean()), "val_circle_accuracy": float(right[boundary:].mean()),
        "smoothed_circle_accuracy": float(right_smoothed.mean()),
        "log_likelihood_per_step": float(filtered["log_likelihood"].mean()),
    }
    print(f"noise floor (noise_std²): {report['noise_floor']:.4f}\n")
    if report["planes_recovered"]:
        excess = report["noise_floor"] * process.n_circles * (2 * process.feature_dim - 3) / series.X.size
        print("data.npz has no planes: recovered from the same data, which makes the errors below too low "
              f"by about {excess:.1e}\n")
    print("mean squared error of the Bayes-optimal prediction")
    print(cli.table(["horizon", "whole series", "validation", f"windows of {args.seq_len}"], [
        [row["horizon"], *(f"{row[key]:.4f}" for key in ("mse", "val_mse", "val_window_mse"))]
        for row in report["horizons"]], align="rrrr"))
    print(f"\ncircle accuracy: {report['circle_accuracy']:.3%} from the past, "
          f"{report['smoothed_circle_accuracy']:.3%} from the whole series")
    print(f"log-likelihood: {report['log_likelihood_per_step']:.4f} nats a step\n")

    cli.write_text(save_dir / "optimal_filter.json", json.dumps(report, indent=2) + "\n")
    print(f"wrote {save_dir / 'optimal_filter.json'}")
    stretch = slice(boundary, boundary + 4000)
    draw(save_dir / "optimal_filter.png", report, filtered["circle_posterior"][stretch], series.states[stretch],
         boundary)


if __name__ == "__main__":
    # Under its own name: the kernels' arguments are typed by module, and numba can't find those of `__main__` in its
    # cache on disk.
    import optimal_filter

    cli.run(optimal_filter.main, parse_args())
