"""Two commands that differ in anything that changes the result never write the same file."""

import argparse
from pathlib import Path

import pytest

import cli
import estimate_dimension
import evaluate_representations
import generate
import masked_model_gpu_mamba_next as training
import optimal_filter
import visualize_gates

# Flags that no file's name needs to tell: they say where or how, not what; or the files of both commands differ anyway.
NOT_RESULTS = {"help", "save_dir", "format", "style", "device", "scan", "checkpoint", "data_dir"}
SCRIPTS = {  # module: (what every command has, the stem of what it writes, further flags without a part in it)
    estimate_dimension: ("", lambda args: args.name, set()),
    optimal_filter: ("", lambda args: args.name, set()),
    # What these leave out keeps what an earlier command has measured.
    evaluate_representations: ("", lambda args: args.settings,
                               {"layers", "no_umap", "no_lb", "no_baselines", "hold", "per_layer"}),
    # Layer, sample and --umap are in the name themselves; of more samples each has a file of its own.
    visualize_gates: ("--checkpoint a.pt --umap", lambda args: args.settings, {"layer", "sample", "n_samples", "umap"}),
    generate: ("--checkpoint a.pt", lambda args: generate.file_prefix(args), set()),
    training: ("", lambda args: args.checkpoint.name, {"resume", "eval", "log_dir", "num_workers", "no_compile",
                                                      "no_train_eval", "test_steps"}),
}
NEEDS = {"perturb_scale": "--perturb-interval 60", "perturb_duration": "--perturb-interval 60",
         "perturb_hidden": "--perturb-interval 60", "perturb_layers": "--perturb-interval 60 --perturb-hidden"}
VALUES = ("3", "0.25", "7", "100", "delta", "1,2")


def parsed(module, words):
    try:
        return module.parse_args(words)
    except SystemExit:
        return None


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_every_flag_that_changes_the_result_stands_in_the_name(monkeypatch, capsys, module):
    common, name_of, without = SCRIPTS[module]
    made, make = [], cli.parser
    monkeypatch.setattr(cli, "parser", lambda doc: made.append(make(doc)) or made[-1])
    module.parse_args(common.split())
    actions = [action for action in made[0]._actions if action.dest not in NOT_RESULTS | without]
    assert len(actions) > 1
    for action in actions:
        words = [*common.split(), *NEEDS.get(action.dest, "").split()]
        plain, flag = name_of(module.parse_args(words)), action.option_strings[0]
        if action.nargs == 0 and isinstance(action, argparse._StoreTrueAction):
            changed = [name_of(module.parse_args([*words, flag]))] if flag not in words else [None]
        else:
            tried = [parsed(module, [*words, flag, value]) for value in VALUES]
            changed = [name_of(args) for args in tried if args and getattr(args, action.dest) != action.default]
        assert changed and plain not in changed and len(set(changed)) == len(changed), (flag, plain, changed)
    capsys.readouterr()


def test_data_of_the_same_name_in_two_places_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def names(*words):
        return [script.parse_args(list(map(str, words))).name for script in (estimate_dimension, optimal_filter)]

    assert names() == names("--data-dir", tmp_path / "data") == ["dimension", "optimal_filter"]
    assert names("--data-dir", "data/subspace4") == ["dimension_subspace4", "optimal_filter_subspace4"]
    assert names("--data", "songs.npz:arr_0,arr_1")[0] == "dimension_songs.npz-arr_0-arr_1"
    assert names("--data", "rec.csv")[0] == "dimension_rec.csv"
    sources = ["/a/rec", "/b/rec", "/a/rec.csv", "/a/rec.npy", "rec", "rec.csv", "rec.npy", "data/rec", "data/rec.csv",
               "rec/data", "data/rec/data", "/a/data/rec"]
    for script in (0, 1):
        found = [names("--data", source)[script] for source in sources]
        assert len(set(found)) == len(sources) and all("rec" in name for name in found)
    # A model's own data need no name, those beside them no hash, and all others are told apart.
    own = tmp_path / "runs" / "long"
    of_model = [cli.data_name(source, own, own.parent) for source in (own, own.parent / "test", own / "test", "/test")]
    assert of_model[:2] == ["", "test"] and len(set(of_model)) == 4


def test_a_name_holds_every_value_exactly():
    assert [cli.value_name(value) for value in (0.5, 1e-3, 1000000, 0.1 + 0.2, [5, 10, 0.25], 10**20)] == [
        "0.5", "0.001", "1e+06", "0.30000000000000004", "5-10-0.25", "1e+20"]
    assert Path(cli.short_name("x" * 300)).name != Path(cli.short_name("x" * 301)).name
