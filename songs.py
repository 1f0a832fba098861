"""Is a generated series a song of the process? The exact smoother judges it, and only where it can.

A song is a series that a model generates from a seed, a stretch of the real series. The smoother
(`optimal_filter.smooth`) gives each step of seed and song a circle and an angle, and so a point: the path. Whatever
the series, the smoother finds some path. A step counts as on the process when the series keeps to it: when the mean of
|x - path|² over a window of half the shortest period is not larger than noise alone makes it. On a series of the
process, |x - path|² / noise_std² summed over the window follows a chi-square law with one degree of freedom per step
and feature. So the share of its steps that count as off is known: FALSE_ALARM. (Fewer where the circles' centre walks:
the smoother finds the centre from the same steps.)

Only where a song is on the process are circles, transitions and dwell times counted, and a transition or the beginning
of a visit only where it is on the process on both sides. The smoother's prior forbids some things, for instance to
stay on a circle longer than any visit lasts. In a song that does them, it invents transitions, but no step near these
is on the process.

The path is the best one for the whole series. Where a song does what is impossible, leaving a circle in the middle of a
revolution for example, the best path may give up steps before it that looked right until then; these count as off too.
The log-likelihood of a step, given only what was before it, blames the later steps instead.

No function here needs the model: a real series, or noise, can be judged as a song too.
"""

import math

import numpy as np
from scipy.special import chdtri

import circle_process
import measures
import optimal_filter
import terminal

FALSE_ALARM = 1e-5  # the share of the steps of a real series that count as off the process
BLOCK = 2**15  # steps smoothed at a time, at least: bounds the memory for long songs
CLOCK_SHOWN = 3  # the most steps by which the end of a visit misses that of a revolution that a summary counts
COURSE = 20  # steps, at most, that must keep to a circle's course where a visit to it begins
BAND_DRAWS, DWELL_DRAWS = 2000, 999  # simulations for the band of total variation and the test of the dwell times
ERROR_BATCH = 100  # steps whose mean counts as one independent number in a standard error


# ------------------------------------------------------------------------------------------------- step by step


