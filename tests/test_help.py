"""--help of every script: its flags in groups, each one explained, no slow import before it, examples that work."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli

REPO = Path(cli.__file__).parent
SCRIPTS = sorted(path.stem for path in REPO.glob("*.py") if "\ndef parse_args(" in path.read_text(encoding="utf-8"))

# What --help must not wait for. The scripts that import torch parse their flags before anything slow. The light ones
# import what they use on top, as most Python does, and leave only what takes seconds to the functions that need it.
LIGHT = {"estimate_dimension", "markov_circles_timeseries", "optimal_filter"}
TAKES_SECONDS = {"torch", "umap", "sklearn"}
SLOW_IMPORTS = TAKES_SECONDS | {"numba", "matplotlib", "scipy", "numpy"}

# The flags that other people's scripts and papers rely on: one may be added here, none taken away.
PROMISED = {
    "masked_model_gpu_mamba_next":
        "--data-dir --seq-len --stride --val-fraction --d-model --n-layers --d-state --d-conv --expand --d-ff "
        "--dropout --max-horizon --gate-lr-factor --freeze-A --slowness-lambda --contrastive-lambda --contrastive-temp "
        "--contrastive-negatives --aug-noise --aug-rotate --aug-rotate-eps --aug-scale --batch-size --lr "
        "--warmup-epochs --epochs --num-workers --no-compile --no-amp --no-train-eval --checkpoint --resume --eval "
        "--device --seed --scan --log-dir",
    "generate":
        "--checkpoint --data-dir --seed-len --gen-len --temperature --n-samples --seed-offset --perturb-interval "
        "--perturb-scale --perturb-hidden --perturb-layers --perturb-duration --seed --save-dir --device --scan",
    "evaluate_representations":
        "--checkpoint --data-dir --umap-points --umap-neighbors --no-umap --no-lb --lb-points --layers --per-layer "
        "--pca --velocity --seed --save-dir --device --scan",
    "visualize_gates":
        "--checkpoint --data-dir --layer --sample --n-samples --umap --umap-points --seed --save-dir --device --scan",
    "estimate_dimension": "--data-dir --points --k --seed --save-dir",
    "markov_circles_timeseries":
        "--data-dir --no-umap --n-steps --n-circles --ambient-dim --subspace-dim --radius-mean --radius-std "
        "--noise-std --dwell-mean --dwell-std --min-period --max-period --drift --drift-rate --center-walk-std --seed",
    "optimal_filter": "--data-dir --horizons --seq-len --stride --val-fraction --save-dir",
    "report": "--save-dir",
}


@pytest.fixture(params=SCRIPTS)
def helped(request, monkeypatch, capsys):
    """A script: its name, parse_args, the parser that it builds, and the text that its --help prints."""
    module, made, make = importlib.import_module(request.param), [], cli.parser

    def parser(doc):
        made.append(make(doc))
        return made[-1]

    monkeypatch.setattr(cli, "parser", parser)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    assert stop.value.code == 0
    return SimpleNamespace(name=request.param, parse_args=module.parse_args, parser=made[0],
                           text=capsys.readouterr().out)


def own_actions(parser):
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def shown_first(action):
    """The word with which an argument's entry begins: its flag, or the metavar of one that is given without a flag."""
    return (action.option_strings or [re.escape(action.metavar)])[0]


def entry(text, action):
    """What --help says of one argument: its lines, joined."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(rf"  {shown_first(action)}(?![\w-])", line))
    last = next(i for i in range(first + 1, len(lines)) if not lines[i].startswith("     "))
    return " ".join(" ".join(lines[first:last]).split())


def test_every_script_is_here():
    assert set(PROMISED) <= set(SCRIPTS)


def test_flags_stand_in_groups_of_few(helped):
    for group in helped.parser._action_groups[2:]:
        assert group._group_actions, f"the group {group.title!r} is empty"
        assert f"\n{group.title}:\n" in helped.text
    ungrouped = [action.option_strings for action in helped.parser._action_groups[1]._group_actions]
    assert ungrouped == [["-h", "--help"]]
    assert not helped.parser._action_groups[0]._group_actions  # no positional arguments anywhere
    assert len(helped.parser._action_groups) >= 4  # two of argparse's own


def test_every_flag_is_explained_with_its_default(helped):
    for action in own_actions(helped.parser):
        words = entry(helped.text, action)
        assert action.help and len(action.help.split()) > 1, action.option_strings
        if action.nargs != 0 and not action.required:
            assert words.count("(default: ") == 1, words
            assert "(default: None)" not in words and "Path(" not in words and "[" not in words.partition("(def")[2]
        if action.nargs == 0:
            assert action.default is False, "a switch is off unless given"
        if action.required:
            assert "required" in words


def test_a_shown_default_is_the_value_that_leaving_the_flag_out_gives(helped):
    required = [word for action in own_actions(helped.parser) if action.required
                for word in (*action.option_strings[:1], "some.pt")]
    valued = [action for action in own_actions(helped.parser)
              if action.nargs != 0 and not action.required and action.default not in (None, argparse.SUPPRESS)]
    plain = vars(helped.parse_args(required))
    for action in valued:
        shown = re.search(r"\(default: (.*)\)$", entry(helped.text, action))[1]
        given = vars(helped.parse_args([*required, action.option_strings[0], *shown.split()]))
        assert given[action.dest] == plain[action.dest], action.option_strings


def test_help_ends_with_examples_that_parse(helped):
    examples = helped.text.partition("\nexamples:\n")[2].replace("\\\n", " ").strip().splitlines()
    assert len(examples) >= 2
    for line in examples:
        python, script, *flags = shlex.split(line)
        assert (python, script) == ("python", f"{helped.name}.py")
        helped.parse_args(flags)


def test_description_says_what_is_read_or_made(helped):
    assert re.search(r"(?i)\b(reads|writes|measures|prints)\b", helped.text.partition("\n\n")[2])


def test_no_promised_flag_is_gone(helped):
    there = {name for action in helped.parser._actions for name in action.option_strings}
    assert set(PROMISED.get(helped.name, "").split()) <= there


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_waits_for_no_slow_import(name):
    done = subprocess.run([sys.executable, "-X", "importtime", REPO / f"{name}.py", "--help"], capture_output=True,
                          text=True, check=True)
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and "usage: " in done.stdout
    assert not imported & (TAKES_SECONDS if name in LIGHT else SLOW_IMPORTS)


def test_every_other_script_imports_torch():
    for name in set(SCRIPTS) - LIGHT:
        text = (REPO / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(r"^(import torch$|from mamba_model import)", text, re.MULTILINE), name
