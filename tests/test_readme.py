"""The README against the code: its commands are run from its text, and what it names exists.

Commands of the scripts run in the README's order in a folder of their own, with sizes overridden and nothing else, and
must leave the files that the README says they write. What can't run here is checked as far as it can be: make targets
by a dry run, torchrun lines by torch's parser and the script's, the job array by a shell with a recorder for `python`,
pip lines by the files that they name.
"""

import importlib
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import cli

REPO = Path(cli.__file__).parent
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
TRAINING = "masked_model_gpu_mamba_next"

# Sizes alone. They come after the README's own flags, and the last one counts.
SMALLER = {
    "markov_circles_timeseries": ["--n-steps", 12000],  # 10 % of it holds a window of 1024
    TRAINING: ["--d-model", 8, "--d-ff", 8, "--epochs", 1, "--warmup-epochs", 0, "--val-fraction", 0.1],
    "evaluate_representations": ["--umap-points", 100, "--lb-points", 300],
    "generate": [],
    "visualize_gates": ["--umap-points", 60],
    "estimate_dimension": ["--points", 1000],
    "optimal_filter": [],
}
SIZES = {word for flags in SMALLER.values() for word in flags if str(word).startswith("--")}


def expand(pattern):
    """`a_{b,c}.png` as ["a_b.png", "a_c.png"], as a shell would."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, tail = rest.partition("}")
    return [name for part in inside.split(",") for name in expand(head + part + tail)]


def bash_lines():
    """(line, files) of all bash blocks, in order: a command and what the comments under it say that it writes."""
    lines = []
    for block in (text for language, text in BLOCKS if language == "bash" and "<<" not in text):
        for line in block.splitlines():
            if line.startswith("# writes "):
                lines[-1][1].extend(name for word in line.split()[2:] for name in expand(word))
            elif not line.startswith("#"):
                lines.append((line, []))
    return lines


def lines_of(program):
    return [(shlex.split(line, comments=True), files) for line, files in bash_lines() if line.split()[0] == program]


SCRIPT_LINES = [(words[1].removesuffix(".py"), words[2:], files) for words, files in lines_of("python")
                if words[1] != "-m"]


# ---- what runs -------------------------------------------------------------------------------------------------


def test_every_bash_line_is_of_a_kind_that_is_checked_here():
    assert {line.split()[0] for line, _ in bash_lines()} == {"make", "python", "torchrun"}
    assert [text for language, text in BLOCKS if "<<" in text] == [job_array()[0]]
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


def test_all_scripts_are_shown_at_work():
    assert {name for name, _, _ in SCRIPT_LINES} == set(SMALLER)


def test_the_commands_that_people_rely_on_are_in_it():
    lines = "\n".join(line for line, _ in bash_lines())
    common = "--d-state 32 --seq-len 1024 --stride 256 --no-compile --no-train-eval"
    for command in ("markov_circles_timeseries.py", f"{TRAINING}.py {common}",
                    f"{TRAINING}.py --gate-lr-factor 0 {common} --checkpoint model_next_frozen.pt",
                    f"{TRAINING}.py --gate-lr-factor 0.01 {common} --checkpoint model_next_slow_gates.pt",
                    f"{TRAINING}.py {common} --max-horizon 64",
                    "evaluate_representations.py --checkpoint model_next.pt",
                    "evaluate_representations.py --checkpoint model_next.pt --pca 20",
                    "generate.py --checkpoint model_next.pt --seed-len 64 --gen-len 512",
                    "generate.py --checkpoint model_next.pt --gen-len 2048 --temperature 0.5",
                    "generate.py --checkpoint model_next.pt --gen-len 2048 --perturb-hidden --perturb-interval 200 "
                    "--perturb-scale 50 --perturb-duration 10",
                    "visualize_gates.py --checkpoint model_next.pt --layer 7 --sample 0",
                    "visualize_gates.py --checkpoint model_next.pt --umap", "estimate_dimension.py"):
        assert re.search(rf"^python {re.escape(command)}$", lines, re.MULTILINE), command


def test_commands_run_in_order_and_write_what_the_readme_says(script, one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("markov_circles_timeseries.UMAP_POINTS", 500)  # a size without a flag
    for name, flags, files in SCRIPT_LINES:
        old = {path: path.stat().st_mtime_ns for path in map(Path, files) if path.exists()}
        result = script(name, *flags, *SMALLER[name])
        command = f"{name}.py {' '.join(flags)}"
        assert result.code == 0 and result.err == "", (command, result.err)
        for path in map(Path, files):
            assert path.is_file() and path.stat().st_size > 0, f"{command} did not write {path}"
            assert path.stat().st_mtime_ns != old.get(path), f"{command} left {path} as it was"
        if not files:
            assert "--eval" in flags and "command" in result.out and "horizon" in result.out
    for language, code in BLOCKS:
        if language == "python":
            names = {}
            exec(code, names)
            assert len(names["layers"]) == 7 and names["prediction"].shape == names["x"].shape == (1, 1024, 20)
    named_by_a_command = {file for _, _, files in SCRIPT_LINES for file in files}
    unnamed = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("plots/*")} - named_by_a_command
    assert all(re.search(r"model_next(_frozen)?_(summary\.png|metrics\.json)$", path) for path in unnamed), unnamed


def test_reductions_change_sizes_alone():
    sizes = "--d-ff --d-model --epochs --lb-points --n-steps --points --umap-points --val-fraction --warmup-epochs"
    assert sorted(SIZES) == sizes.split()


# ---- what can't run here ---------------------------------------------------------------------------------------


def test_make_targets_exist():
    targets = [words[1:] for words, _ in lines_of("make")]
    assert targets == [["demo"], ["test"]]
    for target in [*targets, ["study"], ["bench"]]:
        done = subprocess.run(["make", "-n", *target], cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_torchrun_lines_parse_as_torch_and_the_script_read_them():
    from torch.distributed.run import get_args_parser

    lines = lines_of("torchrun")
    assert len(lines) == 2
    for words, _ in lines:
        launch = get_args_parser().parse_args(words[1:])
        assert launch.training_script == f"{TRAINING}.py"
        args = importlib.import_module(TRAINING).parse_args(launch.training_script_args)
        processes = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[-1])  # nnodes may be a range
        assert args.batch_size % processes == 0 and processes > 1
    assert launch.rdzv_endpoint == "HOST:29500" and launch.rdzv_backend == "c10d"


def job_array():
    """(block, script, number of tasks) of the README's Slurm array."""
    (block,) = [text for language, text in BLOCKS if language == "bash" and "sbatch" in text]
    script = re.search(r"<<'END'\n(.*?)^END$", block, re.DOTALL | re.MULTILINE)[1]
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    return block, script, range(first, last + 1)


