"""Kill the scripts with SIGKILL at random moments, again and again, and check what they leave behind.

Generation over older data, training (saving after every epoch) and evaluation are killed at a random time, while a
file is half-written, just before or after a file gets its name, and in the middle of a log row. After each kill every
file under a final name must be whole and the user's next step must work: the same command again, or --resume where
NAME_last.pt is there. In the end a run that was killed many times must equal one that never was, bit for bit, and no
half-written file may be left. Ends with exit code 1 and what was wrong if it isn't so.

Examples:
  python tests/kill_runs.py --kills 60
  python tests/kill_runs.py --kills 200 --seed 1
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.dont_write_bytecode = True
os.environ["OMP_NUM_THREADS"] = "1"  # children are forked: no thread pool may be there before

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import cli  # noqa: E402
import dataset  # noqa: E402
import estimate_dimension  # noqa: E402, F401 - imported once, for all children
import generate  # noqa: E402
import markov_circles_timeseries as generator  # noqa: E402
import masked_model_gpu_mamba_next as training  # noqa: E402
import run_files  # noqa: E402
import visualize_gates  # noqa: E402

DATA = ["--no-umap", "--n-circles", "4", "--ambient-dim", "6", "--min-period", "10", "--max-period", "40",
        "--dwell-mean", "80", "--dwell-std", "20"]
TRAIN = ["--d-model", "16", "--n-layers", "2", "--d-state", "4", "--d-ff", "16", "--seq-len", "64", "--stride", "64",
         "--batch-size", "8", "--epochs", "8", "--warmup-epochs", "1", "--device", "cpu", "--max-horizon", "2"]
PLANS = ("time", "part", "before rename", "after rename", "row")


class Wrong(Exception):
    """What must not be, in words."""


def check(right, message):
    if not right:
        raise Wrong(message)


# ---- one life of a script


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def arm(plan, count):
    """Make this process kill itself at the count-th rename or log row."""
    left = [count]

    def due():
        left[0] -= 1
        return left[0] < 0

    replace, log_writer = os.replace, run_files.log_writer

    def deadly_replace(*args):
        deadly = due()
        if deadly and plan == "before rename":
            kill_myself()
        replace(*args)
        if deadly:
            kill_myself()

    def deadly_append(path, columns, row):
        text, deadly = io.StringIO(), due()
        log_writer(text, columns).writerow(row)
        text = text.getvalue()
        with open(path, "a", encoding="utf-8") as file:
            file.write(text[:len(text) * 2 // 3] if deadly else text)
        if deadly:
            kill_myself()

    if plan == "row":
        run_files.append_row = deadly_append
    elif plan in ("before rename", "after rename"):
        os.replace = deadly_replace


def live(module, argv, folder, plan, rng, seconds):
    """Run a script in a forked child and kill it by plan (None: let it live). Returns (killed, exit code, output)."""
    with tempfile.TemporaryFile("w+") as output:
        count = rng.randrange(12)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                training.SAVE_EVERY_SECONDS = 0
                arm(plan, count)
                sys.argv = [f"{module.__name__}.py", *map(str, argv)]
                cli.run(module.main, module.parse_args([str(word) for word in argv]))
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        if plan == "time":
            wait_for(pid, rng.uniform(0, seconds), lambda: False)
        elif plan == "part":
            wait_for(pid, rng.uniform(0, seconds), lambda: False)
            wait_for(pid, 60, lambda: any(p.name.startswith(".") and ".part" in p.name for p in folder.iterdir()))
            time.sleep(rng.uniform(0, 0.002))
        if plan in ("time", "part"):
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so it can't be another's
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        killed = os.WIFSIGNALED(status)
        return killed, None if killed else os.waitstatus_to_exitcode(status), output.read()


def wait_for(pid, seconds, happened):
    """Sleep until a child has ended, `happened()` or the time is over. The child stays to be waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not happened():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0005)


# ---- what is left behind


def check_whole(folder):
    """Raise unless every file under a final name can be read to its end."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            check(".part" in path.name or path.suffix == ".lock", f"{path}: a hidden file of an unknown kind")
            continue
        try:
            if path.suffix == ".npz":
                with np.load(path) as file:
                    for name in file.files:
                        file[name]
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".csv":
                header, *rows = path.read_text().split("\n")[:-1]  # the last row may be cut: it has no newline
                check(all(row.count(",") == header.count(",") for row in rows), "a row is cut, and another follows")
            else:
                raise Wrong("a file of an unknown kind")
        except Exception as error:
            raise Wrong(f"{path} is not whole: {error}") from None


def check_clean(folder):
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    check(not left, f"{folder}: {left} left after a run that ended well")


def same_state(a, b):
    """Whether two checkpoints' values are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_without_seconds(path):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return [row[:seconds] + row[seconds + 1:] for row in rows]


# ---- the three kinds of run: each yields the plan after every kill, and None after a run that came to its end


class Fate:
    """Draws how the next run is killed; once `over`, none is."""

    def __init__(self, seed):
        self.rng, self.over = random.Random(seed), False

    def choose(self, plans):
        return None if self.over else self.rng.choice(plans)


