"""README.md and docs/ against the code: their commands are run from their text, and what they name exists.

The commands of each page run in its order in a folder of their own, with sizes overridden and nothing else, and must
leave the files that the page says they write. Where the page says `make demo`, the scripts that the Makefile starts for
it run in the same way. What can't run here is checked as far as it can be: other make targets by a dry run, torchrun
lines by torch's parser and the script's, the job array by a shell with a recorder for `python`, pip lines by the files
that they name.
"""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import cli

REPO = Path(cli.__file__).parent
TRAINING = "masked_model_gpu_mamba_next"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

PAGES = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
         for path in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "data/README.md"]}
PROSE = {page: BLOCK.sub("", text) for page, text in PAGES.items()}
README, ALL_PROSE = PAGES["README.md"], "\n".join(PROSE.values())

# Sizes alone. They come after the page's own flags, and the last one counts.
SMALLER = {
    "markov_circles_timeseries": ["--n-steps", 12000],  # 10 % of it holds a window of 1024
    TRAINING: ["--d-model", 8, "--d-ff", 8, "--epochs", 1, "--warmup-epochs", 0, "--val-fraction", 0.1],
    "evaluate_representations": [], "generate": [], "visualize_gates": [], "estimate_dimension": [],
    "optimal_filter": [], "report": [],
}
# Where a flag would stand in the names of files, its default is replaced.
SMALLER_DEFAULTS = {"--umap-points": 100, "--lb-points": 300, "--points": 1000}
SIZES = {word for flags in SMALLER.values() for word in flags if str(word).startswith("--")} | set(SMALLER_DEFAULTS)


def expand(pattern):
    """`a_{b,c}.png` as ["a_b.png", "a_c.png"], as a shell would."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, tail = rest.partition("}")
    return [name for part in inside.split(",") for name in expand(head + part + tail)]


def blocks(page):
    """[(language, text)] of the page's fenced blocks."""
    return BLOCK.findall(PAGES[page])


def bash_lines(page):
    """[(line, files)] of the page's bash blocks: a command and what the comments under it say that it writes."""
    lines = []
    for text in (text for language, text in blocks(page) if language == "bash" and "<<" not in text):
        for line in text.splitlines():
            if line.startswith("# writes "):
                lines[-1][1].extend(name for word in line.split()[2:] for name in expand(word))
            elif not line.startswith("#"):
                lines.append((line, []))
    return lines


def lines_of(program, page=None):
    """[(words, files)] of the commands that start with `program`, of one page or of all."""
    return [(shlex.split(line, comments=True), files)
            for name in ([page] if page else PAGES) for line, files in bash_lines(name) if line.split()[0] == program]


def script_lines(page=None):
    """[(script, flags, files)] of the commands that run a script of this project."""
    return [(words[1].removesuffix(".py"), words[2:], files) for words, files in lines_of("python", page)
            if words[1] != "-m"]


PAGES_THAT_RUN = [page for page in PAGES if script_lines(page)]


# ---- what runs -------------------------------------------------------------------------------------------------


def test_every_bash_line_is_of_a_kind_that_is_checked_here():
    assert {line.split()[0] for page in PAGES for line, _ in bash_lines(page)} == {"make", "python", "torchrun"}
    every = [block for page in PAGES for block in blocks(page)]
    assert [text for _, text in every if "<<" in text] == [job_array()[0]]
    assert {language for language, _ in every} == {"bash", "python", "text"}
    assert {page for page in PAGES if "python" in dict(blocks(page))} == {"docs/recordings.md", "docs/runs.md"}


def test_all_scripts_are_shown_at_work():
    assert {name for name, _, _ in script_lines("README.md")} == set(SMALLER)


def test_the_commands_that_people_rely_on_are_in_the_readme():
    lines = "\n".join(line for line, _ in bash_lines("README.md"))
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


def numberless(text):
    """The text with 0 in place of every number."""
    return re.sub(r"\d+(\.\d+)?", "0", text)


def run_smaller(script, name, flags):
    """Run a command of a page with SMALLER sizes; it must succeed and say nothing on stderr."""
    smaller = SMALLER[name]
    if name == TRAINING and "--checkpoint" not in flags:  # the run has the name that the page says
        smaller = [*smaller, "--checkpoint", importlib.import_module(TRAINING).parse_args(flags).checkpoint]
    result = script(name, *flags, *smaller)
    assert result.code == 0 and result.err == "", (f"{name}.py {' '.join(flags)}", result.err)
    return result


