"""What the exact observer reaches, for all models that are measured on one series: floors, beliefs and a test series.

Everything is computed once, however many models there are, as long as they see windows of the same length. For data
whose process isn't known there is none of it, and a line says why.
"""

from typing import NamedTuple

import numpy as np
import torch

import beliefs
import dataset
import excess
import learned
import measures
import optimal_filter
import representations
import terminal
import unseen

BELIEF_STEPS = 100_000  # new steps, at most, that score the beliefs and tell where the excess falls


class Tested(NamedTuple):
    """New steps of the process in windows, and what the exact filter makes of them."""

    part: unseen.Unseen
    windows: torch.Tensor  # (n, seq_len, feature_dim)
    believed: beliefs.Beliefs  # (n, seq_len, …) each
    near: np.ndarray  # (n, seq_len) bool: near the end of a revolution
    events: np.ndarray  # (n, seq_len - 1) which of excess.EVENTS each prediction of the next step is

    def rows(self, level, velocity=False):
        """One row per step of a level in these windows (n, seq_len, …); with velocity the change since the step before,
        which the first step of a window has none of."""
        level = np.asarray(level)
        return (np.diff(level, axis=1) if velocity else level).reshape(-1, *level.shape[2:])


class Optimum:
    """The exact filter of a series. test_steps: as from --test-steps; seed: draws the steps that fit a Readout."""

    def __init__(self, series, test_steps=None, seed=0):
        self.series, self.test_steps, self.seed = series, test_steps, seed
        self.floors, self.tests, self.learners, self.in_windows, self.readouts = {}, {}, {}, {}, {}
        self.process = optimal_filter.process_or_none(series, "no optimal floor and ceiling")
        self.circle_accuracy = None if self.process is None else self.measure_circle_accuracy()

    def measure_circle_accuracy(self):
        """How often the filter, given all of the past, names the true circle, over the steps that score the probes."""
        with terminal.Bar(self.series.n_steps, desc="exact filter") as bar:
            posterior = optimal_filter.predict(self.process, self.series.X, horizons=(), keep_predictions=False,
                                               progress=bar.update)["circle_posterior"]
        _, scored = measures.probe_split(self.series.n_steps, np.random.default_rng(0))
        return float((posterior.argmax(axis=1) == self.series.states)[scored].mean())

    def window_floors(self, starts, seq_len, horizons):
        """`optimal_filter.window_floors` of these windows, each begun without a past, as by a model; {} if unknown."""
        if self.process is None:
            return {}
        key = (starts.tobytes(), seq_len, tuple(horizons))
        if key not in self.floors:  # models to be compared mostly share their windows
            self.floors[key] = optimal_filter.window_floors(self.process, self.series, starts, seq_len, horizons)
        return self.floors[key]

    def held_back(self, trained_with):
        """How many steps of the series its training has left to the test; trained_with: the flags of the training."""
        return unseen.left_to_the_test(trained_with, self.series, self.process)

    def test_part(self, seq_len, held_back):
        """The unseen.Unseen of the whole test series; None without one. held_back: as from the method of that name."""
        if (seq_len, held_back) not in self.tests:
            with terminal.busy("test series"):
                self.tests[seq_len, held_back] = unseen.unseen_part(self.series, self.process, seq_len,
                                                                    self.test_steps, held_back)
        return self.tests[seq_len, held_back]

    def learner(self, n_steps):
        """The learned.Learner with the first n_steps steps and their labels; None where the process isn't known."""
        if self.process is None:
            return None
        if n_steps not in self.learners:
            self.learners[n_steps] = learned.learner_of(self.series, n_steps)
        return self.learners[n_steps]

    def test_errors(self, model, seq_len, held_back, learner=None):
        """`unseen.as_report` of a model, which is printed; None without a test series."""
        tested = self.test_part(seq_len, held_back)
        if tested is None:
            return None
        with terminal.busy("errors on the test series"):
            report = unseen.as_report(model, tested, learner)
        unseen.print_report(report)
        return report

    def tested(self, seq_len):
        """BELIEF_STEPS new steps, or --test-steps if these are fewer, in windows of seq_len: a Tested; None without."""
        n_steps = BELIEF_STEPS if self.test_steps is None else min(BELIEF_STEPS, self.test_steps)
        if self.process is None or n_steps == 0 or seq_len < 2:
            return None
        if seq_len not in self.in_windows:
            part = unseen.unseen_part(self.series, self.process, seq_len, n_steps)
            self.in_windows[seq_len] = None if part is None else self.test_windows(part)
        return self.in_windows[seq_len]

    def test_windows(self, part):
        X, states, thetas = part.series.X, part.series.states, part.series.thetas
        with terminal.Bar(len(part.starts) * part.seq_len, desc="exact filter, test series") as bar:
            believed = beliefs.in_windows(self.process, X, part.starts, part.seq_len, part.first_steps, bar.update)
        near = beliefs.near_an_end(self.process, states, thetas)
        if believed.revolutions is None:
            print("the circles move, and their filter does not count revolutions: that belief is left out")
        return Tested(part, dataset.gather(X, part.starts, part.seq_len), believed,
                      near[part.starts[:, None] + np.arange(part.seq_len)],
                      excess.event_classes(self.process, states, thetas, part.starts, part.seq_len))

    def readout(self, window_settings, velocity=False):
        """The beliefs.Readout that is fitted on the training part and scored on new steps, and the number of rows of a
        level that lie in the training part: (readout, n); (None, 0) without new steps.

        window_settings: (seq_len, stride, val_fraction) of the model's training.
        """
        seq_len, _, val_fraction = window_settings
        tested = self.tested(seq_len)
        if tested is None:
            return None, 0
        key = (seq_len, val_fraction, velocity)
        if key not in self.readouts:
            series = self.series
            n = dataset.first_validation_step(series.n_steps, val_fraction)
            starts, length = representations.overlapping_windows(series.n_steps, seq_len)
            starts = [start for start in starts if start < n]
            with terminal.Bar(len(starts) * length, desc="exact filter, training part") as bar:
                believed = beliefs.in_windows(self.process, series.X, starts, length, progress=bar.update)
            believed = [None if values is None else representations.stitch(torch.from_numpy(values), starts)[:n]
                        for values in believed]
            steps = representations.steps_of_rows(series, velocity)
            steps = steps[steps < n]
            near = beliefs.near_an_end(self.process, series.states[:n], series.thetas[:n])
            later = slice(int(velocity), None)  # a window's first step has no velocity
            self.readouts[key] = beliefs.Readout(
                beliefs.rows_of(beliefs.Beliefs(*believed), steps), near[steps],
                beliefs.Beliefs(*(None if values is None else tested.rows(values[:, later])
                                  for values in tested.believed)),
                tested.rows(tested.near[:, later]), self.seed), len(steps)
        return self.readouts[key]
