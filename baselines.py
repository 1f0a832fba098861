"""What can be had without a trained model: the yardsticks that stand beside its levels in every table and figure.

  low-passed input      the mean over the last 4 time steps of the input, measured like a level
  quadratic probe       the circle and phase probes on all products of two features of one time step: no memory
  untrained model       the same architecture with random initial weights, measured like the trained one
  linear autoregression the best linear prediction of the next step from up to 32 steps before it

A number that a trained layer shares with one of these says nothing about the training.
"""

import numpy as np
import scipy.linalg
import torch

import dataset
import mamba_model
import measures

LOW_PASS_STEPS = 4
QUADRATIC_COMPONENTS = 40  # principal components that products are taken of, where there are more features
LAGS = 32
MOST_COEFFICIENTS = 2000  # per feature: with very many features there are fewer lags
MOST_STEPS = 1_000_000  # of the training part that the autoregression is fitted to


def low_passed(X, recordings):
    """The mean over the last LOW_PASS_STEPS steps of each recording of X (n, width), of fewer at its beginning."""
    found = np.empty(X.shape, np.float32)
    for first, end in recordings.tolist():
        piece = np.asarray(X[first:end])
        total = sum(np.pad(piece[:len(piece) - lag], ((lag, 0), (0, 0)))
                    for lag in range(min(LOW_PASS_STEPS, len(piece))))
        found[first:end] = total / np.minimum(np.arange(1, len(piece) + 1), LOW_PASS_STEPS)[:, None]
    return found


def products(X):
    """The features of X (n, width) and the products of each two of them, (n, width (width + 3) / 2) float32."""
    if X.shape[1] > QUADRATIC_COMPONENTS:
        mean, _, vectors = measures.spectrum(X)
        X = measures.principal_components(X, mean, vectors, QUADRATIC_COMPONENTS)
    first, second = np.triu_indices(X.shape[1])
    return np.concatenate([X, X[:, first] * X[:, second]], axis=1).astype(np.float32)


def untrained_like(model, seed):
    """A model of the same architecture with the initial weights that this seed gives; on the same device."""
    block = model.layers[0].mamba
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = mamba_model.CausalTimeSeriesMamba(
            model.feature_dim, model.d_model, model.n_layers, block.d_state, block.d_conv,
            block.d_inner // model.d_model, model.output_heads["1"][0].out_features, max_horizon=model.horizons[-1],
            mixture=model.mixture, constant=block.constant, relative=model.relative is not None)
    untrained.backends = dict(model.backends)
    return untrained.to(next(model.parameters()).device).eval()


# ---------------------------------------------------------------------------------------------------------------
# Linear autoregression


class Autoregression:
    """The best linear prediction of the next step from the steps of the window so far, up to the last `lags` of them.

    pieces: a list of arrays (n, width), stretches of the training part; equations that reach over the end of one are
    left out. There is a least-squares fit for each number of steps from 1 on, so that the first steps of a window are
    predicted as well as a linear predictor can, too. Raises ValueError when no piece is longer than the lags.
    """

    def __init__(self, pieces, lags=LAGS):
        width = pieces[0].shape[1]
        self.lags = max(1, min(lags, MOST_COEFFICIENTS // width))
        pieces = [np.asarray(piece[-MOST_STEPS:], dtype=np.float64) for piece in pieces if len(piece) > self.lags]
        if not pieces:
            raise ValueError(f"the training part has no {self.lags + 1} steps in a row")
        self.mean = np.concatenate(pieces).mean(axis=0)
        gram = np.zeros((self.lags * width, self.lags * width))
        right = np.zeros((self.lags * width, width))
        for piece in pieces:
            piece = piece - self.mean
            gram += lagged_gram(piece, self.lags)
            last = len(piece) - 1
            for lag in range(self.lags):  # x[t] against x[t - 1 - lag]
                past = piece[self.lags - 1 - lag:last - lag]
                right[lag * width:(lag + 1) * width] += past.T @ piece[self.lags:]
        gram[np.diag_indices_from(gram)] += 1e-10 * np.trace(gram) / len(gram) + 1e-300  # a feature may be constant
        self.weights = [scipy.linalg.solve(gram[:n, :n], right[:n], assume_a="pos")
                        for n in range(width, self.lags * width + 1, width)]

    def errors(self, X, starts, length):
        """Squared errors, means over the features, of the next step in windows of X: (n_windows, length - 1) float32.

        Position t holds that of the prediction of step t + 1 of the window from its steps 0…t.
        """
        found = np.empty((len(starts), length - 1), np.float32)
        for row, start in enumerate(np.asarray(starts).tolist()):
            window = np.asarray(X[start:start + length], dtype=np.float64) - self.mean
            lagged = [np.pad(window[:length - 1 - lag], ((lag, 0), (0, 0)))
                      for lag in range(min(self.lags, length - 1))]
            predicted = np.concatenate(lagged, axis=1) @ self.weights[len(lagged) - 1]
            for t in range(min(len(lagged) - 1, length - 1)):  # steps that have fewer lags behind them
                predicted[t] = window[t::-1].ravel() @ self.weights[t]
            found[row] = np.square(predicted - window[1:]).mean(axis=1)
        dataset.release(X)
        return found


def lagged_gram(X, lags):
    """Σ_t of the outer product of (x[t - 1], …, x[t - lags]) with itself, t = lags…n - 1: (lags * width, lags * width).

    X (n, width). Each block differs from the one before on its diagonal by its first and its last term alone, so that
    only the blocks of the first lag are sums over all steps.
    """
    n, width = X.shape
    blocks = np.zeros((lags, lags, width, width))
    for k in range(lags):
        blocks[0, k] = X[lags - 1:n - 1].T @ X[lags - 1 - k:n - 1 - k]
        for j in range(1, lags - k):
            blocks[j, j + k] = (blocks[j - 1, j + k - 1] + np.outer(X[lags - 1 - j], X[lags - 1 - j - k])
                                - np.outer(X[n - 1 - j], X[n - 1 - j - k]))
    for j in range(lags):
        for k in range(j):
            blocks[j, k] = blocks[k, j].T
    return blocks.transpose(0, 2, 1, 3).reshape(lags * width, lags * width)