def window_length(process):
    """Steps of the window over which a series must keep to its path: half the shortest period."""
    return max(int(process.periods.min()) // 2, 1)


def largest_deviation(process, window):
    """The RMS deviation per feature, in data units, above which a window of so many steps is off the process."""
    degrees = window * process.feature_dim
    return process.noise_std * math.sqrt(chdtri(degrees, FALSE_ALARM) / degrees)


def analyse(process, seeds, generated):
    """What the exact smoother makes of songs: seeds (n, seed_len, features), generated (n, n_steps, features).

    Returns a dict of arrays. Per generated step, (n, n_steps): labels and thetas, its circle and its angle in radians,
    given seed and song; deviation, the RMS over features and the window around it of the distance to the path, in data
    units; on, whether that is what noise can do; log_likelihood, of the step given all before it, in nats. And visits,
    (n_visits, 6) int, as `visit_table` describes them, and `clock_errors`, of seed and song, one after the other.
    """
    seed_len, names = seeds.shape[1], ("labels", "thetas", "log_likelihood", "squared")
    n, n_steps = len(seeds), seed_len + generated.shape[1]
    steps = {name: np.empty((n, n_steps), np.int32 if name == "labels" else np.float64) for name in names}
    jobs = [(i, *block) for i in range(n) for block in overlapping_blocks(process, n_steps)]

    def judge(job):
        sample, first, last, low, high = job
        X = np.concatenate([seeds[sample, low:high], generated[sample, max(low - seed_len, 0):max(high - seed_len, 0)]])
        smoothed = optimal_filter.smooth(process, X, initial="stationary")
        path = smoothed["center"] + circle_process.points(process, smoothed["circle"], smoothed["theta"])
        values = (smoothed["circle"], smoothed["theta"], smoothed["log_likelihood"], ((X - path)**2).sum(axis=1))
        for name, array in zip(names, values, strict=True):
            steps[name][sample, first:last] = array[first - low:last - low]
        bar.update(last - first)

    with terminal.Bar(n * n_steps, desc="exact smoother") as bar:
        optimal_filter.on_all_cores(judge, jobs)
    window = min(window_length(process), n_steps)
    deviation = np.stack([np.sqrt(window_mean(row, window) / process.feature_dim) for row in steps.pop("squared")])
    on = deviation <= largest_deviation(process, window)
    visits = [visit_table(labels, row, seed_len) for labels, row in zip(steps["labels"], on, strict=True)]
    samples = np.repeat(np.arange(n), [len(rows) for rows in visits])
    return {**{name: array[:, seed_len:] for name, array in steps.items()}, "deviation": deviation[:, seed_len:],
            "on": on[:, seed_len:], "visits": np.column_stack([samples, np.concatenate(visits)]),
            "clock_errors": np.concatenate([clock_errors(process, np.concatenate(parts))
                                            for parts in zip(seeds, generated, strict=True)])}


def overlapping_blocks(process, n_steps):
    """Blocks (first, last, low, high) of a series: what the smoother finds for low … high - 1 is kept for the steps
    first … last - 1.

    On each side it sees as many steps more as two of the longest visits last. At least one whole visit lies in these,
    and what was before its beginning tells nothing about what comes after.
    """
    revolutions = np.where(process.dwell_law > 0, np.arange(1, process.dwell_law.shape[1] + 1), 0).max(axis=1)
    overlap = 2 * int((revolutions * process.periods).max())
    size = max(BLOCK, 4 * overlap)
    for first in range(0, n_steps, size):
        last = min(first + size, n_steps)
        yield first, last, max(first - overlap, 0), min(last + overlap, n_steps)


def window_mean(values, window):
    """Means of values (n,) over windows of so many steps around each; those at the ends are moved inside."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(len(values)) - window // 2, 0, len(values) - window)
    return np.maximum(total[first + window] - total[first], 0) / window


def visit_table(labels, on, seed_len):
    """The visits of a series that have steps after the seed: (n_visits, 5) int.

    The columns: circle; first step and the step after the last, counted from the end of the seed; entered and left, 1
    where the visit before and the visit after were seen to adjoin, both on the process. labels, on: (n_steps,).
    """
    shown = np.where(on, labels, -1)
    starts = np.flatnonzero(np.diff(shown, prepend=-2))
    circles, ends = shown[starts], np.append(starts[1:], len(shown))
    adjoins = (circles[:-1] >= 0) & (circles[1:] >= 0)
    entered, left = np.append(False, adjoins), np.append(adjoins, False)
    table = np.column_stack([circles, starts - seed_len, ends - seed_len, entered, left])
    return table[(circles >= 0) & (ends > seed_len)]


# ------------------------------------------------------------------------------------------------- transitions


def transition_counts(visits, n_circles):
    """How often each circle follows each other one: (K, K) int, row: from, column: to; visits as from `analyse`."""
    counts = np.zeros((n_circles, n_circles), dtype=np.int64)
    before = np.flatnonzero(visits[:-1, 5])  # the next row is the visit that adjoins
    np.add.at(counts, (visits[before, 1], visits[before + 1, 1]), 1)
    return counts


def total_variation(counts, P):
    """Total variation distance of each row of observed transitions from that of P: (K,), NaN for rows never left."""
    left = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left > 0, np.abs(counts / left[:, None] - P).sum(axis=1) / 2, np.nan)


def chance_total_variation(left, P, seed=0):
    """The total variation that the true process itself shows when row i is left left[i] times, from simulations.

    Returns two arrays (K + 1, 3), NaN for rows never left: mean and both ends of the central 95 % of each row, and
    last, of all rows together, each counting by how often it was left.
    """
    left, rng = np.asarray(left), np.random.default_rng(seed)
    distances = np.empty((BAND_DRAWS, len(P) + 1))  # times how often the row was left
    for i, (n, row) in enumerate(zip(left, P / P.sum(axis=1, keepdims=True), strict=True)):
        distances[:, i] = np.abs(rng.multinomial(n, row, BAND_DRAWS) - n * row).sum(axis=1) / 2
    distances[:, -1] = distances[:, :-1].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        distances /= np.append(left, left.sum())
    return np.column_stack([distances.mean(axis=0), *np.quantile(distances, (0.025, 0.975), axis=0)])


# ------------------------------------------------------------------------------------------------- dwell times


def completed_dwells(visits):
    """Circles and lengths (steps) of the visits whose first and last step were both seen, after the seed."""
    whole = visits[(visits[:, 4] == 1) & (visits[:, 5] == 1) & (visits[:, 2] >= 0)]
    return whole[:, 1], whole[:, 3] - whole[:, 2]


def dwell_time_law(process, circles):
    """The true law of the dwell times of visits to `circles`: possible lengths (steps) and their probabilities."""
    revolutions = np.arange(1, process.dwell_law.shape[1] + 1)
    lengths = process.periods[circles][:, None] * revolutions
    values, index = np.unique(lengths, return_inverse=True)
    total = np.bincount(index.ravel(), process.dwell_law[circles].ravel(), len(values))
    return values, total / max(len(circles), 1)


def mean_dwell_of_law(process):
    """The mean dwell time of all visits in the long run, in steps."""
    return 1 / circle_process.entry_rates(process).sum()


def revolution_ends(process, visits):
    """How often a visit was seen to have done m revolutions, and how often it ended there: two (K, M + 1) int arrays.

    Column m - 1 is that of m; the last column is for what the law excludes, more than M revolutions. Only visits that
    were seen to begin count. A visit whose end wasn't seen counts for the revolutions after which it was seen to go on;
    so does one that began in the seed, for those that ended after it.
    """
    M = process.dwell_law.shape[1]
    at_risk, ended = np.zeros((process.n_circles, M + 1), np.int64), np.zeros((process.n_circles, M + 1), np.int64)
    for _, circle, first, end, _, left in visits[visits[:, 4] == 1].tolist():
        period = int(process.periods[circle])
        done = max(1, round((end - first) / period)) if left else (end - first - 1) // period
        seen = max(0, -(first // period)) if first < 0 else 1  # the first revolution that ends after the seed
        if done >= seen:
            at_risk[circle, min(seen, M + 1) - 1:min(done, M + 1)] += 1
            ended[circle, min(done, M + 1) - 1] += left
    return at_risk, ended


def dwell_p_value(process, visits, seed=0):
    """How likely the process itself is to have dwell times as far from their law: a p-value, or None without any.

    At the end of revolution m of a visit to circle i, the visit ends with probability P(R = m) / P(R >= m), whatever
    was before. So what was seen is a series of independent decisions, and those that weren't seen can be left out
    (Cox 1972, "Regression models and life-tables", section 6, for the discrete law). The statistic is the deviance of
    the numbers of visits that ended from these probabilities, pooled over circles and revolutions; its law comes from
    DWELL_DRAWS simulations (Barnard 1963). So the smallest value is 1 / (DWELL_DRAWS + 1), or 0 where something
    happened that the law excludes.
    """
    at_risk, ended = revolution_ends(process, visits)
    alive = circle_process.survival(process)
    hazard = np.divide(process.dwell_law, alive, out=np.ones_like(alive), where=process.dwell_law < alive)
    if at_risk[:, -1].any():
        return 0.0
    n, k = at_risk[:, :-1], ended[:, :-1]
    if (k[hazard == 0] > 0).any() or (k < n)[hazard == 1].any():
        return 0.0
    open_to_chance = (n > 0) & (hazard > 0) & (hazard < 1)
    if not open_to_chance.any():
        return None
    n, k, hazard = n[open_to_chance], k[open_to_chance], hazard[open_to_chance]
    draws = np.random.default_rng(seed).binomial(n, hazard, (DWELL_DRAWS, len(n)))
    as_far = deviance(draws, n, hazard) >= deviance(k, n, hazard) - 1e-9
    return float((1 + as_far.sum()) / (DWELL_DRAWS + 1))


def deviance(k, n, p):
    """Twice the log-likelihood ratio of k successes of n, each at its own rate, against the rates p; sums over the
    last axis."""
    def term(count, expected):
        return count * np.log(np.where(count > 0, count, 1) / expected)

    return 2 * (term(k, n * p) + term(n - k, n * (1 - p))).sum(axis=-1)


# ------------------------------------------------------------------------------------------------- the clock


def clock_errors(process, X):
    """By how many steps visits in X (n_steps, feature_dim) missed the end of a revolution when they ended: (n,) int.

    A visit may end after any whole number of revolutions, and only there. The smoother knows that, and calls a visit
    impossible that ends one step early; this follows the series without it, from one visit to the next. Two steps
    behind each other that are off the course of a circle (with probability FALSE_ALARM each, when they are not) show
    that the visit is over; the next visit began at that step near these, and on that circle, from where both courses
    together fit best. Where none fits, the series is followed again from the next visit that does; the first visit
    that is found this way doesn't count, because its beginning is not known to the step; nor does one after which the
    series goes on elsewhere. Circles that move have no
    course that is known in advance: there are no errors of theirs.
    """
    if optimal_filter.moves(process):
        return np.zeros(0, dtype=np.int64)
    errors, begin, circle, exact, n = [], 0, None, False, len(X)
    seen_as = X, circle_process.plane_coordinates(process, X)
    circles, course = np.arange(process.n_circles)[:, None], min(COURSE, int(process.periods.min()))
    longest = int((process.periods * (process.dwell_law > 0).sum(axis=1)).max())
    at_step, over_course = (chdtri(steps * process.feature_dim, FALSE_ALARM) / steps for steps in (1, course))
    while begin + course <= n:
        if circle is None:  # which circle's course the next steps keep to, entered at one of them
            begins = np.arange(begin, min(begin + course, n - course + 1))
            fits = np.stack([off_course(process, seen_as, circles, t, np.arange(t, t + course)).mean(axis=1)
                             for t in begins])
            t, i = np.unravel_index(fits.argmin(), fits.shape)
            if fits[t, i] > over_course:
                begin = int(begins[-1]) + 1
                continue
            begin, circle, exact = int(begins[t]), int(i), False
        off_by = off_course(process, seen_as, circle, begin, np.arange(begin, min(begin + longest + course, n)))
        off = off_by > at_step
        over = int((off[:-1] & off[1:]).argmax())
        first, last = max(over - course, 1), over + course
        if begin + last > n:
            break
        if not off[over]:  # longer than any visit of the process: what comes then is followed anew
            begin, circle = begin + len(off), None
            continue

        # The old course until t, and from there on that of circle i, entered at t; all over the steps first … last - 1.
        steps, ends = np.arange(first, last), np.arange(first, over + 2)
        old = np.cumsum(off_by[first - 1:over + 1]) - off_by[first - 1]
        new = off_course(process, seen_as, circles[:, None], begin + ends[:, None], begin + steps)
        new = np.where(steps >= ends[:, None], new, 0.0)
        total = old + new.sum(axis=2)
        total[circle] = np.inf
        i, t = np.unravel_index(total.argmin(), total.shape)
        lasted, period = int(ends[t]), int(process.periods[circle])
        fits = new[i, t].sum() / (last - lasted) <= over_course
        if exact and fits:
            errors.append(lasted - max(1, round(lasted / period)) * period)
        begin, circle, exact = (begin + lasted, int(i), True) if fits else (begin + lasted + 1, None, False)
    return np.array(errors, dtype=np.int64)


def off_course(process, seen_as, circles, begins, steps):
    """|x - point|² / noise_std² at the given steps for visits to circles that were entered at the steps `begins`.

    seen_as: X and its `circle_process.plane_coordinates`; circles, begins, steps: arrays that broadcast.
    """
    X, plane = seen_as
    angles = process.entry_angles[circles] + 2 * np.pi / process.periods[circles] * (steps - begins)
    x, radii = plane[steps, circles], process.radii[circles]
    along = np.cos(angles) * x[..., 0] + np.sin(angles) * x[..., 1]
    norm2 = np.einsum("...d,...d->...", X[steps], X[steps])
    return (norm2 - 2 * radii * along + radii**2) / process.noise_std**2


# ------------------------------------------------------------------------------------------------- a summary


def steps_until_off(on, patience):
    """Steps before the first `patience` consecutive ones that are off the process; on (n,) bool. All of them if there
    are none."""
    off_in_a_row = 0
    for t, is_on in enumerate(on.tolist()):
        off_in_a_row = 0 if is_on else off_in_a_row + 1
        if off_in_a_row == patience:
            return t + 1 - patience
    return len(on)


def mean_and_error(values):
    """The mean of values (n, n_steps), neighbours dependent, and its standard error from the means of batches."""
    batches = np.concatenate([np.add.reduceat(row, np.arange(0, len(row), ERROR_BATCH)) for row in values])
    sizes = np.concatenate([np.diff(np.append(np.arange(0, len(row), ERROR_BATCH), len(row))) for row in values])
    return measures.ratio_and_error(batches, sizes)


@terminal.busy("the songs in numbers")
def summarise(process, song):
    """The numbers of a song, over all its samples, as a dict of plain values; None for what was never seen."""
    P, on, visits = process.transition_matrix, song["on"], song["visits"]
    counts = transition_counts(visits, process.n_circles)
    left = counts.sum(axis=1)
    distances, chance = total_variation(counts, P), chance_total_variation(left, P)
    _, dwells = completed_dwells(visits)
    log_likelihood, error = mean_and_error(song["log_likelihood"])
    patience = window_length(process)
    return {
        "steps": int(on.shape[1]),
        "share_on_process": float(on.mean()),
        "steps_on_process": [steps_until_off(row, patience) for row in on],
        "log_likelihood": log_likelihood,
        "log_likelihood_error": error,
        "circles_visited": len(np.unique(visits[:, 1])),
        "transitions": int(left.sum()),
        "total_variation": float(np.nansum(distances * left) / left.sum()) if left.sum() else None,
        "total_variation_by_chance": numbers(chance[-1, 0]),
        "total_variation_band": numbers(chance[-1, 1:]),
        "transition_counts": counts.tolist(),
        "transitions_per_circle": left.tolist(),
        "total_variation_per_circle": numbers(distances),
        "total_variation_band_per_circle": numbers(chance[:-1, 1:]),
        "completed_visits": len(dwells),
        "mean_dwell": float(dwells.mean()) if len(dwells) else None,
        "dwell_p_value": dwell_p_value(process, visits),
        "visit_ends": len(song["clock_errors"]),
        "visit_ends_within": [float((np.abs(song["clock_errors"]) <= steps).mean()) for steps in range(CLOCK_SHOWN + 1)]
        if len(song["clock_errors"]) else None,
    }


def numbers(values):
    """An array as nested lists of plain numbers, or one number; None where it is NaN."""
    values = np.asarray(values)
    if values.ndim:
        return [numbers(value) for value in values]
    return None if np.isnan(values) else float(values)
