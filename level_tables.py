"""The tables of what `evaluate_representations.py` measures: of the levels of one model, and of several models.

A report is what NAME_metrics.json holds: a dict with "levels", a list with the measures of each level in order of
depth, and with the model's errors and settings.
"""

import csv
import io
import json
import re

import numpy as np

import cli
from measures import DIMENSION_K, DIMENSION_KS
from unseen import with_error


def layers_of(levels):
    """The levels of a model that are layers: not its input and output."""
    return [m for m in levels if m["level"].startswith("layer")]


def best_layer(layers):
    """The measures of the layer, or other level, with the best probe, the first of equals; None when none has one."""
    return max((m for m in layers if m["probe_accuracy"] is not None), key=lambda m: m["probe_accuracy"], default=None)


def cell(value, form=".3f"):
    """A number as text; a dash for None."""
    return "–" if value is None else format(value, form)


LEVEL_COLUMNS = [  # title, key of a level's measures, number format
    ("probe acc.", "probe_accuracy", ".3f"),
    ("phase R²", "phase_r2", ".3f"),
    ("ARI", "kmeans_ari", ".3f"),
    ("smooth", "kmeans_ari_smooth", ".3f"),
    ("NMI", "kmeans_nmi", ".3f"),
    ("smooth", "kmeans_nmi_smooth", ".3f"),
    ("silhouette", "silhouette", ".3f"),
    ("rank", "effective_rank", ".1f"),
]


def level_table(report):
    """The table of one model, one row per level, and below them one per baseline."""
    levels = [*report["levels"], *report.get("baselines", [])]
    return cli.table(["level", *(title for title, _, _ in LEVEL_COLUMNS)], [
        [m["level"], *(cell(m.get(key), form) for _, key, form in LEVEL_COLUMNS)] for m in levels])


def dimension_table(report):
    """The table of the dimension at several scales, one row per level and baseline that has one."""
    columns = [("TwoNN", "dimension", "two_nn"), *((f"k = {k}", "dimension", k) for k in DIMENSION_KS),
               ("whitened: TwoNN", "dimension_whitened", "two_nn"),
               (f"k = {DIMENSION_K}", "dimension_whitened", DIMENSION_K)]
    levels = [m for m in (*report["levels"], *report.get("baselines", [])) if m.get("dimension")]
    return cli.table([f"dimension of {report['lb_points']:,} steps", *(title for title, _, _ in columns)], [
        [m["level"], *(cell((m.get(key) or {}).get(k), ".2f") for _, key, k in columns)] for m in levels])


BELIEFS = {  # key of a level's beliefs: its title
    "circle": "circle", "phase": "phase", "revolutions": "revolutions done", "hazard": "visit ends now"}


def belief_table(report):
    """The table of how much of each belief a linear regression reads out of each level and baseline (R²)."""
    levels = [m for m in (*report["levels"], *report.get("baselines", [])) if m.get("beliefs")]
    return cli.table(["R² of beliefs", *BELIEFS.values()], [
        [m["level"], *(cell(m["beliefs"][key]) for key in BELIEFS)] for m in levels])


def event_table(report):
    """The table of where the excess over the exact filter falls, one row per kind of event."""
    found = report["excess"]
    return cli.table([f"excess in {found['steps']:,} new steps", "of all", "of the excess", "mean excess"], [
        [row["event"], f"{row['predictions']:.2%}", with_error(
            scaled(row["share"], 100), scaled(row["share_error"], 100), ".0f", " %"),
         with_error(row["mean_excess"], row["mean_excess_error"], ".4f")] for row in found["events"]],
        align="lrrr")


def scaled(value, factor):
    """value * factor; None stays None."""
    return None if value is None else value * factor


def linear_line(report):
    """One line about the errors of the linear autoregression."""
    linear = report["autoregression"]
    text = f"linear autoregression over {linear['lags']} steps: validation MSE {linear['val_mse']:.4f}"
    if linear["excess_percent"] is not None:
        text += f", excess {linear['excess_percent']:+.2f} %"
    if linear.get("test_excess_percent") is not None:
        text += ", over new steps " + with_error(linear["test_excess_percent"], linear["test_excess_percent_error"],
                                                 "+.2f", " %")
    return text


