"""One page for one or many training runs: flags, results, curves and all figures that exist, each with a caption.

Reads what a run NAME.pt left beside it (NAME_run.json, NAME_log.csv, NAME_loss.png, NAME_prediction_*.png), what the
other scripts wrote of it to SAVE_DIR (UMAPs, measures, gates, songs) and the figures in its data folder. The errors on
the test series are those that evaluate_representations.py keeps in NAME_metrics.json; nothing is computed anew. What
doesn't exist is left out. Writes one self-contained page, which opens from disk without a network:
SAVE_DIR/NAME_report.html, or SAVE_DIR/compare_NAME_MORE_report.html for several runs. That one begins with a table of
the flags in which they differ and their results, with their curves in one figure (seeds of one setting as mean and
band), and with their errors on the test series side by side.

Examples:
  python report.py model_next.pt
  python report.py model_next.pt model_next_frozen.pt --save-dir plots
"""

import cli  # first: from here on Ctrl-C ends the script without a traceback

# isort: split
import base64
import contextlib
import io
import json
import re
from pathlib import Path


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    runs = parser.add_argument_group("runs")
    runs.add_argument("checkpoints", type=Path, nargs="+", metavar="NAME.pt",
                      help="checkpoints that name the runs (required)")
    files = parser.add_argument_group("files")
    cli.add_save_dir(files)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.start()
    ARGS = parse_args()  # before the slow imports: --help and a bad flag answer at once

import jinja2
import matplotlib.image
import numpy as np

import figures
import level_tables
import run_files
import unseen
from mamba_model import read_checkpoint, stem

# The figures of a run: (section of the page, pattern of what follows NAME_ in the file name, what to see in them)
CAPTIONS = [
    ("Training", r"loss",
     "Training and validation error per epoch, and how far the validation error lies above that of the exact filter, "
     "below which no model can get. A validation curve that rises while the training curve falls means overfitting."),
    ("Training", r"prediction_\d+",
     "A validation window, the prediction of each of its steps from the steps before, and their difference on the same "
     "colour scale. What is left should look like noise. Stripes at a change of circle are steps at which nobody can "
     "know where the process goes."),
    ("What the layers know", r"(?!gates)(?:[\w.-]+_)?umap(?:_input|_output|_layer\d+|_layers_[\w-]+)?",
     "UMAPs of the input, the layers' outputs and the prediction, coloured by the hidden circle, which the model never "
     "saw. Circles that come apart from one level to the next are circles that the model tells apart."),
    ("What the layers know", r"(?!gates|compare)(?:[\w.-]+_)?summary",
     "Measures of each level against depth: dimension, probes for circle and phase, clusters. The output is another "
     "space (the features of the data), so its values don't continue the layers' curve."),
    ("What the layers know", r"(?!gates|compare)(?:[\w.-]+_)?beliefs",
     "How much of what the exact filter knows from the same past (circle, phase, revolutions done, whether the visit "
     "ends now) a linear regression reads off each level: R² on time that it was not fitted on."),
    ("What the layers know", r"(?!gates|compare)(?:[\w.-]+_)?excess",
     "Where the error above the exact filter's falls: at which kind of step, and after how many steps of a window."),
    ("Gates", r"gates_summary_\d+(?:_[\w.-]+)?",
     "The step size of every layer beside the series, and how much of each signal's variance the hidden circle "
     "explains (η²)."),
    ("Gates", r"gates_layer\d+_\d+(?:_[\w.-]+)?",
     "The signals of one layer beside the series. Look for stripes that follow the changes of circle in the strip."),
    ("Gates", r"gates(?:_layer\d+)?_umap_(?:delta|z|B|C|conv)(?:_[\w.-]+)?",
     "UMAPs of one signal of each layer, coloured by the hidden circle."),
    ("Songs", r"generated(?:_\S+)?_seed",
     "Real steps up to the dashed line, and the model's own continuation behind it."),
    ("Songs", r"generated(?:_\S+)?_truth",
     "A continuation beside the true one. After a while the two differ, as two songs of one singer do: then the error "
     "is √2 times the spread of the data."),
    ("Songs", r"generated(?:_\S+)?_song",
     "Whether the song follows the process: its transitions, its dwell times and its deviation from its path."),
    ("Songs", r"compare(?:_\S+)?", "Several ways to generate, side by side with the real series."),
]
DATA_CAPTIONS = {
    "sample_window_0": "A window of the series with its hidden circles.",
    "state_sequence": "The hidden circles over the whole series.",
    "transition_matrix": "The probability of going from one circle to another.",
    "periods": "Each circle's period and dwell times.",
    "umap": "UMAP of the series itself, coloured by circle.",
}
MIME_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}  # of the figures that a page can hold
FORMATS = (*MIME_TYPES, ".pdf")
# {title of a result: (column of NAME_log.csv at the best epoch, number format)}
RESULTS = {"best epoch": ("epoch", "d"), "validation MSE": ("val_mse_1", ".4f"),
           "excess (%)": ("excess_percent_1", ".2f"), "NLL (nats per step)": ("val_nll_1", ".4f"),
           "above the filter (nats)": ("excess_nats_1", ".4f")}
DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)  # what a damaged JSON file raises


# ---- What a run left ------------------------------------------------------------------------------------------

def read_run(path, save_dir):
    """All that is known of the run with the checkpoint `path`, as a dict. Raises UserError without a checkpoint."""
    checkpoint = read_checkpoint(path)
    crc32 = checkpoint.get("data_crc32")
    name, flags, files = stem(path), checkpoint["args"], run_files.files_of(path)
    rows, data_dir, metrics = [], Path(flags.get("data_dir", "data")), read_metrics(path, save_dir)
    with contextlib.suppress(cli.UserError):  # a damaged log is no reason to show nothing of a run
        rows = run_files.read_rows(files["log"])
    return {"name": name, "flags": flags, "record": run_files.read_record(files["record"]) or {},
            "rows": rows, "best": min(rows, key=lambda row: row["val_loss"]) if rows else {},
            "epoch": checkpoint.get("epoch"), "data_dir": data_dir,
            "metrics": metrics, "levels": level_cells(metrics), "test": test_errors(metrics),
            "other_data": metrics.get("data_dir") if crc32 and metrics.get("data_crc32", crc32) != crc32 else None,
            "sections": find_figures(path, save_dir) | find_data_figures(data_dir)}


def files_of_run(checkpoint, folders, pattern, endings):
    """The files in these folders whose names are NAME_ and what `pattern` matches, with one of these endings.

    Those of a run NAME_more, whose NAME_more.pt lies beside NAME.pt, are not among them.
    """
    longer = [other for other in map(stem, checkpoint.parent.glob("*.pt")) if other.startswith(f"{stem(checkpoint)}_")]
    pattern = re.compile(f"{re.escape(stem(checkpoint))}_(?:{pattern})")
    found = {file for folder in folders for file in folder.glob("*") if file.suffix in endings}
    return sorted(file for file in found if pattern.fullmatch(file.stem)
                  and not any(file.stem.startswith(f"{other}_") for other in longer))


def read_metrics(checkpoint, save_dir):
    """What NAME_metrics.json holds, or without it the newest NAME_…_metrics.json; {} when there is none or it is
    damaged."""
    found = files_of_run(checkpoint, [save_dir], r"(?:[\w.-]+_)?metrics", [".json"])
    if not found:
        return {}
    path = max(found, key=lambda file: (file.stem == f"{stem(checkpoint)}_metrics", file.stat().st_mtime))
    with contextlib.suppress(*DAMAGED):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def level_cells(metrics):
    """The table of the levels in these metrics, (titles, rows of texts), or None when they hold none."""
    columns = {"level": "level", "probe_accuracy": "probe accuracy", "phase_r2": "phase R²",
               "umap_silhouette": "UMAP silhouette", "umap_ari_smooth": "UMAP ARI", "effective_rank": "effective rank"}
    with contextlib.suppress(*DAMAGED):
        levels = metrics["levels"]
        shown = [key for key in columns if any(level.get(key) is not None for level in levels)]
        return [columns[key] for key in shown], [[number(level.get(key), ".3f") for key in shown] for level in levels]
    return None


