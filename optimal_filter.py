"""The exact floor: the Bayes-optimal predictor of the generator, and the states it infers.

The generator is a hidden semi-Markov process whose parameters are known, so E[x_{t+k} | x_1 … x_t] can be computed
exactly. No predictor that sees the same past can have a lower expected mean squared error. Reads
DATA_DIR/data.npz and config.json; prints the noise floor noise_std², the mean squared error of the filter per horizon,
and how often it names the true circle; writes SAVE_DIR/optimal_filter.json and optimal_filter.png
(with flags that aren't the default and the name of the data's folder where that isn't data/, as in
optimal_filter_seq_len512_subspace4.json).

When the circles move (--center-walk-std, --drift), the filter of moving_filter.py takes its place, which merges and
drops hidden paths; the report tells by how much the errors change when more are kept and, when the centre walks, the
error of an observer who is told circle and phase.

The error is given three times: over the whole series; over its validation part; and over windows of --seq-len steps
in the validation part, where the filter starts each window without any past. The last is the floor of a model that
sees one window at a time, averaged over the same targets as the model's validation loss. Beside it stands the second
floor, that of an observer who isn't told the process but has to learn it from the labelled training steps (learned.py).

Examples:
  python optimal_filter.py --data-dir data
  python optimal_filter.py --data-dir data --horizons 1,2,4,8 --seq-len 512 --save-dir plots
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

import circle_process
import dataset
import floor_cache
import learned
import moving_filter
import terminal
from circle_process import entry_rates, survival
from cli import WINDOW_DEFAULTS
from kernels.numba_cache import njit
from moving_filter import MovingFilter

figures = cli.imported_when_used("figures")  # matplotlib takes half a second, which --help need not wait for

BLOCK = 1024  # steps filtered at a time: bounds the memory for predictions, large enough for an efficient GEMM
MOST_REVOLUTIONS = 10_000  # per visit: the work per step grows with it
MOST_STATES = 1_000_000  # phases times revolutions: the memory grows with it
LEAST_NOISE = 1e-30  # below, the variance leaves float64
WIDE = 100.0  # how far the centre may be that nothing is known about, in units of the largest point of a circle
COST_WINDOWS = 32  # about so many windows tell what a MovingFilter's limits cost
UNKNOWN = -1.0  # in place of a probability that nobody has asked for yet
STRETCH = 50_000  # steps, about, that one thread filters of a long series
FORGOTTEN = 1e-8  # how far two threads may be apart where they meet, absolutely and relatively
CHECKED_STRETCHES, CHECKED_STEPS = 8, 512  # of the series, whose likelihood is compared with the process's
NEGLIGIBLE = -45.0  # exp(-45) < 3e-20: adding it to a sum that holds a 1 changes nothing in float64


def horizon_list(text):
    """`1,2,4` as a sorted list of distinct steps ahead."""
    return sorted({cli.positive_int(part) for part in text.split(",")})


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    targets = parser.add_argument_group("what is predicted")
    targets.add_argument("--val-fraction", type=cli.fraction, default=WINDOW_DEFAULTS["val_fraction"],
                         metavar="F", help="part of the series, at its end, that is validation")
    targets.add_argument("--horizons", type=horizon_list, default="1,2,4,8,16,32,64", metavar="K,K,…",
                         help="steps ahead to predict")
    targets.add_argument("--seq-len", type=cli.positive_int, default=WINDOW_DEFAULTS["seq_len"], metavar="N",
                         help="steps per window that starts without a past")
    targets.add_argument("--stride", type=cli.positive_int, default=WINDOW_DEFAULTS["stride"], metavar="N",
                         help="steps between the starts of these windows")
    cli.add_drawing(parser)
    files = parser.add_argument_group("files")
    cli.add_data_dir(files)
    cli.add_save_dir(files)
    args = parser.parse_args(argv)
    args.name = cli.named_after("optimal_filter", parser, args)
    if args.seq_len <= max(args.horizons):
        parser.error(f"--seq-len {args.seq_len} must be longer than the largest of --horizons, {max(args.horizons)}")
    return args


# ------------------------------------------------------------------------------------------------- the process


def process_from_series(series):
    """The Process that made a `dataset.Series`, with the dwell law that config.json gives.

    Planes that the file lacks are recovered from its arrays. Raises cli.UserError for data whose process isn't known
    or isn't theirs, for data without noise, when config.json lacks what is needed, and when there
    are too many hidden states.
    """
    if series.process is None:
        raise cli.UserError("the exact filter needs the process that made the data, and these come without one")
    config = series.config
    noise_std, dwell_mean, dwell_std = (config_number(config, name) for name in
                                        ("noise_std", "dwell_mean", "dwell_std"))
    walk_std = config_number({"center_walk_std": 0.0, **config}, "center_walk_std")
    tilt_rate = config_number(config, "drift_rate") if config.get("drift") else 0.0
    if noise_std < LEAST_NOISE:
        raise cli.UserError(f"these data have noise_std {noise_std:g}, where the filter's likelihoods are not defined; "
                            "use data with --noise-std above 0")
    process = series.process
    check_size(process.periods, dwell_mean, dwell_std)
    planes = process.planes
    if planes is None and (walk_std or tilt_rate):
        raise cli.UserError("data.npz has no planes, and circles that move do not show theirs; use data that "
                            "markov_circles_timeseries.py made")
    if planes is None:
        planes = circle_process.recover_planes(series.X, series.states, series.thetas, series.n_circles)
    process = dataclasses.replace(process, planes=planes, noise_std=noise_std, center_walk_std=walk_std,
                                  tilt_rate=tilt_rate,
                                  basis=tilt_subspace(process, config) if tilt_rate else process.basis,
                                  dwell_law=circle_process.dwell_law(process.periods, dwell_mean, dwell_std))
    check_describes(process, series)
    return process


@terminal.busy("comparing the data with config.json")
def check_describes(process, series):
    """Raise cli.UserError where the process can't have made the data: config.json is of others, or they were changed.

    What the filter says of some stretches of the series is compared with what the process gives. Per time step, the
    log-likelihood of data of the process is at most that of their noise, -dim/2 log(2π e σ²) on average; below that by
    at most the entropy rate of the hidden states and, once per stretch, the surprise at the first state. σ² is the
    variance of the noise and, where the centre walks, of what is unknown about it. All stretches together show a
    noise_std that is wrong by a tenth; a single one shows what came later.
    """
    n, dim = min(CHECKED_STEPS // (2 if moves(process) else 1), series.n_steps), process.feature_dim
    if n == 0:
        return
    walk_variance, variance = process.center_walk_std**2, process.noise_std**2
    # The stationary variance of a Kalman filter's prediction of a random walk under noise
    variance += (walk_variance + math.sqrt(walk_variance**2 + 4 * walk_variance * variance)) / 2
    noise = -dim / 2 * math.log(2 * math.pi * math.e * variance)
    n_states = float((process.periods * process.dwell_law.shape[1]).sum())
    surprise = 3 * hidden_entropy(process) + 2 * math.log(n_states) / n
    starts = np.unique(np.linspace(0, series.n_steps - n, CHECKED_STRETCHES).astype(int)).tolist()

    def value_at(start):
        stretch = predict(process, series.X[start:start + n], (), "stationary", False, start)
        return float(stretch["log_likelihood"].mean())

    values = on_all_cores(value_at, starts)
    for value, weight in ((np.mean(values), len(values)), (min(values), 1), (max(values), 1)):
        # Six standard deviations of the mean of so many draws of the noise, and room for what is nearly right; of
        # circles that move there is more to know, and their filter is an approximation
        room = (0.2 if walk_variance or process.tilt_rate else 0.1) * dim / (2 if weight > 1 else 1)
        slack = 6 * math.sqrt(dim / (2 * n * weight)) + room
        if not noise - surprise - slack <= value <= noise + slack:
            raise cli.UserError(
                f"config.json does not describe these data: the exact filter gives them {value:.4g} nats per step, "
                f"and data of its process have {noise - hidden_entropy(process):.4g}; use their own config.json")


def hidden_entropy(process):
    """The entropy of the hidden states of a Process in nats per time step: of each visit, its length and what
    follows."""
    def entropies(rows):
        return -np.where(rows > 0, rows * np.log(np.where(rows > 0, rows, 1)), 0).sum(axis=1)

    return float(entry_rates(process) @ (entropies(process.dwell_law) + entropies(process.transition_matrix)))


def tilt_subspace(process, config):
    """The subspace that planes tilt in: orthonormal rows, or None where the planes themselves span it.

    With few circles they don't; then the process is drawn again from the flags in config.json. Raises cli.UserError
    when that doesn't give these planes.
    """
    if config.get("subspace_dim") == len(circle_process.subspace(dataclasses.replace(process, basis=None))):
        return None
    try:
        drawn = circle_process.draw_process(config)
        if np.allclose(drawn.planes, process.planes, atol=1e-6):
            return drawn.basis
    except (KeyError, TypeError, ValueError):
        pass
    raise cli.UserError("these data were made with --drift, and config.json does not give the subspace that planes "
                        "tilt in; use the config.json that is theirs")


def process_or_none(series, without=None):
    """process_from_series, or None for data that the filter doesn't know.

    Then prints `without`, which says what there will not be without the filter ("no optimal floor"), and the reason;
    nothing when it isn't given.
    """
    try:
        return process_from_series(series)
    except cli.UserError as error:
        if without is not None:
            print(f"{without}: {error}")
        return None


def check_size(periods, dwell_mean, dwell_std):
    """Raise cli.UserError when the filter would have too many hidden states."""
    revolutions = (dwell_mean + 9 * dwell_std) / periods.min()  # longer visits are too rare to count
    if revolutions > MOST_REVOLUTIONS:
        raise cli.UserError(f"a visit may last more than {MOST_REVOLUTIONS} revolutions, too many for the "
                            "exact filter; use data with longer periods or shorter visits")
    phases, revolutions = int(periods.sum()), revolutions + 1
    if phases * revolutions > MOST_STATES:
        raise cli.UserError(f"the circles have {phases} phases, and a visit may last {revolutions:.0f} revolutions: "
                            "too many states for the exact filter; use data with shorter periods")


def config_number(config, name):
    """A number, 0 or more, of config.json. Raises cli.UserError."""
    value = config.get(name)
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise cli.UserError(f"config.json has no usable {name} ({value}); the filter needs the generator's parameters, "
                            "so use data that markov_circles_timeseries.py made, with their config.json")
    return float(value)


# ------------------------------------------------------------------------------------------------- the filter
#
# Hidden state: (circle i, revolutions m done in this visit, step j of the revolution), about 9000 states at the default
# sizes. Emissions depend on (i, j) alone and a visit can only end with a revolution, so all states of circle i whose
# revolution began at the same time s share what they have seen since. Hence the usual forward recursion of an
# explicit-duration model (Yu 2010, Artificial Intelligence 174, 215-243) over the starts of visits and revolutions:
#
#   entry[i, s]       log p(a visit to i begins at s, x_{<s})
#   revolution[i, s]  log p(the period_i steps of x from s on | a revolution of circle i begins at s)
#   weight            log p(a revolution of i begins at s, x_{<s}) = logsumexp over m of
#                       entry[i, s - m period] + the m revolutions since + log P(R > m)
#   leave             the same with log P(R = m + 1): the visit ends with the revolution that begins at s
#
# and the posterior of (i, j) at t is proportional to exp(weight at t - j + log-likelihood of x_{t-j} … x_t). One step
# costs one look back per circle, for the revolution that begins, and two multiplications per pair (i, j) of those
# circles that aren't out of the question; of all circles there are 2200 pairs by default.
#
# All stored numbers are logarithms, and none is exponentiated before the largest of those it is added to is taken
# away. Nothing can underflow, so a state that a burst of outliers made hopeless is still there when the data come back
# to it.


class Tables(NamedTuple):
    """A Process in the form that the kernels read. M: the most revolutions of a visit."""

    periods: np.ndarray  # (K,)
    offsets: np.ndarray  # (K,) first of the period_i places of circle i among all pairs (i, j)
    cos: np.ndarray  # (2 * pairs,) the circle's points, two revolutions long: no index wraps around
    sin: np.ndarray
    turn: np.ndarray  # (2, pairs) cos and sin of the angle run through in j steps
    gain: np.ndarray  # (K,) r / σ²
    half: np.ndarray  # (K,) r² / 2σ²
    log_transition: np.ndarray  # (K, K) from, to
    log_law: np.ndarray  # (K, M) log P(R = m + 1)
    log_survival: np.ndarray  # (K, M) log P(R > m)
    most: np.ndarray  # (K,) the most revolutions of a visit to each circle


class FilterState(NamedTuple):
    """What the filter knows after a step. `forward` changes the arrays in place.

    entry and revolution are the history that the recursion looks back on. The others hold a number for each pair
    (circle i, step j of the revolution), which at time t has its place at offsets[i] + (j - t) mod period_i. A
    revolution that is under way moves on by one j per step and so keeps its place: nothing has to be shifted.
    """

    entry: np.ndarray  # (K, n_steps)
    revolution: np.ndarray  # (K, n_steps + max period), column s + max period: those cut by an end of the series too
    past: np.ndarray  # (K,) log rate of the visits that began before the first step
    sums: np.ndarray  # (K, 3) over all steps so far, for `likelihood_since`
    since: np.ndarray  # (pairs,) what `likelihood_since` adds: minus its value when the revolution began
    weight: np.ndarray  # (pairs,)
    level: np.ndarray  # (pairs,) since + weight
    bound: np.ndarray  # (K,) no score of a pair of the circle is larger
    leave: np.ndarray  # (pairs,)
    exits: np.ndarray  # (pairs, Q) P(the visit ends with the q-th revolution after this one | it is on), or UNKNOWN
    done: np.ndarray  # (pairs,) mean of the revolutions that the visit has done before this one; empty: not asked for
    score: np.ndarray  # (pairs,) scratch
    scratch: np.ndarray  # (max(M, K),)


def tables(process):
    """Tables of a Process."""
    periods = process.periods.astype(np.int64)
    angles = [entry + 2 * np.pi / period * (np.arange(2 * period) % period)
              for entry, period in zip(process.entry_angles, periods, strict=True)]
    angles, variance = np.concatenate(angles), process.noise_std**2
    turns = np.concatenate([2 * np.pi / period * np.arange(period) for period in periods])
    with np.errstate(divide="ignore"):
        return Tables(
            periods=periods, offsets=np.cumsum(periods) - periods, cos=np.cos(angles), sin=np.sin(angles),
            turn=np.stack([np.cos(turns), np.sin(turns)]), gain=process.radii / variance,
            half=process.radii**2 / (2 * variance),
            log_transition=np.log(process.transition_matrix), log_law=np.log(process.dwell_law),
            log_survival=np.log(survival(process)), most=(survival(process) > 0).sum(axis=1),
        )


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
    if law.shape != (K,) or not law.min() >= 0 or abs(law.sum() - 1) > 1e-6:  # NaN is not 0 or more
        raise ValueError(f"initial must be 'visit start', 'stationary' or {K} probabilities")
    return law, np.zeros(K)


def start_state(process, n_steps, starts, past, max_horizon, count_revolutions=False):
    """The FilterState before the first of n_steps steps; starts, past: (K,) each, as from `initial_law`."""
    K, periods, pairs = process.n_circles, process.periods, int(process.periods.sum())
    circle_of_pair = np.repeat(np.arange(K), periods)
    # A visit that was on before the first step is in revolution m with a probability proportional to P(R > m).
    alive = survival(process)
    mean_revolutions = alive.sum(axis=1)
    with np.errstate(divide="ignore"):
        log_past, log_on = np.log(past), np.log(past * mean_revolutions)
        entry = np.full((K, n_steps), -np.inf)
        entry[:, 0] = np.log(starts)
    # P(it ends with the q-th revolution after this one): P(R = m + q + 1) summed over m. A prediction max_horizon
    # steps ahead can see at most Q ends of revolutions.
    M, Q = process.dwell_law.shape[1], -(-max_horizon // int(periods.min()))
    law = np.pad(process.dwell_law, ((0, 0), (0, Q)))
    ends = np.zeros((K, Q))
    for q in range(Q):
        ends[:, q] = law[:, q:q + M].sum(axis=1)
    return FilterState(
        entry=entry, revolution=np.zeros((K, n_steps + int(periods.max()))), past=log_past,
        sums=np.zeros((K, 3)), since=np.zeros(pairs), weight=log_on[circle_of_pair],
        level=log_on[circle_of_pair], bound=np.full(K, np.inf), leave=log_past[circle_of_pair],
        exits=(ends / mean_revolutions[:, None])[circle_of_pair],
        done=(alive @ np.arange(M) / mean_revolutions)[circle_of_pair] if count_revolutions else np.empty(0),
        score=np.empty(pairs), scratch=np.empty(max(M, K)),
    )


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})  # which lets it be vectorised
def largest(values):
    top = -np.inf
    for value in values:
        top = value if value > top else top
    return top


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def log_add_exp(a, b):
    top, low = max(a, b), min(a, b)
    return top if low - top < NEGLIGIBLE or top == -np.inf else top + math.log1p(math.exp(low - top))


@njit(nogil=True, cache=True)
def visits_on(entry, revolution, past, period, most, t, history):
    """Fill history[m] = log p(a visit to a circle began m revolutions before t, x_{<t} if it has lasted until t).

    entry, revolution, past, period and most: the circle's, in a FilterState and in Tables. (Given those themselves,
    which are many arrays, each call would take ten times as long.) Returns for how many m there is such a visit: as
    many as a visit has revolutions, or fewer when none began before the first step.
    """
    pad = len(revolution) - len(entry)
    seen = 0.0  # log-likelihood of the m revolutions before t
    for m in range(most):
        s = t - m * period
        if m > 0 and s > -period:
            seen += revolution[s + pad]
        if s < 0 and past == -np.inf:
            return m
        history[m] = seen + (entry[s] if s >= 0 else past)
    return most


@njit(nogil=True, cache=True)
def add_step(tab, state, t, x, baseline):
    """Add step t to the sums: x (K, 2) in the planes, and its baseline.

    The log-likelihood of a step, given that circle i is j steps into its revolution, is (r x·point - r² / 2) / σ² less
    the baseline. Its part in x is the real part of a complex number, turned on by j steps, so the sum over the steps
    since a revolution began is a difference of two sums over all steps, turned on. Nothing is done for each pair.
    """
    for i in range(len(tab.periods)):
        place = 2 * tab.offsets[i] + t % tab.periods[i]
        along, across = tab.gain[i] * x[i, 0], tab.gain[i] * x[i, 1]
        state.sums[i, 0] += along * tab.cos[place] + across * tab.sin[place]
        state.sums[i, 1] += along * tab.sin[place] - across * tab.cos[place]
        state.sums[i, 2] += tab.half[i] + baseline


@njit(nogil=True, cache=True)
def likelihood_since(tab, state, i, place):
    """Log-likelihood of the steps since the revolution at this place among the pairs, one of circle i, began."""
    turned = state.sums[i, 0] * tab.turn[0, place] - state.sums[i, 1] * tab.turn[1, place]
    return turned - state.sums[i, 2] + state.since[place]


@njit(nogil=True, cache=True)
def find_scores(tab, state, i):
    """Fill in the scores of the pairs of circle i, the logs of their posterior up to a constant: likelihood + weight.

    Returns the largest, which bounds all later ones until a revolution begins: the baseline is such that no step has a
    positive log-likelihood.
    """
    pairs = slice(tab.offsets[i], tab.offsets[i] + tab.periods[i])
    cos, sin, level, score = tab.turn[0, pairs], tab.turn[1, pairs], state.level[pairs], state.score[pairs]
    real, imaginary, drop = state.sums[i]
    for p in range(len(score)):  # a loop of its own: without the maximum in it, it is vectorised
        score[p] = real * cos[p] - imaginary * sin[p] + level[p] - drop
    state.bound[i] = largest(score)
    return state.bound[i]


@njit(nogil=True, cache=True)
def begin_revolutions(tab, state, t):
    """Bring the state from the steps before t to the beginning of step t.

    Of each circle, one pair ends its revolution before t and another begins at t, in the same place. So this costs
    one look back over the dwell law per circle, whatever the number of pairs.
    """
    K, M = tab.log_law.shape
    pad = state.revolution.shape[1] - state.entry.shape[1]
    history, terms = np.empty(M), state.scratch
    leaving = np.empty(K)

    # What has ended: store the revolution's likelihood, and log p(a visit to i ends before t, x_{<t}).
    for i in range(K):
        place = tab.offsets[i] + (-t) % tab.periods[i]
        likelihood = likelihood_since(tab, state, i, place)
        state.revolution[i, t - tab.periods[i] + pad] = likelihood
        leaving[i] = state.leave[place] + likelihood

    # Who enters: those who have left, through the transition matrix. The first step's law is given.
    if t > 0:
        for k in range(K):
            for i in range(K):
                terms[i] = leaving[i] + tab.log_transition[i, k]
            state.entry[k, t] = log_sum_exp(terms[:K])

    # What begins: a revolution of each circle, whatever number of the visit it is.
    for i in range(K):
        place = tab.offsets[i] + (-t) % tab.periods[i]
        n = visits_on(state.entry[i], state.revolution[i], state.past[i], tab.periods[i], tab.most[i], t, history)
        state.since[place] -= likelihood_since(tab, state, i, place)
        for m in range(n):
            terms[m] = history[m] + tab.log_survival[i, m]
        state.weight[place] = log_sum_exp(terms[:n])
        state.level[place] = state.since[place] + state.weight[place]
        state.bound[i] = max(state.bound[i], state.weight[place])
        if len(state.done):
            state.done[place] = 0.0
            for m in range(n):
                if terms[m] - state.weight[place] > NEGLIGIBLE:
                    state.done[place] += m * math.exp(terms[m] - state.weight[place])
        for m in range(n):
            terms[m] = history[m] + tab.log_law[i, m]
        state.leave[place] = log_sum_exp(terms[:n])

        state.exits[place] = UNKNOWN


@njit(nogil=True, cache=True)
def find_exits(tab, state, s, i, place):
    """Fill in with which revolution from here the visit will end, for a revolution of circle i that began at s.

    Only predictions need it, and only of the few revolutions that are likely when they come to their end.
    """
    M = tab.log_law.shape[1]
    history = np.empty(M)
    n = visits_on(state.entry[i], state.revolution[i], state.past[i], tab.periods[i], tab.most[i], s, history)
    for q in range(state.exits.shape[1]):
        state.exits[place, q] = 0.0
        for m in range(min(n, M - q)):
            state.exits[place, q] += math.exp(history[m] + tab.log_law[i, m + q] - state.weight[place])


@njit(nogil=True, cache=True)
def forward(tab, state, plane, baseline, first, log_evidence, posterior, phasor, flux, revolutions):
    """Filter len(posterior) steps from step `first` on.

    plane (n, K, 2): x in the planes; baseline (n,), taken from every log-likelihood of a step. Fills log_evidence,
    log p(x_{<=t}) less the baselines so far, and adds to zeros, each row up to a factor that is the same for all of
    it: posterior (b, K) over circles; phasor (b, K, 2), E[(cos θ, sin θ) on the circle]; flux (b, K, max horizon),
    P(the next visit begins r + 1 steps on, after this circle); and, where `state` counts them, revolutions (b,), the
    mean of those that the present visit has done.
    """
    K, horizon, likeliest = flux.shape[1], flux.shape[2], 0
    for row in range(len(posterior)):
        t = first + row
        begin_revolutions(tab, state, t)

        # The scores of the circles that matter: the likeliest one's, and those that may come near it.
        add_step(tab, state, t, plane[t], baseline[t])
        top = find_scores(tab, state, likeliest)
        for i in range(K):
            if i != likeliest and state.bound[i] - top > NEGLIGIBLE:
                top = max(top, find_scores(tab, state, i))

        # Sums over the pairs that matter, relative to the likeliest: what the predictions need of the posterior.
        total = 0.0
        for i in range(K):
            if state.bound[i] - top <= NEGLIGIBLE:
                continue
            if state.bound[i] == top:
                likeliest = i
            period, a = tab.periods[i], tab.offsets[i]
            phase = t % period
            for p in range(period):
                if state.score[a + p] - top > NEGLIGIBLE:
                    mass = math.exp(state.score[a + p] - top)
                    total += mass
                    posterior[row, i] += mass
                    phasor[row, i, 0] += mass * tab.cos[2 * a + phase + p]
                    phasor[row, i, 1] += mass * tab.sin[2 * a + phase + p]
                    if len(state.done):
                        revolutions[row] += mass * state.done[a + p]
                    left = period - (phase + p) % period  # steps until this revolution is over
                    if left <= horizon and state.exits[a + p, 0] == UNKNOWN:
                        find_exits(tab, state, t + left - period, i, a + p)
                    for q in range(state.exits.shape[1]):
                        if left + q * period <= horizon:
                            flux[row, i, left + q * period - 1] += mass * state.exits[a + p, q]
        log_evidence[row] = top + math.log(total)


@njit(nogil=True, cache=True)
def backward(tab, state, log_evidence, occupancy):
    """Fill occupancy[s + max period, i] = P(a revolution of circle i begins at s | all of x).

    state: after `forward` over the whole series; log_evidence: of the whole series. The backward recursion over the
    same starts, s from the last to the first:

      rest[m]      log p(x_{>=s} | revolution m of a visit to i begins at s)
      after[e, i]  log p(x_{>=e} | a visit to i ended before e)

    The forward half needs only `entry` and `revolution`, one number per step and circle each, so that there is nothing
    to checkpoint.
    """
    K, M = tab.log_law.shape
    n, pad = state.entry.shape[1], state.revolution.shape[1] - state.entry.shape[1]
    rest = np.empty((len(state.since), M))  # a pair's row is used again one period earlier
    after, begins, terms, history = np.empty((n, K)), np.empty(K), np.empty(K), np.empty(M)
    for s in range(n - 1, -pad, -1):
        for i in range(K):
            period = tab.periods[i]
            if s <= -period or (s < 0 and state.past[i] == -np.inf):
                continue  # over before the first step, or no visit began before it
            place, end = tab.offsets[i] + (-s) % period, s + period
            if end >= n:  # cut by the end of the series: `forward` had no occasion to store it
                state.revolution[i, s + pad] = likelihood_since(tab, state, i, place)
            n_before = visits_on(state.entry[i], state.revolution[i], state.past[i], period, tab.most[i], s, history)
            for m in range(M):
                log_survival = tab.log_survival[i, m]
                if log_survival == -np.inf:
                    rest[place, m] = -np.inf
                    continue

                # The future from s: this revolution, then another one of the same visit, or the end of the visit.
                value = state.revolution[i, s + pad]
                if end < n:
                    stays = -np.inf
                    if m + 1 < M:
                        stays = tab.log_survival[i, m + 1] + rest[place, m + 1]
                    value += log_add_exp(stays, tab.log_law[i, m] + after[end, i]) - log_survival
                rest[place, m] = value

                # The past up to s times the future from s.
                if m < n_before:
                    log_probability = history[m] + log_survival + value - log_evidence
                    if log_probability > NEGLIGIBLE:
                        occupancy[s + pad, i] += math.exp(log_probability)
            begins[i] = rest[place, 0]

        # Whoever has left before s goes through the transition matrix and begins a visit at s.
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
    plane = circle_process.plane_coordinates(process, X)
    length = np.hypot(plane[..., 0], plane[..., 1])
    baseline = ((process.radii * length - process.radii**2 / 2) / process.noise_std**2).max(axis=1)
    return plane, baseline, np.einsum("td,td->t", X, X)


def check_series(process, X):
    """X, if it is a series of finite numbers that the process could have made: (n_steps, feature_dim)."""
    if np.ndim(X) != 2 or np.shape(X)[1] != process.feature_dim or len(X) == 0:
        raise ValueError(f"X must be (n_steps, {process.feature_dim}), not {np.shape(X)}")
    if not np.isfinite(X).all():
        raise cli.UserError("the series holds NaN or infinity; the filter needs finite numbers")
    return X


def prediction_map(process, horizons):
    """The matrices that turn phasor and flux into E[x_{t+k}]: (K * 2, H * dim) and (K * max horizon, H * dim).

    If nobody left, x_{t+k} would be the phasor turned on by k steps. Whoever leaves r steps on adds the difference
    between what follows after leaving and that: what follows depends on the circle left and k - r alone.
    """
    K, dim, reach = process.n_circles, process.feature_dim, max(horizons, default=0)
    circles, alive, law = np.arange(K), survival(process), process.dwell_law
    tilts = (circles % 2 == 0) & (process.tilt_rate > 0)  # a MovingFilter looks ahead itself until such a visit ends
    turn = 2 * np.pi * np.arange(reach + 1)[:, None] / process.periods  # (n, K), in n steps
    staying = circle_process.points(process, circles, process.entry_angles + turn)  # (n, K, dim), n steps after entry

    # What follows, by recursion over n: a visit is still on, or it has ended after r revolutions, n - r * period ago.
    begun = np.zeros((reach + 1, K, dim))  # E[x] n steps after a visit to i began
    left = np.zeros((reach + 1, K, dim))  # E[x] n steps after the end of a visit to i
    for n in range(reach):
        for i, period in enumerate(process.periods):
            done = n // period
            begun[n, i] = alive[i, done] * staying[n, i] if done < alive.shape[1] else 0.0
            if tilts[i]:  # towards an axis that nobody knows yet: what is left of v2 is its cosine
                height = process.radii[i] * np.sin(process.entry_angles[i] + turn[n, i])
                for r in range(done + 1, law.shape[1] + 1):
                    angle = process.tilt_rate * n / (r * period - 1)
                    begun[n, i] += law[i, r - 1] * height * (np.cos(angle) - 1) * process.planes[i, 1]
            for r in range(1, min(done, law.shape[1]) + 1):
                begun[n, i] += law[i, r - 1] * left[n - r * period, i]
        left[n] = process.transition_matrix @ begun[n]

    # A phasor (cos, sin) turned on by k steps: its first part starts from angle 0, its second from a right angle.
    by_phasor, by_flux = np.zeros((K, 2, len(horizons), dim)), np.zeros((K, reach, len(horizons), dim))
    for h, k in enumerate(horizons):
        by_phasor[:, 0, h] = circle_process.points(process, circles, turn[k])
        by_phasor[:, 1, h] = circle_process.points(process, circles, turn[k] + np.pi / 2)
        for r in range(1, k + 1):
            by_flux[:, r - 1, h] = left[k - r] - np.where(tilts[:, None], 0.0, staying[k - r])
    width = len(horizons) * dim
    return by_phasor.reshape(K * 2, width), by_flux.reshape(K * reach, width)


class ExactFilter:
    """Filters one series of n steps of a Process whose circles stand still; a MovingFilter has the same methods.

    starts, past: (K,) each, as from `initial_law`; reach: the largest horizon; count_revolutions: let `revolutions`
    hold, after each block, the mean of the revolutions that the visit had done at each of its steps.
    """

    def __init__(self, process, n, starts, past, reach, count_revolutions=False):
        self.process, self.reach, self.revolutions = process, reach, None
        self.tab, self.state = tables(process), start_state(process, n, starts, past, reach, count_revolutions)
        self.evidence = 0.0
        self.n_hypotheses = 0  # it has every state, and so no number of hypotheses

    def blocks(self, X):
        """Filter X (n, feature_dim) block by block.

        Yields (first, log_likelihood, posterior, phasor, flux, 0, 0): first step of the block; log p(x_t | x_{<t})
        in nats; what `forward` fills in, the posterior's rows made to sum to 1; and what a MovingFilter adds to that.
        """
        K, n = self.process.n_circles, len(X)
        plane, baseline, norm2 = in_planes(self.process, X)
        for first in range(0, n, BLOCK):
            b, steps = min(BLOCK, n - first), slice(first, first + BLOCK)
            evidence, posterior, phasor = np.empty(b), np.zeros((b, K)), np.zeros((b, K, 2))
            flux, revolutions = np.zeros((b, K, self.reach)), np.zeros(b)
            forward(self.tab, self.state, plane, baseline, first, evidence, posterior, phasor, flux, revolutions)
            log_likelihood = step_log_likelihood(self.process, np.diff(evidence, prepend=self.evidence),
                                                 baseline[steps], norm2[steps])
            self.evidence, total = evidence[-1], posterior.sum(axis=1)
            self.revolutions = revolutions / total if len(self.state.done) else None
            phasor /= total[:, None, None]
            flux /= total[:, None, None]
            yield first, log_likelihood, posterior / total[:, None], phasor, flux, 0.0, 0.0

    def state_sums(self, n):
        """P(circle | all n steps) and the mean of exp(iθ) times it, (n, K) each; after `blocks`."""
        periods = self.process.periods
        pad = int(periods.max())
        occupancy = np.zeros((n + pad, len(periods)))
        backward(self.tab, self.state, self.evidence, occupancy)

        # A step belongs to the revolution that began at most period - 1 steps before: sums over a sliding window. For
        # the mean angle, each start at s counts as exp(-i turn(s)); turned on to t, that is the angle run through
        # since s.
        turn = 2 * np.pi / periods * (np.arange(-pad, n)[:, None] % periods)
        phasor = sliding_sum(occupancy * np.exp(-1j * turn), periods)
        return sliding_sum(occupancy, periods), phasor * np.exp(1j * (self.process.entry_angles + turn[pad:]))


def step_log_likelihood(process, evidence, baseline, norm2):
    """log p(x_t | x_1 … x_{t-1}) in nats, (n,), from how much the log evidence that `forward` fills in grows, (n,)."""
    constant = 0.5 * process.feature_dim * math.log(2 * math.pi * process.noise_std**2)
    return evidence + baseline - norm2 / (2 * process.noise_std**2) - constant


# ------------------------------------------------------------------------------------------------- what it is used for


def check_horizons(horizons):
    horizons = [int(k) for k in horizons]
    if min(horizons, default=1) < 1:
        raise ValueError(f"horizons must be 1 or more, not {horizons}")
    return horizons


def new_filter(process, n, initial, horizons=(), first_step=None, keep_tree=False, limits=None,
               count_revolutions=False):
    """The filter for n steps of a Process: an ExactFilter, or a MovingFilter when its circles move.

    first_step: the step of the whole series that the first of the n is. At step s the centre has walked s steps and has
    the law N(0, s center_walk_std²) per feature: the prior of a MovingFilter. None: the series begins with them when
    `initial` says so; for the stationary one the centre may be anywhere, WIDE times as far away as the circles reach.
    """
    starts, past = initial_law(process, initial)
    if not moves(process):
        return ExactFilter(process, n, starts, past, max(horizons, default=0), count_revolutions)
    variance = center_variance(process, initial, first_step)
    return MovingFilter(process, starts, past, variance, horizons, limits, keep_tree)


def moves(process):
    """Whether the circles of a process move, so that the filter is a MovingFilter."""
    return process.center_walk_std > 0 or process.tilt_rate > 0


def center_variance(process, initial, first_step):
    """The variance per feature of the centre at a first step: see `new_filter`."""
    if process.center_walk_std and first_step is None and isinstance(initial, str) and initial == "stationary":
        return WIDE**2 * (process.radii.max()**2 + process.noise_std**2)
    return (first_step or 0) * process.center_walk_std**2


def predictions_of(process, maps, phasor, flux, center, ahead=0.0):
    """E[x_{t+k}] for the horizons of `maps`, as from `prediction_map`: (b, H, feature_dim)."""
    b, K, reach = flux.shape
    prediction = phasor.reshape(b, -1) @ maps[0]
    if reach:
        by_circle = maps[1].reshape(K, reach, -1)
        for i in range(K):  # at most steps all but one or two circles are out of the question, and their rows zero
            rows = np.flatnonzero(flux[:, i].any(axis=1))
            prediction[rows] += flux[rows, i] @ by_circle[i]
    center = center if np.ndim(center) == 0 else center[:, None]
    return prediction.reshape(b, -1, process.feature_dim) + ahead + center


def on_all_cores(function, jobs):
    """[function(job) for job in jobs], as many at a time as there are cores: the kernels release the interpreter lock.

    Each job makes its matrix products by itself; several threads for each of them as well would get in their way. A job
    may call this again, but no two threads may begin it side by side: each would set the number of threads for BLAS
    back to what it found, which might be the other one's.
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cli.n_cores()) as pool:
        return list(pool.map(function, jobs))


