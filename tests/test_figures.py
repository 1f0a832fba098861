"""Figures: what is drawn, where it lies, and what is written. Colours are read off the rendered pixels."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

import cli
import figures


def rendered(fig):
    """The pixels (rows, cols, 3) of a figure, in 0…1, the first row at its bottom."""
    fig.canvas.draw()
    return np.array(fig.canvas.buffer_rgba())[::-1, :, :3] / 255


def color_at(fig, ax, x, y, pixels=None):
    """The rendered colour at the data coordinates (x, y) of an Axes."""
    pixels = rendered(fig) if pixels is None else pixels
    col, row = np.floor(ax.transData.transform((x, y))).astype(int)
    return pixels[row, col]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


# ---- colours and layout ----------------------------------------------------------------------------------------


def test_up_to_ten_circles_have_colours_of_their_own_that_do_not_depend_on_how_many_there_are():
    ten = figures.circle_colors(10)
    assert ten.shape == (10, 3) and len({tuple(color) for color in ten}) == 10
    assert [to_hex(color) for color in ten[:4]] == ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2"]
    for n in range(1, 10):
        np.testing.assert_array_equal(figures.circle_colors(n), ten[:n])


def linear(rgb):
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


# Machado, Oliveira & Fernandes 2009, severity 1: linear RGB as readers with these eyes see it.
EYES = {
    "most": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(rgb, eyes="most"):
    """CIELAB (n, 3) of sRGB colours (n, 3) as these eyes see them."""
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])
    seen = np.clip(linear(np.asarray(rgb)) @ np.transpose(EYES[eyes]), 0, 1)
    x, y, z = (np.where(v > (6 / 29) ** 3, np.cbrt(v), v * 29 ** 2 / 108 + 4 / 29)
               for v in (seen @ to_xyz.T / [0.95047, 1, 1.08883]).T)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def ciede2000(one, other):
    """The difference of two colours in CIELAB (Sharma, Wu & Dalal 2005)."""
    (L1, a1, b1), (L2, a2, b2) = one, other
    C7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(C7 / (C7 + 25 ** 7))
    C1, C2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180
    L, C, h = (L1 + L2) / 2 - 50, (C1 + C2) / 2, h1 + turn / 2
    T = (1 - 0.17 * np.cos(np.radians(h - 30)) + 0.24 * np.cos(np.radians(2 * h))
         + 0.32 * np.cos(np.radians(3 * h + 6)) - 0.2 * np.cos(np.radians(4 * h - 63)))
    lightness = (L2 - L1) / (1 + 0.015 * L ** 2 / np.sqrt(20 + L ** 2))
    chroma = (C2 - C1) / (1 + 0.045 * C)
    hue = 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * C * T)
    rotation = (-2 * np.sqrt(C ** 7 / (C ** 7 + 25 ** 7))
                * np.sin(np.radians(60 * np.exp(-(((h % 360) - 275) / 25) ** 2))))
    return np.sqrt(lightness ** 2 + chroma ** 2 + hue ** 2 + rotation * chroma * hue)


def test_the_difference_of_colours_is_that_of_the_published_examples():
    for one, other, wanted in (((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
                               ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
                               ((50, 2.5, 0), (58, 24, 15), 19.4535)):
        assert ciede2000(one, other) == pytest.approx(wanted, abs=1e-4)


def smallest_difference(colors, eyes):
    return min(ciede2000(one, other) for one, other in itertools.combinations(lab(colors, eyes), 2))


@pytest.mark.parametrize("eyes", EYES)
def test_ten_circles_can_be_told_apart_by_readers_with_a_colour_deficiency(eyes):
    assert smallest_difference(figures.circle_colors(10), eyes) >= 11.9


@pytest.mark.parametrize("eyes", EYES)
def test_runs_can_be_told_apart_and_from_circles(eyes):
    runs = figures.run_colors(7)
    assert smallest_difference(runs, eyes) >= 20
    assert min(ciede2000(one, other) for one in lab(runs) for other in lab(figures.circle_colors(10))) >= 10
    assert len({tuple(color) for color in figures.run_colors(20)}) == 20
    np.testing.assert_array_equal(figures.run_colors(3), runs[:3])


def test_more_than_ten_circles_are_coloured_by_their_number_from_dark_to_light():
    fig, _ = figures.new_figure()
    for n in (11, 13, 40):
        colors = figures.circle_colors(n)
        assert colors.shape == (n, 3) and (np.diff(lab(colors)[:, 0]) > 0).all()
    assert figures.circle_legend(fig, 11).get_title().get_text() == "circle,\nby number"
    assert figures.circle_legend(fig, 10).get_title().get_text() == "circle"


def test_a_figure_has_its_panels_in_rows_and_columns_and_the_size_of_all_of_them():
    fig, axes = figures.new_figure(2, 3, panel=(4, 2.5), title="three by two", sharex=True)
    assert axes.shape == (2, 3)
    assert fig.get_size_inches().tolist() == [12, 5]
    assert fig.get_suptitle() == "three by two"
    axes[0, 0].set_xlim(3, 8)
    assert axes[1, 2].get_xlim() == (3, 8)
    assert figures.new_figure()[0].get_suptitle() == ""
    pixels = rendered(fig)
    assert pixels.shape[:2] == (5 * 150, 12 * 150)
    above, left = (axes[i, j].get_position() for i, j in ((0, 0), (1, 2)))
    assert above.y0 > left.y1 and above.x1 < left.x0


def test_a_laid_out_figure_keeps_its_places():
    fig, axes = figures.new_figure(1, 2, title="a title that takes room")
    axes[0, 0].set_ylabel("a label")
    figures.laid_out(fig)
    before = [ax.get_position().bounds for ax in axes[0]]
    assert fig.get_layout_engine() is None
    assert before != [ax.get_position().bounds for ax in figures.new_figure(1, 2)[1][0]]
    axes[0, 0].set_ylabel("a label\nof several\nlines")
    assert figures.laid_out(fig) is fig
    rendered(fig)
    assert [ax.get_position().bounds for ax in axes[0]] == before


def test_unused_panels_are_the_last_ones():
    _, axes = figures.new_figure(2, 3)
    figures.hide_unused(axes, 4)
    assert [ax.axison for ax in axes.ravel()] == [True] * 4 + [False] * 2


def test_bare_axes_have_no_ticks():
    _, axes = figures.new_figure()
    axes[0, 0].plot([0, 1], [0, 1])
    figures.bare(axes[0, 0])
    assert len(axes[0, 0].get_xticks()) == len(axes[0, 0].get_yticks()) == 0


def test_logarithmic_ticks_are_plain_numbers():
    fig, axes = figures.new_figure()
    ax = axes[0, 0]
    ax.plot([1, 2], [0.8, 60])
    ax.set_yscale("log")
    figures.log_ticks(ax.yaxis, [1, 3])
    rendered(fig)
    low, high = ax.get_ylim()
    shown = [label.get_text() for label, at in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
             if low <= at <= high]
    assert shown == ["1", "3", "10", "30"]
    assert len(ax.yaxis.get_minorticklocs()) == 0


# ---- panels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 70])
def test_a_strip_shows_the_circle_of_each_step_at_its_time(start):
    states = np.array([2, 2, 0, 1, 3, 3, 3])
    fig, axes = figures.new_figure(panel=(5, 1))
    figures.state_strip(axes[0, 0], states, 4, start, label="true circle")
    ax = axes[0, 0]
    pixels = rendered(fig)
    for i, state in enumerate(states):
        np.testing.assert_allclose(color_at(fig, ax, start + i, 0.5, pixels), figures.circle_colors(4)[state],
                                   atol=0.01)
        for edge in (-0.4, 0.4):
            np.testing.assert_allclose(color_at(fig, ax, start + i + edge, 0.2, pixels),
                                       figures.circle_colors(4)[state], atol=0.01)
    assert ax.get_xlim() == (start - 0.5, start + 6.5)
    assert len(ax.images) == 1
    assert ax.get_ylabel() == "true circle" and len(ax.get_yticks()) == 0
    assert not any(side.get_visible() for side in ax.spines.values())


def test_a_heatmap_has_time_to_the_right_and_channels_upwards():
    values = np.random.default_rng(0).uniform(-1, 3, size=(9, 4))
    fig, axes = figures.new_figure(panel=(6, 3))
    figures.heatmap_panel(fig, axes[0, 0], values, start=50, ylabel="channel", title="a title", unit="data units",
                          limits=(-1, 3))
    ax, bar = fig.axes
    pixels = rendered(fig)
    for t, c in itertools.product(range(9), range(4)):
        for edge in (-0.35, 0.35):
            wanted = matplotlib.colormaps["viridis"]((values[t, c] + 1) / 4)[:3]
            np.testing.assert_allclose(color_at(fig, ax, 50 + t + edge, c + edge, pixels), wanted, atol=0.01)
    assert ax.get_xlim() == (49.5, 58.5) and ax.get_ylim() == (-0.5, 3.5)
    assert (ax.get_ylabel(), ax.get_title(loc="left"), bar.get_ylabel()) == ("channel", "a title", "data units")
    assert all(tick == int(tick) for tick in ax.get_yticks())
    # The colour bar is bright where the values are large.
    np.testing.assert_allclose(color_at(fig, bar, 0.5, 2.97, pixels), matplotlib.colormaps["viridis"](255)[:3],
                               atol=0.03)


def percentile(values, share):
    """Linear interpolation between the sorted values."""
    ordered = sorted(values.ravel().tolist())
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def heatmap(values, **options):
    fig, axes = figures.new_figure()
    figures.heatmap_panel(fig, axes[0, 0], values, **options)
    return fig, axes[0, 0].images[0]


def test_colours_span_all_values_but_the_outliers():
    values = np.random.default_rng(0).normal(3, 1, size=(200, 5))
    values[10, 2], values[70, 3] = 1e6, -1e6
    _, image = heatmap(values)
    assert image.get_clim() == pytest.approx((percentile(values, 0.01), percentile(values, 0.99)))
    assert image.get_cmap().name == "viridis"
    _, image = heatmap(values, symmetric=True, cmap="RdBu_r")
    assert image.get_clim() == pytest.approx((-percentile(values, 0.99), percentile(values, 0.99)))
    assert image.get_cmap().name == "RdBu_r"
    _, image = heatmap(-values, symmetric=True)
    assert image.get_clim() == pytest.approx((-percentile(values, 0.99), percentile(values, 0.99)))
    _, image = heatmap(np.full((10, 2), 7.0))
    assert image.get_clim() == (6.5, 7.5)


@pytest.mark.parametrize(("limits", "beyond"), [((0, 1), "neither"), ((0.2, 1), "min"), ((0, 0.8), "max"),
                                                ((0.2, 0.8), "both")])
def test_fixed_limits_hold_and_the_bar_shows_that_values_lie_beyond(limits, beyond):
    _, image = heatmap(np.linspace(0, 1, 12).reshape(4, 3), limits=limits)
    assert image.get_clim() == limits
    assert image.colorbar.extend == beyond


def test_a_scatter_shows_each_point_in_its_colour():
    points = np.random.default_rng(0).standard_normal((50, 2))
    colors = figures.circle_colors(5)[np.arange(50) % 5]
    _, axes = figures.new_figure()
    dots = figures.scatter_panel(axes[0, 0], points, colors, title="by circle")
    np.testing.assert_array_equal(dots.get_offsets(), points)
    np.testing.assert_allclose(dots.get_facecolors()[:, :3], colors)
    assert dots.get_facecolors()[0, 3] == 0.8
    assert axes[0, 0].get_title() == "by circle" and len(axes[0, 0].get_xticks()) == 0


def test_a_scatter_of_values_uses_a_colour_map():
    points, values = np.random.default_rng(0).standard_normal((50, 2)), np.arange(50) * 2.0
    _, axes = figures.new_figure()
    dots = figures.scatter_panel(axes[0, 0], points, values=values, cmap="plasma", size=5)
    np.testing.assert_array_equal(dots.get_array(), values)
    assert dots.get_cmap().name == "plasma" and dots.get_sizes().tolist() == [5]


@pytest.mark.parametrize(("n", "area"), [(10, 12), (4000, 5), (100_000, 1)])
def test_dots_are_smaller_where_there_are_more(n, area):
    _, axes = figures.new_figure()
    assert figures.scatter_panel(axes[0, 0], np.zeros((n, 2)), "black").get_sizes().tolist() == [area]


# ---- legend and UMAPs ------------------------------------------------------------------------------------------


def test_a_legend_names_the_circles_that_are_there_in_their_colours():
    fig, axes = figures.new_figure()
    legend = figures.circle_legend(fig, 6, np.array([1, 4]))
    assert texts(legend) == ["1", "4"] and legend.get_title().get_text() == "circle"
    assert [to_rgb(line.get_color()) for line in legend.get_lines()] == [
        tuple(figures.circle_colors(6)[i]) for i in (1, 4)]
    assert legend._ncols == 1 and legend in fig.legends
    on_axes = figures.circle_legend(axes[0, 0], 31, loc="upper left")
    assert texts(on_axes) == [str(i) for i in range(31)]
    assert on_axes._ncols == 3 and axes[0, 0].get_legend() is on_axes
    assert figures.circle_legend(axes[0, 0], 15, loc="upper left")._ncols == 1


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (9, (2, 5)), (12, (3, 5))])
def test_umaps_stand_in_a_grid_each_under_its_title(n, shape):
    rng = np.random.default_rng(0)
    embeddings, states = rng.standard_normal((n, 40, 2)), np.arange(40) % 5
    states[states == 3] = 1
    fig = figures.draw_umaps(embeddings, [f"title {i}" for i in range(n)], states, 5, "all of them")
    assert isinstance(fig, Figure) and fig.get_suptitle() == "all of them"
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    for i, ax in enumerate(fig.axes):
        assert ax.axison == (i < n)
        if i < n:
            assert ax.get_title() == f"title {i}"
            np.testing.assert_array_equal(ax.collections[0].get_offsets(), embeddings[i])
            np.testing.assert_allclose(ax.collections[0].get_facecolors()[:, :3], figures.circle_colors(5)[states])
    assert texts(fig.legends[0]) == ["0", "1", "2", "4"]


# ---- files -----------------------------------------------------------------------------------------------------


def plain_figure(color, size=(2, 1)):
    fig, axes = figures.new_figure(panel=size)
    fig.set_facecolor(color)
    axes[0, 0].axis("off")
    return fig


def test_figures_are_written_under_their_names_at_150_dots_an_inch(tmp_path, capsys):
    wanted = {tmp_path / "b.png": "red", tmp_path / "a.png": "blue", tmp_path / "c.png": "lime"}
    figures.save_all({path: plain_figure(color) for path, color in wanted.items()})
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in wanted]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    for path, color in wanted.items():
        pixels = imread(path)
        assert pixels.shape[:2] == (150, 300)
        np.testing.assert_allclose(pixels[..., :3], np.broadcast_to(to_rgb(color), (150, 300, 3)), atol=0.01)
        content = path.read_bytes()
        assert b"Software" not in content
        assert content[content.index(b"pHYs") + 4:][:8] == (5906).to_bytes(4, "big") * 2  # dots a metre


def test_saving_shows_the_figure_as_it_is_drawn(tmp_path):
    fig, axes = figures.new_figure(panel=(3, 2))
    axes[0, 0].imshow([[0, 1], [2, 3]], extent=(0, 2, 0, 2))
    figures.save(fig, tmp_path / "one.png")
    np.testing.assert_allclose(imread(tmp_path / "one.png")[::-1, :, :3], rendered(fig), atol=0.005)


def test_a_figure_that_can_not_be_written_leaves_the_older_file(tmp_path, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.image, "imsave", full)
    with pytest.raises(cli.UserError, match="No space left"):
        figures.save(plain_figure("red"), tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_style_is_that_of_the_project_while_it_draws_and_nowhere_else():
    @cli.in_style
    def draw():
        fig, axes = figures.new_figure()
        axes[0, 0].set_title("title")
        axes[0, 0].plot([1, 2], label="line")
        assert matplotlib.rcParams["font.size"] == 10
        return fig, axes[0, 0], axes[0, 0].legend()

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "legend.frameon": True, "figure.dpi": 50}):
        fig, ax, legend = draw()
        fig.draw_without_rendering()
        assert matplotlib.rcParams["font.size"] == 20
    assert dict(matplotlib.rcParams) == before
    assert fig.dpi == 150 and not ax.spines["top"].get_visible() and not legend.get_frame_on()
    assert ax.title.get_fontsize() == 11 and not any(line.get_visible() for line in ax.get_xgridlines())
    assert {label.get_fontsize() for label in ax.get_xticklabels()} == {9}


def test_every_function_that_makes_a_figure_draws_in_style():
    for path in Path(figures.__file__).parent.glob("*.py"):
        for head, body in re.findall(r"((?:^@.*\n)*)^def \w+\(.*\n((?:(?:    .*)?\n)*)", path.read_text("utf-8"), re.M):
            assert "new_figure(" not in body or "@cli.in_style" in head, (path, body[:80])


# ---- formats, pages and where a figure comes from ----------------------------------------------------------------


def made_with(**flags):
    """A context like that of a script that was started with these flags."""
    return cli._running(SimpleNamespace(**{"format": "png", "style": None, "data_dir": "some/data", **flags}))


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/folder/generate.py", "--gen-len", "5", "--save-dir", "a b"])
    monkeypatch.setattr(cli, "git_commit", lambda: "0123abc-dirty")
    return "python generate.py --gen-len 5 --save-dir 'a b'"


def test_a_png_tells_command_commit_and_data(tmp_path, command):
    with made_with():
        figures.save(plain_figure("red"), tmp_path / "a.png")
    assert PIL.Image.open(tmp_path / "a.png").text == {
        "Command": command, "Commit": "0123abc-dirty", "Data": "some/data"}
    figures.save(plain_figure("red"), tmp_path / "b.png")  # in a notebook
    assert PIL.Image.open(tmp_path / "b.png").text == {}


@pytest.mark.parametrize(("form", "starts"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_in_other_formats_tell_it_too_and_are_the_same_each_time(tmp_path, capsys, command, form, starts):
    contents = []
    for _ in range(2):
        with made_with(format=form):
            assert figures.save_all({tmp_path / "a_T0.5.png": plain_figure("red")}) == [tmp_path / f"a_T0.5.{form}"]
        contents.append((tmp_path / f"a_T0.5.{form}").read_bytes())
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'a_T0.5'}.{form}"
    assert contents[0] == contents[1] and contents[0].startswith(starts)
    assert [path.name for path in tmp_path.iterdir()] == [f"a_T0.5.{form}"]
    if form == "svg":
        text = contents[0].decode()
        assert "commit: 0123abc-dirty; data: some/data" in text and "--gen-len 5" in text
    else:
        assert b"commit: 0123abc-dirty; data: some/data" in contents[0]


def test_json_tells_it_too(tmp_path, command):
    with made_with():
        cli.write_json(tmp_path / "a.json", {"points": 5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"points": 5, "made_by": {
        "command": command, "commit": "0123abc-dirty", "data": "some/data"}}
    cli.write_json(tmp_path / "b.json", {"points": 5})
    assert json.loads((tmp_path / "b.json").read_text()) == {"points": 5}
    with made_with(data_dir=None):
        assert cli.made_by()["data"] is None
        cli.reads_data(Path("the/checkpoint's"))  # where no flag names them
        assert cli.made_by()["data"] == "the/checkpoint's"


def wide_figure():
    fig, axes = figures.new_figure(2, 4, panel=(3.7, 3.0), title="wide")
    for ax in axes.flat:
        ax.plot([0, 1], [0, 1])
        ax.set_title("circle accuracy of a linear probe", fontsize=6)
        ax.set_xlabel("layer", fontsize=5)
    axes[0, 0].text(0, 0, "small", fontsize=4)
    figures.circle_legend(fig, 3)
    return fig


@pytest.mark.parametrize(("style", "size"), [("paper", (7, 6)), ("talk", (13.3, 7.5)), (None, (14.8, 6))])
def test_no_text_is_too_small_on_a_page_or_a_slide(tmp_path, style, size):
    fig = wide_figure()
    with made_with(style=style):
        figures.save(fig, tmp_path / "a.png")
    np.testing.assert_allclose(fig.get_size_inches(), size)
    sizes = [text.get_fontsize() for text in fig.findobj(Text) if text.get_text()]
    assert min(sizes) == {"paper": 8, "talk": 14.5, None: 4}[style]
    assert style is None or min(sizes) * 6.5 / fig.get_figwidth() >= 7  # printed 6.5 inches wide
    assert style != "paper" or max(sizes) <= 10
    pixels = imread(tmp_path / "a.png").shape
    assert pixels[1] == pytest.approx(size[0] * (300 if style == "paper" else 150), abs=1)
    for ax in fig.axes if style else []:
        assert ax.title.get_window_extent().width <= 1.1 * ax.get_window_extent().width


def test_a_small_figure_keeps_its_size_on_a_page_and_fills_a_slide(tmp_path):
    for style, size in (("paper", (4, 3)), ("talk", (13.3, 7.5))):
        fig, axes = figures.new_figure(title="small")
        axes[0, 0].set_xlabel("layer")
        with made_with(style=style):
            figures.save(fig, tmp_path / "a.png")
        np.testing.assert_allclose(fig.get_size_inches(), size)
        assert axes[0, 0].xaxis.label.get_fontsize() == (10 if style == "paper" else 25)


@pytest.mark.parametrize("style", ["paper", "talk"])
def test_legends_labels_and_ticks_fit_on_a_page_and_a_slide(tmp_path, style):
    fig, axes = figures.new_figure(3, 7, panel=(2.3, 1.5), title="crowded")
    for ax in axes.flat:
        for i in range(5):
            ax.plot([90_000, 91_000], [i, i], label=f"sample {i}")
        ax.set_xticks([90_000, 90_250, 90_500, 90_750])
    axes[0, 0].legend(ncols=5)
    axes[0, 6].set_xticks([90_000, 90_200, 90_400], ["delta", "conv", "gate"])
    label = "standard deviations from the mean of each channel " * 5
    axes[2, 3].set_xlabel(label.strip())
    with made_with(style=style):
        figures.save(fig, tmp_path / "a.png")
    assert axes[0, 0].get_window_extent().width > 0.05 * fig.bbox.width  # the legend doesn't squeeze it
    assert axes[0, 0].get_legend()._ncols < 5
    assert axes[2, 3].xaxis.label.get_window_extent().width <= fig.bbox.width
    assert axes[2, 3].get_xlabel().split() == label.split()
    assert {text.get_rotation() for text in axes[0, 6].get_xticklabels()} == {90}
    for ax in axes[:, :6].flat:
        boxes = [text.get_window_extent() for text in ax.get_xticklabels() if text.get_text()]
        assert boxes and all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_a_long_title_stays_in_the_figure_and_clear_of_the_legend(tmp_path):
    fig, axes = figures.new_figure(panel=(9, 4), title="model_next_" + "d_model32_" * 12 + ": validation window 0")
    axes[0, 0].plot([0, 1], label="horizon 1")
    legend = fig.legend(loc="outside right upper")
    figures.save(fig, tmp_path / "a.png")
    title = fig._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= legend.get_window_extent().x0
    assert fig.get_suptitle().replace("\n", "").endswith("window 0") and "\n" in fig.get_suptitle()
    short = figures.new_figure(panel=(9, 4), title="model: validation window 0")[0]
    figures.save(short, tmp_path / "b.png")
    assert short.get_suptitle() == "model: validation window 0"