@pytest.fixture
def small(monkeypatch):
    """Smaller sizes where a command has no flag for them, or none that leaves the names of its files alone."""
    monkeypatch.setattr("markov_circles_timeseries.UMAP_POINTS", 500)
    monkeypatch.setattr("measures.KMEANS_RESTARTS", 1)
    monkeypatch.setattr("unseen.TEST_STEPS", 20_000)
    add_argument = argparse._ActionsContainer.add_argument

    def add_smaller(self, *names, **settings):
        if names[0] in SMALLER_DEFAULTS:
            settings["default"] = SMALLER_DEFAULTS[names[0]]
        return add_argument(self, *names, **settings)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", add_smaller)


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_commands_run_in_order_and_write_what_the_page_says(page, script, small, undrawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = [text for language, text in blocks(page) if language == "python"]
    for code in codes:
        if "load_checkpoint" not in code:  # it makes data for the commands
            exec(code, {})
    if lines_of("make", page):
        printed = numberless("".join(run_smaller(script, name, flags).out for name, flags in demo_scripts()))
        assert all(numberless(text) in printed for language, text in blocks(page) if language == "text")
        shown = re.findall(r"^\| `([\w/.]+\.png)` \|", PROSE[page], re.MULTILINE)
        assert len(shown) > 4 and [path for path in shown if not Path("demo", path).exists()] == []
    for name, flags, files in script_lines(page):
        old = {path: path.stat().st_mtime_ns for path in map(Path, files) if path.exists()}
        result, command = run_smaller(script, name, flags), f"{name}.py {' '.join(flags)}"
        for path in map(Path, files):
            assert path.is_file() and path.stat().st_size > 0, f"{command} did not write {path}"
            assert path.stat().st_mtime_ns != old.get(path), f"{command} left {path} as it was"
        if not files:
            assert "wrote " in result.out or ("--eval" in flags and "command" in result.out and "horizon" in result.out)
    for code in (code for code in codes if "load_checkpoint" in code):
        names = {}
        exec(code, names)
        assert len(names["layers"]) == 4 and names["prediction"].shape == names["x"].shape == (1, 512, 20)


def test_reductions_change_sizes_alone():
    sizes = "--d-ff --d-model --epochs --lb-points --n-steps --points --umap-points --val-fraction --warmup-epochs"
    assert sorted(SIZES) == sizes.split()


# ---- what can't run here ---------------------------------------------------------------------------------------


def dry_run(*targets):
    done = subprocess.run(["make", "-n", *targets], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demo_scripts():
    """[(script, flags)] that `make demo` starts where there is no demo/ yet."""
    lines = dry_run("demo", "DEMO=fresh_demo").replace("\\\n", " ").replace("fresh_demo", "demo")
    return [(name, shlex.split(flags.partition("$(")[0]))
            for name, flags in re.findall(r"python (\w+)\.py (.*)", lines)]


def test_make_targets_exist():
    assert [words[1:] for words, _ in lines_of("make")] == [["demo"], ["test"]]
    named = set(re.findall(r"`make ([\w-]+)`", ALL_PROSE))
    assert {"demo", "study", "study-finite", "bench", "help"} <= named
    for target in {*named, "test"}:
        assert dry_run(target)
    assert dry_run() == dry_run("demo")


def test_make_help_names_every_target():
    text = subprocess.run(["make", "-s", "help"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split()
    assert re.findall(r"^make ([\w-]+) ", text, re.MULTILINE) == phony


def test_the_study_runs_the_flags_that_the_results_name():
    study = dry_run("study-finite", "STUDY=fresh_study")
    assert study.count(f"{TRAINING}.py") == 21 and "21 runs" in PAGES["docs/results.md"]
    started = re.findall(r"--no-train-eval \\ (.*?) ?\$\(test", " ".join(study.split()))
    results = " ".join(PAGES["docs/results.md"].split())
    table = re.findall(r" \| `(--[^`]+)` \|", results)
    ((common, full),) = re.findall(r"- `(--seq-len [^`]+)` with `(--[^`]+)`", results)
    (small,) = re.findall(r"- The same with `(--[^`]+)`", results)
    study = dry_run("study-subspace2", "STUDY=fresh_study").replace("\\\n", "")
    on_new_data = re.findall(r"--fresh ?(.*?) \$\(test", study)
    assert len(on_new_data) == 8 * 3 and len(set(on_new_data)) == 8
    walk = dry_run("study-walk", "STUDY=fresh_study").replace("\\\n", "")
    assert re.findall(r"--fresh ?(.*?) \$\(test", walk) == [f"--relative {flags}".rstrip() for flags in on_new_data]
    scaling = dry_run("study-scaling", "STUDY=fresh_study").replace("\\\n", "")
    compared = re.findall(r"fresh_study/default/data --val-fraction 0.1 .*--eval ([^>]*) >", scaling)
    assert [len(models.split()) for models in compared] == [24, 6, 6, 6]
    assert len(table) == 7 + 7
    assert {*table, f"{common} {full}", f"{common} {small}"} <= {*started, *on_new_data}


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
    """(block, script, task numbers) of the Slurm array."""
    (block,) = [text for page in PAGES for language, text in blocks(page) if language == "bash" and "sbatch" in text]
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
    ((words, _),) = [line for line in lines_of("python") if line[0][1] == "-m"]
    assert "--no-build-isolation" in words
    wanted = (REPO / words[words.index("-r") + 1]).read_text(encoding="utf-8")
    assert re.search(r"^mamba-ssm==", wanted, re.MULTILINE) and re.search(r"^causal-conv1d==", wanted, re.MULTILINE)


# ---- what they name --------------------------------------------------------------------------------------------


def all_flags():
    import test_help

    sources = [REPO / f"{name}.py" for name in [*test_help.SCRIPTS, "cli"]]
    return {flag for path in sources
            for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text(encoding="utf-8"))}


def test_flags_in_the_prose_exist():
    named = set(re.findall(r"(?<![\w-])(--[a-zA-Z][\w-]*)", " ".join(re.findall(r"`([^`]*)`", ALL_PROSE))))
    assert len(named) > 30
    assert named <= all_flags() | {"--help"}


def test_files_in_the_prose_exist():
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|txt|toml|cff))`", ALL_PROSE)) | set(re.findall(r"`(\w+/)`", README))
    assert len(named) > 20
    for name in named - {"demo/"}:  # which make demo makes
        assert (REPO / name).exists(), name


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (REPO / page).parent / path if path else REPO / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


def test_every_page_is_linked_in_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_every_module_is_in_the_file_table():
    table = PAGES["docs/files.md"]
    for path in REPO.glob("*.py"):
        assert f"`{path.name}`" in table, f"{path.name} is missing in docs/files.md"
    for path in REPO.glob("kernels/[!_]*.py"):
        assert f"`{path.stem}`" in table, f"kernels/{path.name} is missing in docs/files.md"


def test_code_named_in_the_prose_exists():
    training = importlib.import_module(TRAINING)
    functions = set(re.findall(r"`(\w+)\(\)`", PROSE["README.md"]))
    assert {"build_parser", "parameter_groups", "make_loss", "augment"} <= functions
    assert all(callable(getattr(training, name)) for name in functions)
    groups = {group.title for group in training.build_parser()._action_groups}
    assert "ablations and losses" in groups
    for constant in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PROSE["README.md"]):
        assert hasattr(training, constant), constant


def test_names_of_runs_are_as_described():
    training = importlib.import_module(TRAINING)
    named = re.findall(r"`(--[^`]+)` makes\s+`(model_next[\w.]+\.pt)`", PAGES["docs/runs.md"])
    assert len(named) == 2
    for flags, name in named:
        assert training.parse_args(flags.split()).checkpoint.name == name
    assert training.parse_args([]).checkpoint.name == "model_next.pt"


def test_numbers_of_the_model_are_true():
    from mamba_model import CausalTimeSeriesMamba

    training = importlib.import_module(TRAINING)
    count = sum(p.numel() for p in CausalTimeSeriesMamba().parameters())
    assert f"{count:,} parameters" in README
    assert f"the last {training.SAVE_EVERY_SECONDS} seconds" in " ".join(PAGES["docs/runs.md"].split())
    args = training.parse_args([])
    for size in (f"Linear(20 → {args.d_model})", f"{args.n_layers} layers", f"Linear({args.d_model} → {args.d_ff})"):
        assert size in README


def test_the_glossary_says_how_large_the_tensors_are():
    from mamba_model import MambaBlock

    block = MambaBlock(d_model=32, d_state=5, expand=3)
    d_inner, d_state, dt_rank = 96, 5, 2  # 3 · 32 and ⌈32 / 16⌉
    rows = dict(re.findall(r"^\| [^|]*\| ([^|]+) \| ([^|]+) \|", PROSE["docs/glossary.md"], re.MULTILINE))
    assert rows["`xz`"] == "(batch, time, 2 `d_inner`)" and block.in_proj.out_features == 2 * d_inner
    assert rows["`dt_rank`"] == "⌈`d_model` / 16⌉" and block.dt_rank == dt_rank
    assert rows["`x_dbl`"] == "(batch, time, `dt_rank` + 2 `d_state`)"
    assert block.x_proj.out_features == dt_rank + 2 * d_state
    assert rows["`A` = -exp(`A_log`)"] == "(`d_inner`, `d_state`)" and block.A_log.shape == (d_inner, d_state)
    assert rows["`D`"] == "(`d_inner`,)" and block.D.shape == (d_inner,)
    assert rows["`h`"] == "(batch, `d_inner`, `d_state`)" and block.init_state(4)[1].shape == (4, d_inner, d_state)


def test_figures_are_there_and_small():
    images = [(page, *image) for page in PAGES for image in re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGES[page])]
    assert len(images) >= 3
    for page, text, path in images:
        file = (REPO / page).parent / path
        assert len(text) > 20  # a reader who can't see it is told what it shows
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 300_000


def test_pages_are_whole_and_the_readme_stays_short():
    for page, prose in PROSE.items():
        assert len(re.findall(r"^# .*", prose, re.MULTILINE)) == 1, page
        assert "<!--" not in prose  # no place left to fill
    assert len(README.split()) <= 1500  # commands included


def test_licence_and_citation_say_the_same():
    licence, citation = ((REPO / name).read_text(encoding="utf-8") for name in ("LICENSE", "CITATION.cff"))
    assert licence.startswith("MIT License\n\nCopyright (c) 2026 the MambaSynth authors\n")
    assert {"cff-version: 1.2.0", "license: MIT", "type: software", "  - name: The MambaSynth authors"} <= set(
        citation.splitlines())