def test_the_job_array_starts_each_ablation_once_under_a_name_of_its_own(tmp_path):
    block, script, tasks = job_array()
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    recorder = 'python() { printf "%s\\n" "$@"; }\n'
    runs = []
    for task in tasks:
        done = subprocess.run(["bash", "-eu"], input=recorder + script, text=True, capture_output=True, check=True,
                              cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task)})
        name, *flags = done.stdout.split()
        assert name == f"{TRAINING}.py"
        runs.append(importlib.import_module(TRAINING).parse_args(flags))
    names = [run.checkpoint.name for run in runs]
    assert len(set(names)) == len(tasks) == len(re.search(r"ablations=\((.*)\)", script)[1].split('" "'))
    assert {"model_next.pt", "model_next_gate_lr_factor0.pt", "model_next_max_horizon64.pt"} <= set(names)


def test_pip_lines_name_files_that_are_there():
    pip = [words for words, _ in lines_of("python") if words[1] == "-m"]
    assert len(pip) == 1
    words = pip[0]
    assert "--no-build-isolation" in words
    wanted = (REPO / words[words.index("-r") + 1]).read_text(encoding="utf-8")
    assert re.search(r"^mamba-ssm==", wanted, re.MULTILINE) and re.search(r"^causal-conv1d==", wanted, re.MULTILINE)


# ---- what it names ---------------------------------------------------------------------------------------------


def all_flags():
    import test_help

    found = set()
    for name in test_help.SCRIPTS:
        source = (REPO / f"{name}.py").read_text(encoding="utf-8")
        found |= set(re.findall(r'add_argument\("(--[\w-]+)"', source))
    return found | set(re.findall(r'add_argument\("(--[\w-]+)"', (REPO / "cli.py").read_text(encoding="utf-8")))


def test_flags_in_the_prose_exist():
    named = set(re.findall(r"`[^`]*?(--[a-zA-Z][\w-]*)[^`]*`", PROSE))
    assert len(named) > 10
    assert named <= all_flags() | {"--help"}


def test_files_in_the_prose_exist():
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|txt|toml))`", PROSE)) | set(re.findall(r"`(\w+/)`", PROSE))
    assert len(named) > 15
    for name in named:
        assert (REPO / name).exists(), name


def test_every_module_is_in_the_file_table():
    table = README.partition("## Files")[2]
    for path in REPO.glob("*.py"):
        assert f"`{path.name}`" in table, f"{path.name} is missing in the README's table of files"


def test_code_named_in_the_prose_exists():
    training = importlib.import_module(TRAINING)
    functions = set(re.findall(r"`(\w+)\(\)`", PROSE))
    assert {"build_parser", "parameter_groups", "make_loss", "augment"} <= functions
    assert all(callable(getattr(training, name)) for name in functions)
    groups = {group.title for group in training.build_parser()._action_groups}
    assert "ablations and losses" in groups
    for constant in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PROSE):
        assert hasattr(training, constant), constant


def test_names_of_runs_are_as_described():
    training = importlib.import_module(TRAINING)
    named = re.findall(r"`(--[^`]+)` makes\s+`(model_next\w+\.pt)`", PROSE)
    assert len(named) == 2
    for flags, name in named:
        assert training.parse_args(flags.split()).checkpoint.name == name
    assert training.parse_args([]).checkpoint.name == "model_next.pt"


def test_numbers_of_the_model_are_true():
    from mamba_model import CausalTimeSeriesMamba

    training = importlib.import_module(TRAINING)
    count = sum(p.numel() for p in CausalTimeSeriesMamba().parameters())
    assert f"{count:,} parameters" in PROSE
    assert f"the last {training.SAVE_EVERY_SECONDS} seconds" in " ".join(PROSE.split())
    args = training.parse_args([])
    for size in (f"Linear(20 → {args.d_model})", f"{args.n_layers} layers", f"Linear({args.d_model} → {args.d_ff})"):
        assert size in PROSE


def test_figures_are_there_and_small():
    images = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", README)
    assert images
    for text, path in images:
        assert len(text) > 20  # a reader who can't see it is told what it shows
        assert (REPO / path).read_bytes().startswith(b"\x89PNG") and (REPO / path).stat().st_size < 300_000


def test_it_stays_short():
    assert list(itertools.chain(re.findall(r"^# .*", PROSE, re.MULTILINE))) == ["# MambaSynth"]
    assert "<!--" not in PROSE  # no place left to fill
    outside_tables = re.sub(r"^\|.*\n", "", PROSE, flags=re.MULTILINE)
    assert len(outside_tables.split()) < 1500  # five minutes
