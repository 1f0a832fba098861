"""The page of report.py: what it holds, what it leaves out, and that it needs nothing but itself."""

import csv
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL

import figures
import report
import run_files
from mamba_model import CausalTimeSeriesMamba, save_checkpoint

COLUMNS = ["epoch", "step", "lr", "seconds", "train_loss", "val_loss", "val_mse_1", "excess_percent_1"]


def make_run(folder, name, losses, **flags):
    """A run's files: a checkpoint, a log whose excess is ten times the loss, a record and a figure."""
    model = CausalTimeSeriesMamba(3, **TINY_MODEL)
    flags = {"data_dir": str(folder / "data"), "lr": 0.01, "seed": 42, "checkpoint": f"{name}.pt", **flags}
    save_checkpoint(folder / f"{name}.pt", 1 + int(np.argmin(losses)), model.state_dict(), {}, 1.0, 1.0, flags)
    with open(folder / f"{name}_log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, loss in enumerate(losses, start=1):
            writer.writerow([i, 5 * i, 0.1, 65.0 * i, loss, loss, loss, 10 * loss])
    (folder / f"{name}_run.json").write_text(json.dumps({"command": f"python train <{name}>", "parameters": 12345}))
    figures.save(figures.new_figure()[0], folder / f"{name}_loss.png")
    return folder / f"{name}.pt"


def keep_metrics(folder, name, blocks, **more):
    """NAME_metrics.json with the errors on a test series of five equal blocks, in which the filter has an MSE of 8."""
    rows = [{"horizon": 1, "test_mse": 8.25, "test_mse_error": 0.03, "optimal_mse": 8.0, "optimal_mse_error": 0.02,
             "excess_percent": 3.125, "excess_percent_error": 0.12}]
    test = {"what": "test series: 100 steps, newly drawn", "rows": rows, "blocks": {"mse": {"1": blocks}},
            "floors": {"mse": {"1": [8.0] * 5}}, "weights": [0.2] * 5}
    report = {"name": f"{name}_x", "levels": [], "trained_with": {"checkpoint": f"{name}.pt"}, "test": test}
    (folder / "plots" / f"{name}_metrics.json").write_text(json.dumps(report | more))
    return report


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "data").mkdir()
    return tmp_path


def page_of(script, folder, *names):
    result = script("report", *(folder / f"{name}.pt" for name in names), "--save-dir", folder / "plots")
    assert result.code == 0, result
    path = re.fullmatch(r"wrote (\S+\.html)", result.out.splitlines()[-1])[1]
    with open(path, encoding="utf-8") as file:
        return path, file.read()