def belief_comparison(reports):
    """The table of several models and the baselines: the best layer's R² of each belief."""
    rows = [[report["name"], *(cell(best_belief(layers_of(report["levels"]), key)) for key in BELIEFS)]
            for report in reports]
    rows += [[name, *(cell(best_belief(levels, key)) for key in BELIEFS)]
             for name, levels in baseline_groups(reports[0]).items()]
    return cli.table(["R² of beliefs, best layer", *BELIEFS.values()], rows)


def best_belief(layers, key):
    """The highest R² of a belief over layers, or other levels; None when there is none."""
    return max((m["beliefs"][key] for m in layers if m.get("beliefs") and m["beliefs"][key] is not None), default=None)


def baseline_groups(report):
    """The levels of each baseline, the input among them: {name: list of levels}."""
    groups = {"input": [m for m in report["levels"] if m["level"] == "input"]}
    for level in report.get("baselines", []):
        name = "untrained model" if level["level"].startswith("untrained") else level["level"]
        groups.setdefault(name, []).append(level)
    return {name: levels for name, levels in groups.items() if levels}


def umap_table(report):
    """The table of what can be told apart in a model's UMAPs, one row per level."""
    keys = ("umap_silhouette", "umap_ari", "umap_ari_smooth", "umap_nmi", "umap_nmi_smooth")
    levels = [m for m in (*report["levels"], *report.get("baselines", [])) if "umap_silhouette" in m]
    return cli.table(["in the UMAP", "silhouette", "ARI", "smooth", "NMI", "smooth"], [
        [m["level"], *(cell(m[key]) for key in keys)] for m in levels])


def peak(levels, key):
    """The highest value of a measure over all levels; None when no level has it."""
    return max((m[key] for m in levels if m.get(key) is not None), default=None)


# What the comparison tells of each model: {column of the CSV: (its title in the table, number format or "" for text)}
COMPARISON = {
    "checkpoint": ("checkpoint", ""),
    "val_mse": ("val MSE", ".4f"),
    "optimal_mse": ("optimal", ".4f"),
    "excess_percent": ("excess %", "+.2f"),
    "val_nll": ("val NLL", ".4f"),
    "optimal_nll": ("optimal", ".4f"),
    "excess_nats": ("nats above", "+.4f"),
    "best_layer": ("best layer", ""),
    "probe_accuracy": ("probe acc.", ".3f"),
    "phase_r2": ("phase R²", ".3f"),
    "silhouette": ("silhouette", ".3f"),
    "kmeans_ari": ("ARI", ".3f"),
    "kmeans_ari_smooth": ("smooth", ".3f"),
    f"dimension_k{DIMENSION_K}": (f"dim {DIMENSION_K}", ".2f"),
    f"last_layer_dimension_k{DIMENSION_K}": ("last", ".2f"),
    "peak_silhouette": ("peak sil.", ".3f"),
    "peak_umap_silhouette": ("UMAP sil.", ".3f"),
    "peak_umap_ari_smooth": ("UMAP ARI", ".3f"),
}
BELIEF_COLUMNS = {f"belief_{key}": key for key in BELIEFS}  # what the CSV has behind these: see belief_comparison


def comparison_row(report):
    """One model as {column of COMPARISON or BELIEF_COLUMNS: value or None}."""
    return row_of(report["name"], report["errors"], report["levels"], layers_of(report["levels"]))


def row_of(name, errors, levels, layers):
    """`comparison_row` of a model, or baseline, with these errors and levels; layers: those of them that are layers."""
    one_ahead = next((row for row in errors if row["horizon"] == 1), {})
    best, last = best_layer(layers) or {}, layers[-1] if layers else {}
    return {
        "checkpoint": name,
        **{key: one_ahead.get(key) for key in ("val_mse", "optimal_mse", "excess_percent", "val_nll", "optimal_nll",
                                                 "excess_nats")},
        "best_layer": best.get("level"),
        **{key: best.get(key) for key in ("probe_accuracy", "phase_r2", "silhouette", "kmeans_ari",
                                          "kmeans_ari_smooth")},
        f"dimension_k{DIMENSION_K}": (best.get("dimension") or {}).get(DIMENSION_K),
        f"last_layer_dimension_k{DIMENSION_K}": (last.get("dimension") or {}).get(DIMENSION_K),
        **{f"peak_{key}": peak(levels, key) for key in ("silhouette", "umap_silhouette", "umap_ari_smooth")},
        **{column: best_belief(layers, key) for column, key in BELIEF_COLUMNS.items()},
    }