class Stretch(NamedTuple):
    """Steps [first, last) of a series, for which a filter runs over [begin, end)."""

    begin: int
    first: int
    last: int
    end: int


def stretches(process, n, smoothing):
    """Stretches that cover n steps, each filtered by itself: from the stationary prior, overlapping the one before.

    A filter forgets where it began: when it has seen a visit end it knows the circle, the phase and how long the
    present visit has been on, and the mean of a walking centre forgets a fixed share per step. A smoother forgets the
    end the same way. `forgotten` checks it where two stretches meet. The cuts don't depend on the machine.
    """
    longest = int((process.periods * (process.dwell_law > 0).sum(axis=1)).max())
    overlap = 2 * longest
    if process.center_walk_std:
        stays = 1 - moving_filter.told_gain(process.center_walk_std, process.noise_std)
        overlap = max(overlap, math.ceil(math.log(FORGOTTEN * 1e-3) / math.log(stays)) if 0 < stays < 1 else n)
    count = max(1, min(round(n / STRETCH), n // (4 * overlap)))
    edges = np.linspace(0, n, count + 1).astype(int).tolist()
    return [Stretch(max(0, first - overlap), first, last, min(n, last + overlap) if smoothing else last)
            for first, last in itertools.pairwise(edges)]


def forgotten(left, right):
    """Whether the last row that one stretch found is, but for rounding, what the next one found for the same step."""
    return all(np.allclose(left[name][-1], right[name][0], rtol=FORGOTTEN, atol=FORGOTTEN, equal_nan=True)
               for name in left if name not in ("circle", "theta"))


def filter_series(process, X, horizons, initial, first_step=None, keep_predictions=False, smoothing=False,
                  progress=None):
    """Filter X, in stretches on all cores: a dict of arrays with a row per step.

    Its entries: `log_likelihood`, `posterior`, `center`; `error K` for each horizon K, NaN where the target lies beyond
    the series, and `prediction K`, if it is to be kept; with `smoothing`, `circle`, `theta` and `smoothed`. They are as
    in `predict` and `smooth`. progress: called with the number of steps whenever some are done.
    """
    n, maps = len(check_series(process, X)), prediction_map(process, horizons)

    def one(stretch):
        return filter_stretch(process, X, stretch, horizons, maps, initial, first_step, keep_predictions, smoothing,
                              progress or (lambda steps: None))

    cuts = stretches(process, n, smoothing)
    found = on_all_cores(one, cuts)
    if not all(forgotten(left, right) for left, right in itertools.pairwise(found)):
        return one(Stretch(0, 0, n, n))
    return {name: np.concatenate([found[0][name], *(right[name][1:] for right in found[1:])]) for name in found[0]}


def filter_stretch(process, X, stretch, horizons, maps, initial, first_step, keep_predictions, smoothing, progress):
    """What `filter_series` finds for one Stretch; all but the first have a row for the step before their first too."""
    begin, first, last, end = stretch
    first = max(first - 1, 0)
    if begin > 0:
        anywhere = isinstance(initial, str) and initial == "stationary" and first_step is None
        initial, first_step = "stationary", None if anywhere else begin + (first_step or 0)
    filtering = new_filter(process, end - begin, initial, horizons, first_step, smoothing)
    rows = {"log_likelihood": [], "posterior": [], "center": []}
    for block_first, log_likelihood, posterior, phasor, flux, center, ahead in filtering.blocks(X[begin:end]):
        start = begin + block_first
        t = slice(max(first, start), min(last, start + len(posterior)))
        if t.start >= t.stop:
            continue
        some = slice(t.start - start, t.stop - start)
        center = np.broadcast_to(center, (len(posterior), process.feature_dim))[some]
        prediction = predictions_of(process, maps, phasor[some], flux[some], center,
                                    ahead if np.ndim(ahead) == 0 else ahead[some])
        for name, values in (("log_likelihood", log_likelihood[some]), ("posterior", posterior[some])):
            rows[name].append(values)
        if process.center_walk_std:
            rows["center"].append(center)
        for h, k in enumerate(horizons):
            target = X[t.start + k:t.stop + k]
            error = np.full(t.stop - t.start, np.nan)  # a prediction beyond the series has no target
            difference = target - prediction[:len(target), h]
            error[:len(target)] = np.einsum("td,td->t", difference, difference) / process.feature_dim
            rows.setdefault(f"error {k}", []).append(error)
            if keep_predictions:
                rows.setdefault(f"prediction {k}", []).append(prediction[:, h])
        progress(t.stop - t.start)
    found = {name: np.concatenate(parts) for name, parts in rows.items() if parts}
    found.setdefault("center", np.broadcast_to(0.0, (last - first, process.feature_dim)))
    if smoothing:
        states = states_of(*filtering.state_sums(end - begin))
        found |= {name: values[first - begin:last - begin]
                  for name, values in zip(("circle", "theta", "smoothed"), states, strict=True)}
    return found


def predict(process, X, horizons=(1,), initial="visit start", keep_predictions=True, first_step=None, progress=None):
    """Filter X (n_steps, feature_dim) and predict it `horizons` steps ahead, in float64.

    initial: "visit start", a visit to a circle chosen uniformly begins at the first step (how the generator
    starts); K probabilities, the same with another law; "stationary", X was cut out of a long series anywhere.
    first_step: where X was cut out of a series whose centre walks, see `new_filter`. progress: called with the number
    of steps whenever some are done.

    Returns a dict: `prediction` {k: (n, feature_dim)}, row t being E[x_{t+k} | x_1 … x_t] (None without
    keep_predictions, which saves its memory); `squared_error` {k: (n - k,)}, row t the mean over features of
    (x_{t+k} - prediction)²; `circle_posterior` (n, K), given x_1 … x_t; `log_likelihood` (n,), of x_t given
    x_1 … x_{t-1}, in nats; `center` (n, feature_dim), E[the circles' centre at t | x_1 … x_t].
    """
    horizons = check_horizons(horizons)
    found = filter_series(process, X, horizons, initial, first_step, keep_predictions, progress=progress)
    return predicted(found, horizons)


def predicted(found, horizons):
    """What `predict` returns, from what `filter_series` does."""
    n = len(found["posterior"])
    keep = all(f"prediction {k}" in found for k in horizons)
    return {"prediction": {k: found[f"prediction {k}"] for k in horizons} if keep else None,
            "squared_error": {k: found[f"error {k}"][:max(n - k, 0)] for k in horizons},
            "circle_posterior": found["posterior"], "log_likelihood": found["log_likelihood"],
            "center": found["center"]}


def window_floors(process, series, starts, seq_len, horizons=(1,), progress=None):
    """The floors of a model that sees one window at a time: {"mse": {k: …}, "nll": {1: …}}.

    "mse" is the filter's mean squared error per horizon, "nll" its negative log-likelihood of the next step in nats
    per time step: no prediction and no predicted density that sees the same past does better on average. (For longer
    horizons the filter's predictive density isn't computed, so there is no "nll" of them.)

    The filter begins each window X[start : start + seq_len] anew and knows only that it was cut out of a long series
    (stationary prior), and when the centre walks, at which step. The mean is over windows, features, and the positions
    t = 0 … seq_len - 1 - k whose target t + k lies in the window: the targets of the model's own loss. starts: (n,)
    first steps. What was computed before for the same series is read from its folder, see `floor_cache`; progress:
    called with the number of steps whenever some are done, in place of a bar of its own.
    """
    horizons = check_window(series, starts, seq_len, horizons)

    def compute():
        with terminal.Bar(len(starts) * seq_len, desc="optimal filter", disable=progress and True) as bar:
            *mse, nll, _ = filter_windows(process, series, starts, seq_len, horizons, progress=progress or bar.update)
        return {"mse": dict(zip(horizons, mse, strict=True)), "nll": {1: nll}}

    return floor_cache.kept(compute, series.folder, (process, series, starts, seq_len), horizons)


def filter_windows(process, series, starts, seq_len, horizons, limits=None, progress=None):
    """Means over windows: the MSE of each horizon, the NLL of the next step, and the hypotheses of a MovingFilter."""
    rows = filter_each_window(process, series, starts, starts, seq_len, horizons, limits, progress)
    return np.mean(rows, axis=0).tolist()


def filter_each_window(process, series, starts, first_steps, seq_len, horizons, limits=None, progress=None):
    """What `filter_windows` is the mean of, one row per window: (n, n_horizons + 2).

    first_steps (n,): as for `new_filter`, how many steps each window begins behind the first one of its recording."""
    maps = prediction_map(process, horizons)

    def one_window(window):
        start, first_step = window
        X = check_series(process, series.X[start:start + seq_len])
        filtering = new_filter(process, seq_len, "stationary", horizons, first_step, limits=limits)
        prediction, log_likelihood = [], []
        for _, block_log_likelihood, _, *parts in filtering.blocks(X):
            prediction.append(predictions_of(process, maps, *parts))
            log_likelihood.append(block_log_likelihood)
        prediction = np.concatenate(prediction)
        errors = [np.mean((X[k:] - prediction[:seq_len - k, h])**2) for h, k in enumerate(horizons)]
        nll = -np.concatenate(log_likelihood)[1:].mean()  # the first step has no past
        dataset.release(X)
        if progress:
            progress(seq_len)
        return [*errors, nll, filtering.n_hypotheses / seq_len]

    places = zip(np.asarray(starts).tolist(), np.asarray(first_steps).tolist(), strict=True)
    return np.array(on_all_cores(one_window, places))


@terminal.busy("what merging and dropping paths costs")
def cost_of_limits(process, series, starts, seq_len, horizons):
    """What dropping and merging hypotheses costs a MovingFilter, measured on some of the windows: a dict.

    `hypotheses_per_step` with the usual limits and, as `hypotheses_per_step_wider`, with WIDER_LIMITS, which keep
    more than twice as many; `change_percent`, by how much the MSE then changes, the most of all horizons.
    """
    some = np.asarray(starts)[:: max(1, len(starts) // COST_WINDOWS)]
    *mse, _, usual = filter_windows(process, series, some, seq_len, horizons)
    *wider_mse, _, wider = filter_windows(process, series, some, seq_len, horizons, moving_filter.WIDER_LIMITS)
    change = max(abs(a / b - 1) for a, b in zip(mse, wider_mse, strict=True))
    return {"change_percent": 100 * change, "hypotheses_per_step": usual, "hypotheses_per_step_wider": wider}


def check_window(series, starts, seq_len, horizons):
    horizons = check_horizons(horizons)
    if len(starts) == 0 or min(starts) < 0 or max(starts) + seq_len > series.n_steps:
        raise ValueError(f"windows of {seq_len} steps must lie in the series of {series.n_steps}")
    if not horizons or max(horizons) >= seq_len:
        raise ValueError(f"horizons {horizons} must be shorter than the window, {seq_len} steps")
    return horizons


def excess_percent(mse, floor):
    """How far an MSE is above the optimal one, in percent; None when the optimal one is not known."""
    return None if floor is None else 100 * (mse / floor - 1)


def excess_nats(nll, floor):
    """How far a negative log-likelihood is above the optimal one, in nats per time step; None without that.

    On average this is the Kullback-Leibler divergence of the predicted density from the exact predictive density.
    """
    return None if floor is None else nll - floor


def error_rows(errors, floors):
    """A model's validation errors beside the floors: one dict per horizon.

    errors: {"mse": {horizon: value}}, and "nll" where the model predicts densities; floors: as from `window_floors`,
    or {} when they are not known.
    """
    optimal_mse, optimal_nll = floors.get("mse", {}), floors.get("nll", {})
    rows = [{"horizon": k, "val_mse": mse, "optimal_mse": optimal_mse.get(k),
             "excess_percent": excess_percent(mse, optimal_mse.get(k))} for k, mse in errors["mse"].items()]
    for row in rows if "nll" in errors else []:
        nll, floor = errors["nll"][row["horizon"]], optimal_nll.get(row["horizon"])
        row |= {"val_nll": nll, "optimal_nll": floor, "excess_nats": excess_nats(nll, floor)}
    return rows


def error_table(rows):
    """The text table of `error_rows`. NLL stands for the negative log-likelihood in nats per time step."""
    columns = {"validation MSE": ("val_mse", ".4f", ""), "optimal": ("optimal_mse", ".4f", ""),
               "excess": ("excess_percent", "+.2f", " %")}
    if "val_nll" in rows[0]:
        columns |= {"NLL (nats)": ("val_nll", ".4f", ""), "optimal NLL": ("optimal_nll", ".4f", ""),
                    "above optimal": ("excess_nats", "+.4f", " nats")}

    def cell(value, form, unit):
        return "–" if value is None else format(value, form) + unit

    return cli.table(["horizon", *columns], [
        [row["horizon"], *(cell(row[key], form, unit) for key, form, unit in columns.values())] for row in rows],
        align="r" * (1 + len(columns)))


def smooth(process, X, initial="visit start", first_step=None):
    """The hidden states of X (n_steps, feature_dim) given all of it (forward-backward).

    Returns a dict: `circle_posterior` (n, K); `circle` (n,) int, the likeliest one at each step; `theta` (n,)
    radians in [0, 2π), the mean angle on that circle. Two entries tell whether a series has left the process:
    `log_likelihood` (n,) of x_t given x_1 … x_{t-1}, in nats, and `distance` (n,) from x_t to the nearest point of
    any circle (about noise_std * sqrt(feature_dim - 1) when x_t belongs to the process). `center` (n, feature_dim)
    is the mean of the circles' centre when it walks, given the likeliest circle and phase of each step. Where planes
    tilt, the distance is from the circle as it is when a visit begins, and the centre is that given the past.

    Memory: a few arrays of (n, K). `initial` and `first_step` as in `predict`; "stationary" for a series that begins
    anywhere.
    """
    return smoothed(process, X, filter_series(process, X, (), initial, first_step, smoothing=True), initial, first_step)


def smoothed(process, X, found, initial="visit start", first_step=None):
    """What `smooth` returns, from what `filter_series` does."""
    center = np.broadcast_to(0.0, np.shape(X))
    if process.tilt_rate:  # given the past: for the axes of all visits there is no smoother
        center = found["center"]
    elif process.center_walk_std:  # given the likeliest circle and phase
        on_circle = X - circle_process.points(process, found["circle"], found["theta"])
        _, center = moving_filter.follow_walk(on_circle, process.center_walk_std, process.noise_std,
                                              center_variance(process, initial, first_step))
    return {"circle_posterior": found["smoothed"], "circle": found["circle"], "theta": found["theta"],
            "log_likelihood": found["log_likelihood"],
            "distance": circle_process.distance(process, X - center), "center": center}


def states_of(posterior, phasor):
    """The likeliest circle (n,), the mean angle on it (n,) and P(circle) (n, K), from a filter's `state_sums`."""
    posterior = np.maximum(posterior, 0)
    posterior /= posterior.sum(axis=1, keepdims=True)
    circle = posterior.argmax(axis=1)
    return circle, np.angle(phasor[np.arange(len(circle)), circle]) % (2 * np.pi), posterior


def tilt_points(clean, process, circles, steps, theta, rng):
    """Tilt the planes under the noise-free points (n, feature_dim) of a path as the process does; changes `clean`.

    circles, steps, theta: (n,) each, steps since the visit began. The visit that the end of the series cuts ends with
    its present revolution.
    """
    starts = np.flatnonzero(steps == 0)
    last = circles[starts[-1]]
    end = starts[-1] + -(-(len(steps) - starts[-1]) // process.periods[last]) * process.periods[last]
    visits = circle_process.Visits(circles[starts], np.append(starts, end))
    plan = circle_process.Plan(process, len(steps), visits, circle_process.draw_tilt_axes(process, visits, rng),
                               process.tilt_rate, 0.0, rng, rng)
    circle_process.add_tilt(clean, plan, (steps == 0).cumsum() - 1, steps, theta)


@terminal.busy("entropy rate of the process")
def entropy_rate(process, n_steps=20_000, seed=0):
    """The entropy per step of the process given its whole past, in nats, and the standard error: (rate, error).

    No predictor's log-likelihood can be higher than minus this on average. Estimated on a drawn series. The largest
    part of a step's log-likelihood is the noise around the true point, whose mean is known exactly; only what the
    filter gives less than one that knows the point is averaged (a control variate: Glasserman 2003, Monte Carlo
    Methods in Financial Engineering, section 4.1).
    """
    rng = np.random.default_rng(seed)
    circles, steps = draw_path(process, n_steps, rng)
    theta = process.entry_angles[circles] + 2 * np.pi * steps / process.periods[circles]
    noise = process.noise_std * rng.standard_normal((n_steps, process.feature_dim))
    X = circle_process.points(process, circles, theta)
    if process.tilt_rate:
        tilt_points(X, process, circles, steps, theta, rng)
    X += noise
    if process.center_walk_std:
        X += circle_process.walk(np.zeros(process.feature_dim), n_steps, process.center_walk_std, rng)[0]
    known = -0.5 * process.feature_dim * math.log(2 * math.pi * process.noise_std**2)
    given_point = known - (noise**2).sum(axis=1) / (2 * process.noise_std**2)
    missing = given_point - predict(process, X, (), keep_predictions=False)["log_likelihood"]
    batches = np.array([batch.mean() for batch in np.array_split(missing, min(50, n_steps))])
    rate = 0.5 * process.feature_dim - known + missing.mean()
    return float(rate), float(batches.std(ddof=1) / math.sqrt(len(batches)))


def draw_path(process, n_steps, rng):
    """Draw the visits of a series from the Process's own laws: its circle and how many steps into a visit, (n_steps,)
    int each. The first visit is to a circle chosen uniformly and begins at the first step."""
    circles, steps, circle, n_drawn = [], [], int(rng.integers(process.n_circles)), 0
    while n_drawn < n_steps:
        revolutions = 1 + rng.choice(process.dwell_law.shape[1], p=process.dwell_law[circle])
        length = min(int(revolutions * process.periods[circle]), n_steps - n_drawn)
        circles.append(np.full(length, circle))
        steps.append(np.arange(length))
        n_drawn += length
        circle = int(rng.choice(process.n_circles, p=process.transition_matrix[circle]))
    return np.concatenate(circles), np.concatenate(steps)


def sliding_sum(values, widths):
    """Sums of values (pad + n, K) over the last widths[i] <= pad rows of column i, for the last n rows."""
    total = np.concatenate([np.zeros((1, values.shape[1]), values.dtype), np.cumsum(values, axis=0)])
    pad = int(widths.max())
    return np.stack([total[pad + 1:, i] - total[pad + 1 - width:len(total) - width, i]
                     for i, width in enumerate(widths)], axis=1)


# ------------------------------------------------------------------------------------------------- the script


SHOWN_STEPS = 4000  # of the validation part, from its first step on
FEATURES_SHOWN = 3  # of the centre


def measure(args, series, process):
    """(report, P(circle | past) of each step (n_steps, K), E[centre | past] of each step (n_steps, feature_dim)).

    The report is what optimal_filter.json holds.
    """
    _, windows, boundary = dataset.split_windows(series.n_steps, args.seq_len, args.stride, args.val_fraction)
    with terminal.Bar(series.n_steps + len(windows) * args.seq_len, desc="filtering") as bar:
        found = filter_series(process, series.X, args.horizons, "visit start", smoothing=True, progress=bar.update)
        in_windows = window_floors(process, series, windows, args.seq_len, args.horizons, progress=bar.update)
    filtered = predicted(found, args.horizons)
    right = found["posterior"].argmax(axis=1) == series.states
    right_smoothed = found["circle"] == series.states
    report = {
        "noise_floor": process.noise_std**2,
        "planes_recovered": series.process.planes is None,
        "n_steps": series.n_steps, "first_validation_step": boundary, "seq_len": args.seq_len, "stride": args.stride,
        "horizons": [{"horizon": k, "mse": float(errors.mean()), "val_mse": float(errors[boundary:].mean()),
                      "val_window_mse": in_windows["mse"][k]} for k, errors in filtered["squared_error"].items()],
        "circle_accuracy": float(right.mean()), "val_circle_accuracy": float(right[boundary:].mean()),
        "smoothed_circle_accuracy": float(right_smoothed.mean()),
        "log_likelihood_per_step": float(filtered["log_likelihood"].mean()),
    }
    learner = learned.learner_of(series, boundary)
    if learner is not None:
        report["learned_from_steps"] = learner.n_steps
        floors = window_floors(learner.process, series, windows, args.seq_len, args.horizons)
        for row in report["horizons"]:
            row["val_window_learned_mse"] = floors["mse"][row["horizon"]]
    report["entropy_rate"], report["entropy_rate_error"] = entropy_rate(process)
    if process.center_walk_std:
        for row in report["horizons"]:
            row["told_mse"] = moving_filter.told_floor(process.center_walk_std, process.noise_std, row["horizon"])
    if moves(process):
        report |= {"center_walk_std": process.center_walk_std, "tilt_rate": process.tilt_rate,
                   "limits": cost_of_limits(process, series, windows, args.seq_len, args.horizons)}
    return report, found["posterior"], found["center"]


def print_report(report, process, series):
    print(f"noise floor (noise_std²): {report['noise_floor']:.4f}\n")
    if report["planes_recovered"]:
        too_low = report["noise_floor"] * process.n_circles * (2 * process.feature_dim - 3) / series.X.size
        print("data.npz has no planes: recovered from the same data, which makes the errors below too low "
              f"by about {too_low:.1e}\n")
    print("mean squared error of the Bayes-optimal prediction")
    columns = {"whole series": "mse", "validation": "val_mse", f"windows of {report['seq_len']:,}": "val_window_mse"}
    if "learned_from_steps" in report:
        columns["process learned"] = "val_window_learned_mse"
    if process.center_walk_std:
        columns["circle and phase told"] = "told_mse"
    print(cli.table(["horizon", *columns], [
        [row["horizon"], *(f"{row[key]:.4f}" for key in columns.values())] for row in report["horizons"]],
        align="r" * (1 + len(columns))))
    if "learned_from_steps" in report:
        print(f"process learned: the same windows, by a filter that has learned the process from the first "
              f"{report['learned_from_steps']:,} steps and their circles")
    print(f"\ncircle accuracy: {report['circle_accuracy']:.3%} from the past, "
          f"{report['smoothed_circle_accuracy']:.3%} from the whole series")
    print(f"log-likelihood: {report['log_likelihood_per_step']:.4f} nats per step")
    print(f"entropy rate of the process: {report['entropy_rate']:.4f} ± {report['entropy_rate_error']:.1g} nats per "
          "step\n")
    if moves(process):
        limits = report["limits"]
        print(f"the circles move, so hidden paths are merged and dropped: {limits['hypotheses_per_step']:.1f} are kept "
              f"per step in the windows;\nwith {limits['hypotheses_per_step_wider']:.1f} the errors change by at most "
              f"{limits['change_percent']:.1g} %\n")


@cli.in_style
def draw_filter(report, posterior, states, start, centers=None):
    """Circle posterior (n, K) over a stretch of time under the true circles (n,), and the error per horizon: a Figure.

    start: the time step of the first one; report: as `measure` returns it; centers: when the centre walks, what
    `center_paths` returns, which gets a panel of its own.
    """
    K, panels = posterior.shape[1], [0.12, 1] + ([] if centers is None else [1]) + [1]
    fig, axes = figures.new_figure(len(panels), 1, panel=(9.0, 2.4), title="Bayes-optimal filter",
                                   gridspec_kw={"height_ratios": panels})
    strip, heat, *center, curve = axes[:, 0]
    figures.state_strip(strip, states, K, start=start, label="true circle")
    figures.heatmap_panel(fig, heat, posterior, start=start, ylabel="circle", unit="P(circle | past)",
                          cmap="Greys", limits=(0, 1))
    heat.set_xlabel("time step")
    if centers is not None:
        center_panel(center[0], *centers, start)
    figures.circle_legend(fig, K)
    horizons = [row["horizon"] for row in report["horizons"]]
    for key, label, marker in (("mse", "whole series", "o"), ("val_mse", "validation part", "s"),
                               ("val_window_mse", f"windows of {report['seq_len']:,} steps", "^")):
        curve.plot(horizons, [row[key] for row in report["horizons"]], marker=marker, markersize=4, label=label)
    if centers is not None:
        curve.plot(horizons, [row["told_mse"] for row in report["horizons"]], color="0.4", linestyle=":",
                   label="circle and phase told")
    curve.axhline(report["noise_floor"], color="0.4", linestyle="--", label="noise floor")
    curve.set_xscale("log", base=2)
    curve.set_xticks(horizons, [str(k) for k in horizons])
    curve.minorticks_off()
    curve.set(xlabel="horizon (steps)", ylabel="mean squared error (data units²)")
    curve.legend()
    return fig


def center_panel(ax, reference, label, inferred, start):
    """The path of the centre in its first FEATURES_SHOWN features: the true one and the one inferred from the past."""
    steps = np.arange(start, start + len(inferred))
    for c in range(min(FEATURES_SHOWN, inferred.shape[1])):
        color = ("0.0", "0.4", "0.65")[c]
        ax.plot(steps, reference[:, c], color=color, linewidth=2.5, alpha=0.35, label=label if c == 0 else None)
        ax.plot(steps, inferred[:, c], color=color, linewidth=0.8, label="inferred from the past" if c == 0 else None)
    ax.set(xlabel="time step", ylabel=f"centre, features 0…{c}\n(data units)", xlim=(steps[0], steps[-1] + 1))
    ax.legend()


def center_paths(series, process, shown, inferred):
    """The centre (n, feature_dim) over the slice `shown`, what it is called, and `inferred` over the same steps.

    The true path is drawn again from the seed in config.json. If it isn't that of this series, an observer's takes its
    place who is told circle and phase and sees the whole series.
    """
    X, states, thetas = (values[:shown.stop] for values in (series.X, series.states, series.thetas))
    on_circle = X - circle_process.points(process, states, thetas)
    true = circle_process.centers_again(series.config, len(X), process.feature_dim)
    if true is not None and abs(np.std((on_circle - true)[shown]) / process.noise_std - 1) < 0.1:
        return true[shown], "true", inferred[shown]
    _, told = moving_filter.follow_walk(on_circle, process.center_walk_std, process.noise_std)
    return told[shown], "circle and phase told", inferred[shown]


def main(args):
    save_dir, name = cli.output_folder(args.save_dir), args.name
    series = dataset.load_series(args.data_dir)
    process = process_from_series(series)
    report, posterior, center = measure(args, series, process)
    print_report(report, process, series)
    cli.write_json(save_dir / f"{name}.json", report)
    print(f"wrote {save_dir / name}.json")
    start = report["first_validation_step"]
    shown = slice(start, min(start + SHOWN_STEPS, series.n_steps))
    centers = center_paths(series, process, shown, center) if process.center_walk_std else None
    fig = draw_filter(report, posterior[shown], series.states[shown], start, centers)
    figures.save(fig, save_dir / f"{name}.png")


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()
    # The script runs as the module `optimal_filter`, not as `__main__`: numba stores a compiled kernel under the types
    # of its arguments, FilterState and Tables among them, whose module is part of the type. Those of `__main__` are
    # new in every process, so that the kernels would be compiled again each time.
    import optimal_filter

    cli.run(optimal_filter.main, ARGS)