class Page(HTMLParser):
    """The tables of a page, as lists of rows of texts, its images' alt texts and everything it refers to."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.images, self.references, self.cell = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.references += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""
        elif tag == "img":
            self.images.append(attributes["alt"])

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None


def test_metrics_are_those_of_the_run_itself_or_else_the_newest(folder):
    plots = folder / "plots"
    for age, name in enumerate(["a_pca3", "a_velocity", "a", "a_old", "other"]):  # each older than the one before
        path = plots / f"{name}_metrics.json"
        path.write_text(json.dumps({"name": name, "levels": []}))
        os.utime(path, (10**9 - age, 10**9 - age))
    assert report.read_metrics(folder / "a.pt", plots)["name"] == "a"
    (plots / "a_metrics.json").unlink()
    assert report.read_metrics(folder / "a.pt", plots)["name"] == "a_pca3"
    os.utime(plots / "a_old_metrics.json")
    assert report.read_metrics(folder / "a.pt", plots)["name"] == "a_old"


def test_one_run_is_told_with_everything_that_exists(script, folder):
    make_run(folder, "a", [3.0, 2.0, 4.0])
    for name in ("a_umap", "a_gates_summary_0", "a_generated_g512_T0.5_song", "a_compare_g2048", "other_umap"):
        figures.save(figures.new_figure()[0], folder / "plots" / f"{name}.png")
    figures.save(figures.new_figure()[0], folder / "data" / "transition_matrix.png")
    levels = [{"level": "input", "probe_accuracy": 0.5, "phase_r2": None},
              {"level": "layer 1", "probe_accuracy": 0.9876, "phase_r2": 0.25, "silhouette": 0.125,
               "umap_silhouette": 0.625, "umap_ari": 0.375, "umap_ari_smooth": 0.75, "effective_rank": 3.5}]
    (folder / "plots" / "a_metrics.json").write_text(json.dumps({"levels": levels}))
    path, text = page_of(script, folder, "a")
    page = Page(text)
    assert path == str(folder / "plots" / "a_report.html")
    assert page.images == ["a_loss.png", "a_umap.png", "a_gates_summary_0.png", "a_generated_g512_T0.5_song.png",
                           "a_compare_g2048.png", "transition_matrix.png"]
    facts = dict(page.tables[0])
    assert facts["command"] == "python train <a>" and facts["parameters"] == "12,345"  # escaped in the page
    assert facts["best epoch"] == "2" and facts["training time"] == "3 min 15 s"
    assert facts["validation MSE"] == "2.0000" and facts["excess (%)"] == "20.00"
    assert dict(page.tables[1])["--lr"] == "0.01"
    assert page.tables[2] == [
        ["level", "probe accuracy", "phase R²", "UMAP silhouette", "UMAP ARI", "effective rank"],
        ["input", "0.500", "–", "–", "–", "–"], ["layer 1", "0.988", "0.250", "0.625", "0.750", "3.500"]]
    assert [text.index(f"<h3>{name}") for name in ("Training", "What the layers know", "Gates", "Songs", "Data")] == \
        sorted(text.index(f"<h3>{name}") for name in ("Training", "What the layers know", "Gates", "Songs", "Data"))


def test_the_page_needs_no_network_and_no_other_file(script, folder):
    make_run(folder, "a", [3.0])
    make_run(folder, "b", [2.0], lr=0.1)
    _, text = page_of(script, folder, "a", "b")
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in Page(text).references)
    assert "http" not in text


def test_several_runs_begin_with_what_differs(script, folder):
    for name, losses, flags in (("a", [3.0, 2.0], {}), ("b", [5.0, 4.0], {"seed": 43}),
                                ("c", [1.0, 1.5], {"lr": 0.1, "device": "cuda"})):
        make_run(folder, name, losses, **flags)
    path, text = page_of(script, folder, "a", "b", "c")
    page = Page(text)
    assert path == str(folder / "plots" / "compare_a_b_c_report.html")
    assert page.tables[0] == [
        ["run", "--lr", "--seed", "best epoch", "validation MSE", "excess (%)"],
        ["a", "0.01", "42", "2", "2.0000", "20.00"],
        ["b", "0.01", "43", "2", "4.0000", "40.00"],
        ["c", "0.1", "42", "1", "1.0000", "10.00"]]
    assert page.images[0] == "validation curves of all runs"


def test_errors_on_the_test_series_are_told_and_compared(script, folder):
    for name in "abc":
        make_run(folder, name, [3.0])
    learner = {"n_steps": 9000, "rows": [{"horizon": 1, "excess_percent": 0.5, "excess_percent_error": 0.02}]}
    test = keep_metrics(folder, "a", [8.4, 8.4, 8.4, 8.5, 8.3])["test"]
    keep_metrics(folder, "a", [], test={**test, "learner": learner}, data_crc32=1)
    _, text = page_of(script, folder, "a")
    page = Page(text)
    assert page.tables[2] == [["horizon", "test MSE", "optimal", "excess"],
                              ["1", "8.25 ± 0.03", "8.00 ± 0.02", "+3.12 ± 0.12 %"]]
    assert "<p>Test series: 100 steps, newly drawn. Neither" in text and "Not measured" not in text
    assert "from the 9,000 labelled training steps: +0.50 ± 0.02 % at horizon 1" in text
    assert "measured on other data" not in dict(page.tables[0])  # this checkpoint doesn't name its data
    # The difference between two runs is that of their blocks: 0.08 of 8.
    keep_metrics(folder, "b", [8.48, 8.48, 8.49, 8.58, 8.37], trained_with={"lr": 1})
    _, text = page_of(script, folder, "a", "b", "c")
    page = Page(text)
    titles, first, second = page.tables[1]
    assert titles == ["on the test series", "seeds", "above the filter", "above the first"]
    assert first == ["a", "1", "+5.0 ± 0.4 %", "–"]
    assert second[:3] == ["b", "1", "+6.0 ± 0.4 %"] and second[3] == "+1.00 ± 0.04 %"
    assert page.images[1] == "errors of all runs on the test series" and text.count("Not measured") == 1
    # Without a second run that has them there is nothing to compare.
    _, text = page_of(script, folder, "a", "c")
    assert "above the first" not in text and "errors of all runs" not in text


@pytest.mark.parametrize("test", [3, {"what": 1}, {"what": "x", "rows": []}, {"what": "x", "rows": [{"test_mse": 1}]},
                                  {"what": "x", "rows": [{"horizon": 1}], "learner": {}}])
def test_damaged_errors_on_the_test_series_are_left_out(script, folder, test):
    make_run(folder, "a", [3.0])
    keep_metrics(folder, "a", [], test=test)
    assert "Not measured" in page_of(script, folder, "a")[1]


def test_a_page_tells_measures_on_other_data(script, folder):
    path = make_run(folder, "a", [3.0])
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "data_crc32": 7}, path)
    for crc32 in (7, 8):
        keep_metrics(folder, "a", [], data_crc32=crc32, data_dir="songs of others")
        facts = dict(Page(page_of(script, folder, "a")[1]).tables[0])
        assert facts.get("measured on other data") == ("songs of others" if crc32 == 8 else None)


def test_seeds_of_one_setting_are_a_mean_and_a_band(folder):
    runs = [report.read_run(make_run(folder, name, losses, **flags), folder / "plots") for name, losses, flags in (
        ("a", [3.0, 2.0], {}), ("b", [5.0, 4.0, 9.0], {"seed": 43}), ("c", [10.0, 9.0], {"seed": 44}),
        ("d", [1.0, 1.5], {"lr": 0.1}))]
    groups = report.settings(runs)
    assert {label: [run["name"] for run in group] for label, group in groups.items()} == {
        "--lr 0.01": ["a", "b", "c"], "--lr 0.1": ["d"]}
    fig = report.draw_curves(groups)
    loss, excess = fig.axes
    assert (loss.get_ylabel(), excess.get_ylabel()) == ("validation MSE (data units²)", "excess over the filter (%)")
    assert [line.get_label() for line in loss.get_lines()] == ["--lr 0.01 (3 seeds)", "--lr 0.1"]
    for ax, factor in ((loss, 1), (excess, 10)):
        several, single = ax.get_lines()
        assert list(several.get_xdata()) == [5, 10]  # the steps that all seeds have
        assert list(several.get_ydata()) == [6 * factor, 5 * factor]
        assert list(single.get_ydata()) == [1 * factor, 1.5 * factor]
        (band,) = ax.collections
        assert {tuple(point) for point in band.get_paths()[0].vertices} == {
            (5, 3 * factor), (5, 10 * factor), (10, 2 * factor), (10, 9 * factor)}
        circle_colors = {tuple(color) for color in figures.circle_colors(10)}
        assert not circle_colors & {tuple(matplotlib_rgb(line)) for line in ax.get_lines()}


def matplotlib_rgb(line):
    return np.asarray(line.get_color())[:3]


def test_a_checkpoint_alone_still_makes_a_page(script, folder):
    make_run(folder, "a", [3.0])
    for name in ("a_log.csv", "a_run.json", "a_loss.png"):
        (folder / name).unlink()
    _, text = page_of(script, folder, "a")
    page = Page(text)
    assert page.images == [] and dict(page.tables[0]) == {"data": str(folder / "data"), "best epoch": "1"}


def test_damaged_companions_are_left_out(script, folder):
    make_run(folder, "a", [3.0])
    (folder / "a_log.csv").write_text("epoch,step\n1,x\n")
    (folder / "a_run.json").write_text("{")
    (folder / "plots" / "a_metrics.json").write_text('{"levels": 3}')
    _, text = page_of(script, folder, "a")
    assert Page(text).images == ["a_loss.png"]


def test_a_missing_checkpoint_is_refused(refused, tmp_path):
    assert "nothere.pt not found" in refused("report", tmp_path / "nothere.pt", "--save-dir", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("name, section", [
    ("loss", "Training"), ("prediction_2", "Training"), ("umap", "What the layers know"),
    ("pca20_umap", "What the layers know"), ("umap_layer3", "What the layers know"),
    ("velocity_summary", "What the layers know"), ("beliefs", "What the layers know"),
    ("test_steps5000_excess", "What the layers know"), ("gates_layer7_0", "Gates"), ("gates_umap_delta", "Gates"),
    ("generated_seed", "Songs"), ("generated_g2048_hidden200x50x10_truth", "Songs"), ("compare_g4096", "Songs"),
    ("frozen_umapx", None), ("last", None)])
def test_each_figure_is_in_its_section_once(folder, name, section):
    path = folder / "a.pt"
    figures.save(figures.new_figure()[0], folder / "plots" / f"a_{name}.png")
    found = report.find_figures(path, folder / "plots")
    assert list(found) == ([section] if section else [])
    assert sum(len(paths) for groups in found.values() for _, paths in groups) == (section is not None)


def test_the_columns_of_the_results_are_those_of_the_log():
    model = CausalTimeSeriesMamba(3, **TINY_MODEL, mixture=2)
    assert {column for column, _ in report.RESULTS.values()} <= set(run_files.log_columns(model, False))
    assert torch.is_tensor(next(model.parameters()))


def test_files_with_settings_in_their_names_find_their_place_and_those_of_a_longer_name_do_not(script, folder):
    make_run(folder, "a", [3.0])
    make_run(folder, "a_frozen", [3.0])
    plots = folder / "plots"
    own = ["a_umap_points3000_umap", "a_umap_points3000_umap_layers_input-2", "a_seed7_summary",
           "a_gates_summary_0_seed7", "a_gates_umap_delta_umap_points50"]
    for name in (*own, "a_frozen_umap", "a_frozen_summary", "a_frozen_gates_summary_0"):
        figures.save(figures.new_figure()[0], plots / f"{name}.png")
    for name, accuracy in (("a_seed7", 0.5), ("a_frozen", 0.25)):
        (plots / f"{name}_metrics.json").write_text(json.dumps({"levels": [{"level": "input",
                                                                           "probe_accuracy": accuracy}]}))
    page = Page(page_of(script, folder, "a")[1])
    assert page.images == ["a_loss.png", *(f"{name}.png" for name in own)]
    assert page.tables[2][1] == ["input", "0.500"]
    (plots / "a_metrics.json").write_text(json.dumps({"levels": [{"level": "input", "probe_accuracy": 0.75}]}))
    assert Page(page_of(script, folder, "a")[1]).tables[2][1] == ["input", "0.750"]


@pytest.mark.parametrize("endings, shown", [  # the oldest first
    (("png", "svg"), "svg"), (("svg", "png"), "png"), (("svg", "png", "pdf"), "png"), (("pdf", "png", "svg"), "svg")])
def test_of_a_figure_in_several_formats_the_newest_that_a_page_can_hold_is_shown(tmp_path, capsys, endings, shown):
    for age, ending in enumerate(reversed(endings)):
        (tmp_path / f"a.{ending}").touch()
        os.utime(tmp_path / f"a.{ending}", (10**9 - age, 10**9 - age))
    assert report.shown(tmp_path.iterdir()) == [tmp_path / f"a.{shown}"] and capsys.readouterr().out == ""


def test_svg_is_embedded_and_pdf_is_told(script, folder):
    make_run(folder, "a", [3.0])
    (folder / "a_loss.png").unlink()
    fig = figures.new_figure()[0]
    for name in ("a_loss.svg", "data/periods.svg", "plots/a_umap.pdf"):
        figures.write_vectors(fig, folder / name, name[-3:])
    result = script("report", folder / "a.pt", "--save-dir", folder / "plots")
    assert f"a page can't hold a PDF, so it lacks {folder / 'plots' / 'a_umap.pdf'}; draw with --format" in result.out
    text = (folder / "plots" / "a_report.html").read_text()
    page = Page(text)
    assert page.images == ["a_loss.svg", "periods.svg"]
    assert sum(reference.startswith("data:image/svg+xml;base64,") for reference in page.references) == 2