def test_errors(metrics):
    """The errors on the test series in these metrics, as `unseen.as_report` made them: {"lines": one on that series
    and, where there is one, one on the observer who learns; "table": (titles, rows of texts)}; None when they hold
    none."""
    with contextlib.suppress(*DAMAGED):
        test = metrics["test"]
        lines = [test["what"], *([unseen.learner_line(test["learner"])] if "learner" in test else [])]
        return {"lines": [line[:1].upper() + line[1:] for line in lines], "table": unseen.unseen_cells(test["rows"])}
    return None


def find_figures(path, save_dir):
    """{section: [(caption, Path)]} of a run's figures, those beside its checkpoint and those in save_dir."""
    sections = {}
    for section, pattern, caption in CAPTIONS:
        found = shown(files_of_run(path, [path.parent, save_dir], pattern, FORMATS))
        if found:
            sections.setdefault(section, []).append((caption, found))
    return sections


def find_data_figures(data_dir):
    drawn = [(caption, shown(file for file in data_dir.glob(f"{name}.*") if file.suffix in FORMATS))
             for name, caption in DATA_CAPTIONS.items()]
    return {"Data": [pair for pair in drawn if pair[1]]} if any(found for _, found in drawn) else {}


def shown(files):
    """Of figure files those that a page can hold, the newest where there are several of one name. A line is printed of
    those that are there as PDF only."""
    newest = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        if file.suffix in MIME_TYPES or file.stem not in newest:
            newest[file.stem] = file
    only_pdf = [file for file in newest.values() if file.suffix == ".pdf"]
    if only_pdf:
        print(f"a page can't hold a PDF, so it lacks {', '.join(map(str, only_pdf))}; draw with --format png or svg")
    return sorted(file for file in newest.values() if file.suffix in MIME_TYPES)


# ---- Several runs ---------------------------------------------------------------------------------------------

def differing_flags(runs):
    """The names of the flags in which the runs differ, in the order of the first run's."""
    names = dict.fromkeys(name for run in runs for name in run["flags"] if name not in cli.WITHOUT_EFFECT)
    return [name for name in names if len({repr(run["flags"].get(name)) for run in runs}) > 1]


def settings(runs):
    """Runs whose flags are the same but for the seed: {label of the setting: list of runs}."""
    differing = [name for name in differing_flags(runs) if name != "seed"]
    groups = {}
    for run in runs:
        label = ", ".join(f"{cli.flag_of(name)} {run['flags'].get(name)}" for name in differing) or "all runs"
        groups.setdefault(label, []).append(run)
    return groups


def curve(run, column):
    """(steps, values) of a column of a run's log, without rows in which it is empty."""
    points = [(row["step"], row[column]) for row in run["rows"] if row.get(column) is not None]
    return tuple(np.array(points).reshape(-1, 2).T)


