"""The tables of what `evaluate_representations.py` measures: of the levels of one model, and of several models.

A report is what NAME_metrics.json holds: a dict with "levels", a list with the measures of each level in order of
depth, and with the model's errors and settings.
"""

import csv
import io
import json

import numpy as np

import cli
from measures import DIMENSION_K, DIMENSION_KS


def best_layer(levels):
    """The measures of the layer with the best probe, the first of equals; input and output are no layers.

    None when no layer has a probe.
    """
    layers = [m for m in levels if m["level"].startswith("layer") and m["probe_accuracy"] is not None]
    return max(layers, key=lambda m: m["probe_accuracy"], default=None)


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
    """The table of one model, one row per level; without the columns of the dimension when no level has one."""
    ks = DIMENSION_KS if any(m["dimension"] for m in report["levels"]) else []
    header = ["level", *(title for title, _, _ in LEVEL_COLUMNS), *(f"dim {k}" for k in ks)]
    rows = []
    for m in report["levels"]:
        rows.append([m["level"], *(cell(m[key], form) for _, key, form in LEVEL_COLUMNS),
                     *(cell(m["dimension"][k], ".2f") for k in ks)])
    return cli.table(header, rows)


def umap_table(report):
    """The table of what can be told apart in a model's UMAPs, one row per level."""
    keys = ("umap_silhouette", "umap_ari", "umap_ari_smooth", "umap_nmi", "umap_nmi_smooth")
    return cli.table(["in the UMAP", "silhouette", "ARI", "smooth", "NMI", "smooth"], [
        [m["level"], *(cell(m[key]) for key in keys)] for m in report["levels"]])


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


def comparison_row(report):
    """One model as {column of COMPARISON: value or None}."""
    levels = report["levels"]
    one_ahead = next((row for row in report["errors"] if row["horizon"] == 1), {})
    best = best_layer(levels) or {}
    last = next((m for m in reversed(levels) if m["level"].startswith("layer")), {})
    return {
        "checkpoint": report["name"],
        **{key: one_ahead.get(key) for key in ("val_mse", "optimal_mse", "excess_percent", "val_nll", "optimal_nll",
                                                 "excess_nats")},
        "best_layer": best.get("level"),
        **{key: best.get(key) for key in ("probe_accuracy", "phase_r2", "silhouette", "kmeans_ari",
                                          "kmeans_ari_smooth")},
        f"dimension_k{DIMENSION_K}": (best.get("dimension") or {}).get(DIMENSION_K),
        f"last_layer_dimension_k{DIMENSION_K}": (last.get("dimension") or {}).get(DIMENSION_K),
        **{f"peak_{key}": peak(levels, key) for key in ("silhouette", "umap_silhouette", "umap_ari_smooth")},
    }


def comparison_table(rows):
    """Rows of comparison_row as text; columns that no row has a value for are left out."""
    keys = [key for key in COMPARISON if any(row[key] is not None for row in rows)]
    return cli.table([COMPARISON[key][0] for key in keys],
                     [[cell(row[key], COMPARISON[key][1]) for key in keys] for row in rows])


def seed_groups(reports):
    """Reports of models that were trained with the same flags but for the seed: {name of the first one: list of them}.

    Flags that don't change the result don't count either. A model without such siblings is left out.
    """
    groups = {}
    for report in reports:
        flags = {key: value for key, value in report["trained_with"].items()
                 if key not in ("seed", *cli.WITHOUT_EFFECT)}
        groups.setdefault(json.dumps(flags, sort_keys=True, default=str), []).append(report)
    return {group[0]["name"]: group for group in groups.values() if len(group) > 1}


def test_settings(reports):
    """The errors on the test series by setting, as `unseen.compared` takes them: {name of the first report of those
    with the same flags but for the seed: list of their "test"}."""
    groups = seed_groups(reports)
    in_a_group = {report["name"]: name for name, group in groups.items() for report in group}
    settings = {}
    for report in reports:
        if report.get("test"):
            settings.setdefault(in_a_group.get(report["name"], report["name"]), []).append(report["test"])
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
