"""What the tests of figures share: which array a panel shows, over which steps, in which colours."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import figures


def check_strip(ax, states, start=0, n_circles=4, label="circle"):
    """A strip of circles that begins at time step `start`."""
    (image,) = ax.images
    colors = [to_rgb(figures.OFF_COLOR) if i == figures.OFF else figures.circle_colors(n_circles)[i] for i in states]
    np.testing.assert_array_equal(image.get_array(), [colors])
    assert list(image.get_extent()) == [start - 0.5, start + len(states) - 0.5, 0, 1]
    assert ax.get_ylabel() == label


def check_heatmap(ax, values, start=0, limits=None, cmap=None):
    """values (n_steps, n_features): time to the right from step `start` on, features upwards."""
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array(), np.asarray(values).T, rtol=1e-6, atol=1e-6)
    assert image.origin == "lower"
    assert list(image.get_extent()) == [start - 0.5, start + len(values) - 0.5, -0.5, np.shape(values)[1] - 0.5]
    if limits is not None:
        np.testing.assert_allclose(image.get_clim(), limits, rtol=1e-6)
    if cmap is not None:
        assert image.get_cmap().name == cmap


def check_circle_legend(target, circles, n_circles=4):
    """A legend of a Figure or of Axes, with these circles in their colours."""
    (legend,) = target.legends if isinstance(target, Figure) else [target.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["off" if i == figures.OFF else str(i) for i in circles]
    for handle, i in zip(legend.legend_handles, circles, strict=True):
        color = to_rgb(figures.OFF_COLOR) if i == figures.OFF else figures.circle_colors(n_circles)[i]
        np.testing.assert_allclose(to_rgb(handle.get_color()), color)
    assert legend.get_title().get_text() == "circle"


def left_title(ax):
    return ax.get_title(loc="left")


def colour_bars(fig):
    """The labels of the figure's colour bars, in their order."""
    return [ax.get_ylabel() for ax in fig.axes if ax.get_label() == "<colorbar>"]


def lines(ax):
    """{label: (x, y)} of the curves of Axes; a line without a label of its own counts by its number."""
    return {line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in ax.lines}


def bursts_marked(ax):
    """[[first - 0.5, last + 0.5], …]: the steps that the black bars above an axis cover."""
    (marks,) = [c for c in ax.collections if not len(c.get_segments()) or c.get_transform() != ax.transData]
    return [segment[:, 0].tolist() for segment in marks.get_segments()]


def text_rows(table):
    """The cells of the lines of a printed table that are under its rule."""
    lines = table.splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) <= {"-", " "} and line.strip())
    return [line.split() for line in lines[rule + 1:]]
