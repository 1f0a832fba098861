"""The edges that all scripts share: errors as one line, whole files, left-overs of killed runs."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cli

ROOT = Path(__file__).parent.parent


def ended(tmp_path, body, shell="{}", **more):
    """Run a main(args) with this body by cli.run in a process of its own; `shell` says where its output goes."""
    script = tmp_path / "script.py"
    script.write_text(f"import cli, os, sys\ncli.start()\ndef main(args):\n{textwrap.indent(body, '    ')}\n"
                      "cli.run(main, None)\n")
    command = shell.format(f"{sys.executable} {script}")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})})


@pytest.mark.parametrize("body, code, message", [
    ("raise cli.UserError('two\\nlines')", 2, "error: two lines"),
    ("raise KeyboardInterrupt", 130, "error: interrupted"),
    ("raise MemoryError", 2, "error: out of memory"),
    ("raise RuntimeError('CUDA out of memory. Tried')", 2, "error: out of memory on the device"),
    ("open('/no/such/file')", 2, "error: can't read or write /no/such/file: No such file"),
    ("print('\\u2013 \\ud800')", 0, "")])
def test_how_a_script_ends(tmp_path, body, code, message):
    result = ended(tmp_path, body, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == code and result.stderr.startswith(message)
    assert result.stderr.count("\n") == (code != 0) and "Traceback" not in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
    assert "Traceback" in ended(tmp_path, "raise RuntimeError('a bug')").stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("body", ["print('x')", "print('x' * 10**6)", "print('x'); raise cli.UserError('y')"])
def test_stdout_on_a_full_disk(tmp_path, body):
    result = ended(tmp_path, body, "{} > /dev/full")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("body", ["print('x')", "print('x\\n' * 10**6)"])
def test_a_reader_that_leaves(tmp_path, body):
    assert ended(tmp_path, f"import time\ntime.sleep(0.3)\n{body}", "{} | true").stderr == ""


# ---- whole files


def test_writing_replaces_only_at_a_good_end(tmp_path):
    path = tmp_path / "a.txt"
    cli.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), cli.writing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(cli.UserError, match=r"can't write .*a\.txt: No space left on device; free some space"), \
            cli.writing(path) as part:
        part.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with cli.writing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path and part.suffix == ".txt"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: order.append(name) or real(*args))
    cli.write_text(tmp_path / "a.txt", "new")
    assert order == ["fsync", "replace"] and (tmp_path / "a.txt").read_text() == "new"


def test_writing_into_a_folder_that_is_gone(tmp_path):
    with pytest.raises(cli.UserError, match="No such file"), cli.writing(tmp_path / "gone" / "a.txt") as part:
        part.write_text("x")
    with pytest.raises(cli.UserError, match="can't write to folder"):
        cli.output_folder("/dev/null/x")


def test_left_overs_of_dead_processes_are_removed(tmp_path):
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(f"""
        import cli, os, pathlib, signal
        with cli.writing(pathlib.Path({str(tmp_path / 'series.v2.npz')!r})) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """)], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert child.returncode == -9
    dead, = tmp_path.iterdir()
    assert dead.name.startswith(".series.v2.") and dead.suffix == ".npz"
    number = dead.name.split(".")[-3]
    keep = [tmp_path / name for name in (
        dead.name.replace(f".{number}.", f".{os.getpid()}."),  # of a process that is still at it
        dead.name.replace(f".{number}.", f".{10**30}."), dead.name.replace(cli._host(), "another-machine"),
        "series.npz", ".hidden", ".x.part.npz")]
    for path in keep:
        path.touch()
    cli.output_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(keep)


def test_output_folder_is_made(tmp_path):
    assert cli.output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---- flags


@pytest.mark.parametrize("kind, good, bad", [
    (cli.positive_int, ["1", "1" + "0" * 30], ["0", "-1", "1.5", "", "x", "nan", "1" + "0" * 29 + "1", "9" * 5000]),
    (cli.non_negative_int, ["0", "1", "1" + "0" * 30], ["-1", "0.0", "1" + "0" * 29 + "1"]),
    (cli.positive_float, ["1e-9", "3", "1e308"], ["0", "nan", "inf", "-1", "1e999"]),
    (cli.non_negative_float, ["0", "1e308"], ["-1e-9", "nan", "inf", "1e999"]),
    (cli.fraction, ["1e-9", "0.5", "0.999"], ["0", "1", "nan", "-0.1", "inf"]),
    (cli.probability, ["0", "0.99"], ["1", "-0.1", "nan", "inf"]),
    (cli.seed, ["0", "4294967295"], ["4294967296", "-1", "1e3"])])
def test_numbers(kind, good, bad):
    for text in good:
        assert kind(text) == (int(text) if text.isdigit() else float(text))
    for text in bad:
        with pytest.raises(Exception, match="is not"):
            kind(text)


def test_a_flag_is_one_line_and_never_abbreviated(capsys):
    parser = cli.parser("What it does.\n\nExamples:\n  python x.py")
    cli.add_seed(parser)
    for argv in (["--see", "1"], ["--seed", "x"], ["--seed", "4294967296"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(argv)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "--help" in err


def test_the_shared_flags_and_their_defaults():
    parser = cli.parser("What it does.\n\nExamples:\n  python x.py")
    cli.add_computing(parser)
    cli.add_data_dir(parser)
    cli.add_save_dir(parser, "figures")
    assert vars(parser.parse_args([])) == {"seed": 42, "device": "auto", "scan": "auto", "data_dir": Path("data"),
                                           "save_dir": Path("figures")}
    given = parser.parse_args(["--seed", "7", "--device", "cuda:1", "--scan", "reference", "--data-dir", "d",
                               "--save-dir", "s"])
    assert vars(given) == {"seed": 7, "device": "cuda:1", "scan": "reference", "data_dir": Path("d"),
                           "save_dir": Path("s")}
    assert parser.parse_args(["--scan", "triton"]).scan == "cuda"  # its former name
    group, = (group for group in parser._action_groups if group.title == "computing")
    assert [action.dest for action in group._group_actions] == ["seed", "device", "scan"]
    assert cli.WINDOW_DEFAULTS == {"seq_len": 1024, "stride": 256, "val_fraction": 0.1}


def test_help_shows_defaults_as_they_are_typed_and_examples_last():
    parser = cli.parser("What it does.\n\nExamples:\n  python x.py --a 3")
    parser.add_argument("--a", default=[1, 2], help="numbers")
    parser.add_argument("--b", default=0.5, help="a share")
    parser.add_argument("--c", action="store_true", help="a switch")
    parser.add_argument("--d", help="a name")
    text = parser.format_help()
    assert text.index("What it does.") < text.index("options:") < text.index("examples:\n  python x.py --a 3")
    assert "numbers (default: 1 2)" in text and "a share (default: 0.5)" in text and text.count("default") == 2


@pytest.mark.parametrize("name, gpus, answer", [
    ("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1"),
    ("cuda:2", 2, "cuda:2 is beyond the 2 GPUs here, counted from 0"),
    ("cuda", 0, "no CUDA GPU is usable here; use --device cpu"),
    ("mps", 0, "--device mps is not supported"), ("gpu", 1, "--device gpu is no device")])
def test_pick_device(monkeypatch, name, gpus, answer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if " " in answer:
        with pytest.raises(cli.UserError, match=answer):
            cli.pick_device(name)
    else:
        assert cli.pick_device(name) == torch.device(answer)


def test_table():
    assert cli.table(["name", "value"], [["a", 1], ["long", 22]]) == (
        "name  value\n----  -----\na         1\nlong     22")
    assert cli.table(["a", "bcd", "e"], [["wide", "x", "y"]], "rlr") == "   a  bcd  e\n----  ---  -\nwide  x    y"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"])
def test_what_the_user_set_for_torch_stays(name):
    code = f"import os, sys, cli; cli.start(); print(os.environ[{name!r}], 'torch' in sys.modules)"
    others = {key: value for key, value in os.environ.items() if key != name}

    def shown(environment):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True,
                              check=True).stdout.split()

    value, torch_is_there = shown(others)
    assert value and torch_is_there == "False"  # torch reads them when it is imported
    assert shown({**others, name: "7"}) == ["7", "False"]


# ---- words


def test_a_wrong_flag_proposes_the_one_that_is_near(refused):
    training = "masked_model_gpu_mamba_next"
    assert refused(training, "--epoch", 3).endswith(
        "unrecognized arguments: --epoch 3; did you mean --epochs?; see pytest --help\n".replace(
            "pytest", "masked_model_gpu_mamba_next.py"))
    assert "did you mean --max-horizon and --gate-lr-factor?" in refused(
        training, "--max-horizons=8", "--gate-lr-factors", 1)
    assert "did you mean" not in refused(training, "--colour", "red") + refused(training, "--epochs", "-1")


def test_things_are_counted_in_words():
    assert [cli.count(n, "visit") for n in (0, 1, 2, 12345)] == ["0 visits", "1 visit", "2 visits", "12,345 visits"]
    assert [cli.count(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