def baseline_rows(report):
    """The baselines that stand beside a model as rows like those of `comparison_row`."""
    rows = []
    for name, levels in baseline_groups(report).items():
        row = row_of(name, [], levels, layers=levels)
        best = (row["best_layer"] or levels[0]["level"]).removeprefix("untrained ")
        rows.append({**row, "best_layer": best if len(levels) > 1 else None})
    linear = report.get("autoregression")
    if linear is not None:
        rows.append({**dict.fromkeys([*COMPARISON, *BELIEF_COLUMNS]), "checkpoint": "linear autoregression",
                     **{key: linear[key] for key in ("val_mse", "optimal_mse", "excess_percent")}})
    return rows


def comparison_table(rows):
    """Rows of comparison_row as text; columns that no row has a value for are left out."""
    keys = [key for key in COMPARISON if any(row[key] is not None for row in rows)]
    return cli.table([COMPARISON[key][0] for key in keys],
                     [[cell(row[key], COMPARISON[key][1]) for key in keys] for row in rows])


def seed_groups(reports):
    """Reports of models that were trained with the same flags but for the seed: {name of the group: list of them}.

    Flags that don't change the result don't count either. A model without such siblings is left out. Where the names
    differ in the seed alone, that of the group is what they share, as full of full_42 and full_43; otherwise, or where
    another group or model has that name too, it is the name of the first model.
    """
    groups = {}
    for report in reports:
        flags = {key: value for key, value in report["trained_with"].items()
                 if key not in ("seed", *cli.WITHOUT_EFFECT)}
        groups.setdefault(json.dumps(flags, sort_keys=True, default=str), []).append(report)
    groups = [group for group in groups.values() if len(group) > 1]
    shared = [{without_seed(report) for report in group} for group in groups]
    taken = {report["name"] for report in reports}  # one name for two settings would make one of them
    return {next(iter(names)) if len(names) == 1 and shared.count(names) == 1 and not names & taken
            else group[0]["name"]: group for names, group in zip(shared, groups, strict=True)}


def without_seed(report):
    """The name of a report's model without its seed: full of full_42, model_next_lr0.1 of model_next_lr0.1_seed2."""
    seed = re.escape(str(report["trained_with"].get("seed")))
    return re.sub(rf"_(seed)?{seed}(?=_|$)", "", report["name"])


def setting_names(reports):
    """{name of a report: name of its setting}: that of its group, as from `seed_groups`, or its own without one."""
    return ({report["name"]: report["name"] for report in reports}
            | {report["name"]: name for name, group in seed_groups(reports).items() for report in group})


def test_settings(reports):
    """The errors on the test series by setting, as `unseen.compared` takes them: {name, as from `seed_groups`, of those
    with the same flags but for the seed: list of their "test"}."""
    name_of, settings = setting_names(reports), {}
    for report in reports:
        if report.get("test"):
            settings.setdefault(name_of[report["name"]], []).append(report["test"])
    return settings


def spread_table(groups):
    """Mean ± standard deviation (n - 1) over the seeds of each column of the comparison, one row per group.

    A column without numbers in any group is left out.
    """
    columns = [key for key, (_, form) in COMPARISON.items() if form]
    rows = []
    for name, group in groups.items():
        members = [comparison_row(report) for report in group]
        rows.append([f"{name}, {len(group)} seeds"])
        for key in columns:
            form, values = COMPARISON[key][1], [member[key] for member in members]
            if None in values:
                rows[-1].append("–")
            else:
                rows[-1].append(f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form.lstrip('+')}}")
    header = ["mean ± std", *(COMPARISON[key][0] for key in columns)]
    shown = [i for i in range(len(header)) if i == 0 or any(row[i] != "–" for row in rows)]
    return cli.table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def comparison_csv(rows):
    """Rows of comparison_row as CSV text with a header line."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as an empty cell
    return text.getvalue()