def killed_generations(folder, fate):
    """Two series in turn into the same folder, out of which the other one is taken first, though not its config.json:
    what is there is one or the other, never a mixture."""
    variants = {seed: [*DATA, "--data-dir", folder, "--n-steps", steps, "--seed", seed, *more]
                for seed, steps, more in ((1, 3000, []), (2, 4000, ["--uncompressed"]))}
    true = {seed: generator.generate(generator.config_of(generator.parse_args([str(w) for w in argv]))).X
            for seed, argv in variants.items()}
    seconds = 2.0
    while True:
        for own_seed, argv in variants.items():
            data = folder / "data.npz"
            if data.exists() and not np.array_equal(dataset.load_series(folder).X, true[own_seed]):
                data.unlink()
            started = time.monotonic()
            plan = fate.choose(PLANS[:4])
            killed, code, output = live(generator, argv, folder, plan, fate.rng, seconds)
            check_whole(folder)
            if (folder / "data.npz").exists():
                series = dataset.load_series(folder)
                check(any(np.array_equal(series.X, X) for X in true.values()), "data.npz is neither series")
                seed = series.config.get("seed")
                check(seed is None or np.array_equal(series.X, true[seed]), "config.json is of other data")
            if not killed:
                check(code == 0, f"generation ended with {code}: {output}")
                check_clean(folder)
                seconds = time.monotonic() - started
            yield plan if killed else None


def killed_trainings(folder, data_dir, fate):
    """A run that is killed until it ends, over and over under new names, against one that never was."""
    def argv(name, resume=False):
        return [*TRAIN, "--data-dir", data_dir, "--checkpoint", folder / name / "a.pt"] + ["--resume"] * resume

    started = time.monotonic()
    _, code, output = live(training, argv("never"), folder, None, fate.rng, 0)
    check(code == 0, f"training ended with {code}: {output}")
    seconds, never = time.monotonic() - started, folder / "never"
    n = 0
    while True:
        n, run = n + 1, folder / f"killed{n}"
        run.mkdir()
        killed, kills = True, 0
        while killed:
            resume = (run / "a_last.pt").exists()
            if resume and fate.rng.random() < 0.2:
                _, code, output = live(training, argv(run.name), run, None, fate.rng, 0)
                check(code == 2 and "--resume" in output, f"a taken name got {code}: {output}")
            # After a while it is left alone, so that runs end.
            plan = fate.choose(PLANS) if kills < 8 else None
            killed, code, output = live(training, argv(run.name, resume), run, plan, fate.rng, seconds)
            check_whole(run)
            if killed:
                kills += 1
                yield plan
        check(code == 0, f"{'--resume' if resume else 'training'} ended with {code}: {output}")
        check_clean(run)
        check({p.name for p in run.iterdir()} == {p.name for p in never.iterdir()}, f"{run}: other files than {never}")
        for name in ("a.pt", "a_last.pt"):
            a, b = (torch.load(d / name, weights_only=True) for d in (never, run))
            for checkpoint in (a, b):
                del checkpoint["args"], checkpoint["record"]  # --resume, --checkpoint, the times of all starts
                # The last step's learning rate, which the schedule sets anew at each step.
                del checkpoint["optimizer_state_dict"]["param_groups"]
            other = [key for key in a if not same_state(a[key], b[key])]
            check(not other, f"{run / name} differs from {never}'s: {other}")
        logs = [log_without_seconds(d / "a_log.csv") for d in (never, run)]
        check(logs[0] == logs[1], f"{run}'s log differs from {never}'s")
        yield None


def killed_evaluations(folder, data_dir, checkpoint, fate):
    """Generation by the model and figures of its gates into one folder."""
    common = ["--checkpoint", checkpoint, "--data-dir", data_dir, "--save-dir", folder, "--device", "cpu"]
    scripts = [(generate, [*common, "--gen-len", 200, "--seed-len", 64]), (visualize_gates, [*common, "--layer", 1])]
    seconds = {}
    while True:
        for module, argv in scripts:
            started, plan = time.monotonic(), fate.choose(PLANS[:4])
            killed, code, output = live(module, argv, folder, plan, fate.rng, seconds.get(module, 3.0))
            check_whole(folder)
            if not killed:
                check(code == 0, f"{module.__name__} ended with {code}: {output}")
                check_clean(folder)
                seconds[module] = time.monotonic() - started
            yield plan if killed else None


def main(args):
    torch.set_num_threads(1)
    fate = Fate(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data_dir, made, runs, plots = (folder / name for name in ("data", "made", "runs", "plots"))
        for path in (made, runs, plots):
            path.mkdir()
        argv = [*DATA, "--n-steps", 3000, "--data-dir", data_dir]
        _, code, output = live(generator, argv, folder, None, fate.rng, 0)
        check(code == 0, output)
        kinds = {"training": killed_trainings(runs, data_dir, fate), "generation": killed_generations(made, fate),
                 "evaluation": killed_evaluations(plots, data_dir, runs / "never" / "a.pt", fate)}
        kills = Counter()
        while kills.total() < args.kills:
            # Every other kill is of a training, for it has the most to lose.
            kind = ("training", "generation", "training", "evaluation")[kills.total() % 4]
            plan = next(kinds[kind])
            kills[kind, plan] += plan is not None
        fate.over = True
        for runs_of_a_kind in kinds.values():
            while next(runs_of_a_kind) is not None:
                pass
    for (kind, plan), n in sorted((key, n) for key, n in kills.items() if n):
        print(f"{kind:12} {plan:14} {n:4}")
    print(f"{args.kills} kills: every file whole, every run went on, killed trainings equal the one that never was")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="how many (default: 60)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the moments (default: 0)")
    try:
        main(parser.parse_args())
    except Wrong as wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
        sys.exit(1)