@cli.in_style
def draw_curves(groups):
    """Validation errors and excess over the filter against training steps: a line per setting, a band over its seeds.

    groups: as from `settings`. None when no run has a log.
    """
    labels = {"val_mse_1": "validation MSE (data units²)", "excess_percent_1": "excess over the filter (%)",
              "val_nll_1": "validation NLL (nats per step)", "excess_nats_1": "above the filter (nats per step)"}
    runs = [run for group in groups.values() for run in group]
    shown = [column for column in labels if any(len(curve(run, column)[0]) for run in runs)]
    if not shown:
        return None
    fig, axes = figures.new_figure(-(-len(shown) // 2), min(len(shown), 2), (5.5, 3.6), "validation curves")
    figures.hide_unused(axes, len(shown))
    for ax, column in zip(axes.ravel(), shown, strict=False):
        for (setting, group), color in zip(groups.items(), figures.run_colors(len(groups)), strict=True):
            label = f"{setting} ({len(group)} seeds)" if len(group) > 1 else setting
            seed_band(ax, [curve(run, column) for run in group], color, label)
        ax.set(xlabel="training steps (updates)", ylabel=labels[column])
        if column.startswith("excess"):
            ax.set_yscale("log")
            figures.log_ticks_for_range(ax)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    return fig


def seed_band(ax, curves, color, label):
    """The mean over curves and their range, at the steps that all of them have."""
    curves = [(steps, values) for steps, values in curves if len(steps)]
    if not curves:
        return
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in curves)))
    values = np.array([[value for step, value in zip(*pair, strict=True) if step in common] for pair in curves])
    ax.plot(common, values.mean(axis=0), color=color, label=label)
    if len(curves) > 1:
        ax.fill_between(common, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


def comparison(runs):
    """(titles, rows) of the table that several runs begin with: name, differing flags, results."""
    flags = differing_flags(runs)
    results = [title for title, (key, _) in RESULTS.items() if any(run["best"].get(key) is not None for run in runs)]
    rows = []
    for run in runs:
        cells = [str(run["flags"].get(name, "–")) for name in flags]
        cells += [number(run["best"].get(RESULTS[title][0]), RESULTS[title][1]) for title in results]
        rows.append([run["name"], *cells])
    return ["run", *map(cli.flag_of, flags), *results], rows


def test_comparison(runs):
    """The errors of several runs on the test series, as `unseen.compared` sets them side by side: ((titles, rows of
    texts), a Figure), or None where fewer than two have them. Seeds of one setting are one row."""
    with contextlib.suppress(*DAMAGED):
        reports = [run["metrics"] | {"name": run["name"]} for run in runs if run["test"]]
        if len(reports) > 1:
            rows = unseen.compared(level_tables.test_settings(reports))
            return unseen.compared_cells(rows), unseen.draw_compared(rows)
    return None


# ---- The page -------------------------------------------------------------------------------------------------

def number(value, form):
    if value is None or isinstance(value, str):
        return value or "–"
    return format(int(value) if form == "d" else value, form)


def image_uri(content, ending=".png"):
    return f"data:{MIME_TYPES[ending]};base64,{base64.b64encode(content).decode('ascii')}"


def data_uri(path):
    """A figure as text that a page can hold, or None when it can't be read."""
    try:
        return image_uri(path.read_bytes(), path.suffix)
    except OSError:
        return None


def figure_uri(fig):
    """A Figure as text that a page can hold."""
    file = io.BytesIO()
    figures.laid_out(fig).canvas.draw()
    matplotlib.image.imsave(file, np.array(fig.canvas.buffer_rgba()), format="png", dpi=fig.dpi)
    return image_uri(file.getvalue())


def facts(run):
    """What the run is, as (name, value) pairs: the lines at the top of its part of the page."""
    record = run["record"]
    versions = record.get("versions")
    pairs = [("command", record.get("command")), ("commit", record.get("git_commit")),
             ("started", record.get("started")), ("device", record.get("device")),
             ("parameters", f"{record['parameters']:,}" if "parameters" in record else None),
             ("data", str(run["data_dir"])), ("measured on other data", run["other_data"]),
             ("best epoch", run["epoch"]),
             ("training time", duration(run["rows"][-1]["seconds"]) if run["rows"] else None),
             ("versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v) if versions else None)]
    pairs += [(title, number(run["best"].get(key), form)) for title, (key, form) in RESULTS.items()
              if title != "best epoch" and run["best"].get(key) is not None]
    return [(name, value) for name, value in pairs if value is not None]


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def render(runs):
    """The page as text."""
    several = len(runs) > 1
    curves, compared = (draw_curves(settings(runs)), test_comparison(runs)) if several else (None, None)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.globals |= {"uri": data_uri, "facts": facts, "flag_of": cli.flag_of}
    return environment.from_string(PAGE).render(
        title=", ".join(run["name"] for run in runs), runs=runs, several=several,
        table=comparison(runs) if several else None, curves=figure_uri(curves) if curves else None,
        compared=(compared[0], figure_uri(compared[1])) if compared else None)


PAGE = """{% macro cells(titles, rows) %}
<thead><tr>{% for cell in titles %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} – MambaSynth report</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2, nav a, figcaption { overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { border-top: 2px solid #ddd; padding-top: 1.5rem; margin-top: 3rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; max-width: 45rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { white-space: nowrap; } td { overflow-wrap: anywhere; }
table.sortable td { white-space: nowrap; }
table.sortable td:first-child { white-space: normal; min-width: 12rem; max-width: 24rem; }
table.sortable th { cursor: pointer; }
table.sortable th::after { content: " ↕"; color: #aaa; }
details { margin: 1rem 0; } summary { cursor: pointer; } nav a { display: block; }
</style>
</head>
<body>
<h1>{{ title if not several else "Comparison of %d runs" % runs | length }}</h1>
{% if several %}
<nav>{% for run in runs %}<a href="#run{{ loop.index }}">{{ run.name }}</a> {% endfor %}</nav>
<h2>Where the runs differ</h2>
<p>The flags in which the runs differ, and the results at each run's best epoch. A click on a title sorts.</p>
<div class="scroll"><table class="sortable">
{{ cells(*table) }}</table></div>
{% if curves %}
<figure><img src="{{ curves }}" alt="validation curves of all runs">
<figcaption>Validation curves against training steps. A line is the mean over the seeds of one setting, the band reaches
from their lowest to their highest value.</figcaption></figure>
{% endif %}
{% if compared %}
<h2>On the test series</h2>
<p>Errors at horizon 1 on steps that neither training nor the choice of the epoch has seen, with their standard errors.
Beside the distance from the exact filter stands the difference from the first run that was measured on the same
steps: noise that both meet cancels in it, so its standard error is smaller.</p>
<div class="scroll"><table class="sortable">
{{ cells(*compared[0]) }}</table></div>
<figure><img src="{{ compared[1] }}" alt="errors of all runs on the test series"></figure>
{% endif %}
{% endif %}
{% for run in runs %}
<h2 id="run{{ loop.index }}">{{ run.name }}</h2>
<div class="scroll"><table>
{% for name, value in facts(run) %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
<details><summary>all flags</summary><div class="scroll"><table>
{% for name, value in run.flags.items() %}
<tr><th>{{ flag_of(name) }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div></details>
<h3>On the test series</h3>
{% if run.test %}
<p>{{ run.test.lines[0] }}. Neither training nor the choice of the epoch has seen it.</p>
<div class="scroll"><table>
{{ cells(*run.test.table) }}</table></div>
{% for line in run.test.lines[1:] %}<p>{{ line }}.</p>{% endfor %}
{% else %}
<p>Not measured, or not kept: <code>evaluate_representations.py</code> measures the errors there and keeps them.</p>
{% endif %}
{% for section, groups in run.sections.items() %}
<h3>{{ section }}</h3>
{% if section == "What the layers know" and run.levels %}
<div class="scroll"><table>
{{ cells(*run.levels) }}</table></div>
{% endif %}
{% for caption, paths in groups %}
<figure>
{% for path in paths if uri(path) %}
<img src="{{ uri(path) }}" alt="{{ path.name }}" loading="lazy">
{% endfor %}
<figcaption>{{ caption }} <small>({{ paths | map(attribute="name") | join(", ") }})</small></figcaption></figure>
{% endfor %}
{% endfor %}
{% endfor %}
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((th, i) => {
    let up = false;
    th.addEventListener("click", () => {
      up = !up;
      const body = table.tBodies[0], value = row => row.cells[i].textContent;
      const order = (a, b) => {
        const [x, y] = [a, b].map(row => parseFloat(value(row)));
        const byText = isNaN(x) || isNaN(y);
        return (byText ? value(a).localeCompare(value(b)) : x - y) * (up ? 1 : -1);
      };
      [...body.rows].sort(order).forEach(row => body.append(row));
    });
  });
}
</script>
</body>
</html>
"""


# ---- The script -----------------------------------------------------------------------------------------------

def page_name(runs):
    names = "_".join(run["name"] for run in runs)
    return f"{names if len(runs) == 1 else cli.short_name(f'compare_{names}')}_report.html"


def main(args):
    runs = [read_run(path, args.save_dir) for path in dict.fromkeys(args.checkpoints)]
    page = cli.output_folder(args.save_dir) / page_name(runs)
    cli.write_text(page, render(runs))
    print(f"wrote {page}")


if __name__ == "__main__":
    cli.run(main, ARGS)
