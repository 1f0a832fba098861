"""What a run leaves on disk, how it is opened again, and what ranks agree on as far as one process can show it."""

import csv
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
import dataset
import masked_model_gpu_mamba_next as training
import ranks
import run_files

CPU = torch.device("cpu")


def saved(args):
    """The flags as a checkpoint holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name != "flags_given"}


# ---- names


def test_the_files_of_a_run_and_that_each_takes_its_name(tmp_path):
    files = run_files.files_of(tmp_path / "x.y.pt")
    assert {role: path.name for role, path in files.items()} == {
        "best": "x.y.pt", "last": "x.y_last.pt", "log": "x.y_log.csv", "record": "x.y_run.json", "loss": "x.y_loss.png",
        "prediction_0": "x.y_prediction_0.png", "prediction_1": "x.y_prediction_1.png",
        "prediction_2": "x.y_prediction_2.png"}
    assert {path.parent for path in files.values()} == {tmp_path}
    run_files.refuse_taken(files)
    for role, path in files.items():
        path.touch()
        with pytest.raises(cli.UserError, match=f"{path.name} exists already") as error:
            run_files.refuse_taken(files)
        assert ("--resume" in str(error.value)) == (role == "last")
        path.unlink()


# ---- log


MODEL = SimpleNamespace(horizons=[1, 2], measures=("mse",), backend_for=lambda device: "cpu", parameters=lambda: [])
COLUMNS = run_files.log_columns(MODEL, True)


def row_of(epoch):
    return {name: (epoch if name == "epoch" else 10 * epoch if name == "step" else epoch + i / 7)
            for i, name in enumerate(COLUMNS)}


def test_a_log_reads_back_as_it_was_written(tmp_path):
    path, rows = tmp_path / "a_log.csv", [row_of(1), {**row_of(2), "floor_mse_2": None, "excess_percent_2": None}]
    run_files.start_log(path, COLUMNS, rows[:1])
    run_files.append_row(path, COLUMNS, {**rows[1], "more": 3})
    assert run_files.read_log(path, COLUMNS, 2) == rows
    assert path.read_bytes().count(b"\n") == 3 and b"\r" not in path.read_bytes()


@pytest.mark.parametrize("last_epoch, found", [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_later_rows_and_a_cut_line_are_dropped(tmp_path, capsys, last_epoch, found):
    path = tmp_path / "a_log.csv"
    run_files.start_log(path, COLUMNS, [row_of(1), row_of(2), row_of(3)])
    path.write_text(path.read_text()[:-2])
    assert [row["epoch"] for row in run_files.read_log(path, COLUMNS, last_epoch)] == [1, 2][:found]
    said = f"{path} has rows of 2 of the 3 epochs so far" in capsys.readouterr().out
    assert said == (last_epoch == 3)


@pytest.mark.parametrize("damage", [
    lambda text: text.replace("val_loss", "loss"), lambda text: text.replace("\n1,", "\none,"),
    lambda text: text.replace("\n1,", "\n1,1,"), lambda text: text.replace("\n1,10,", "\n1,,"),
    lambda text: text[text.index("\n") + 1:], lambda text: text.replace("\n1,10,", "\n1,10\n")])
def test_a_damaged_log_is_refused(tmp_path, damage):
    path = tmp_path / "a_log.csv"
    run_files.start_log(path, COLUMNS, [row_of(1), row_of(2)])
    path.write_text(damage(path.read_text()))
    with pytest.raises(cli.UserError, match="mend or remove it"):
        run_files.read_log(path, COLUMNS, 2)


@pytest.fixture
def epoch_log(tmp_path):
    """`epoch_log(epochs, more flags)`: the EpochLog of a run that is about to start, on rank 0 or another."""

    def make(epochs, *flags, rank=0):
        args = training.parse_args(["--epochs", str(epochs), "--checkpoint", str(tmp_path / "a.pt"), *flags])
        state = SimpleNamespace(model=MODEL, epoch=0, step=0, origin={"record": {}})
        return run_files.EpochLog(args, run_files.files_of(args.checkpoint), state, SimpleNamespace(total_steps=10),
                                  ranks.Ranks(CPU, None, rank, rank + 1))

    return make


@pytest.mark.parametrize("every, printed", [(-1, [1, 2, 3, 4, 5]), (1e9, [1, 5])])
def test_lines_come_at_both_ends_and_now_and_then(epoch_log, capsys, monkeypatch, every, printed):
    monkeypatch.setattr(run_files, "PRINT_EVERY_SECONDS", every)
    with epoch_log(5) as log:
        for epoch in range(1, 6):
            log.add(row_of(epoch))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines == [run_files.progress_line(row_of(epoch), 5, [1, 2]) for epoch in printed]


def test_seconds_go_on_from_those_of_the_log(epoch_log, tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(run_files, "time", SimpleNamespace(perf_counter=lambda: clock[0], strftime=lambda form: "now"))
    log = epoch_log(5)
    clock[0] = 107.5
    log.add(row_of(1))
    assert log.rows[-1]["seconds"] == 7.5
    log = epoch_log(5, "--resume")
    assert log.rows == []  # the state is that of epoch 0
    run_files.start_log(tmp_path / "a_log.csv", COLUMNS, [{**row_of(1), "seconds": 7.5}])
    monkeypatch.setattr(run_files, "read_log", lambda *_: [{**row_of(1), "seconds": 7.5}])
    log = epoch_log(5, "--resume")
    clock[0] = 109.0
    log.add(row_of(2))
    assert log.rows[-1]["seconds"] == 9.0
    with open(tmp_path / "a_log.csv", newline="") as file:
        assert [row["seconds"] for row in csv.DictReader(file)] == ["7.5", "9.0"]


def test_other_ranks_write_nothing(epoch_log, tmp_path, capsys):
    with epoch_log(5, rank=1) as log:
        log.add(row_of(1))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and log.rows[0]["epoch"] == 1


# ---- record


def test_a_record_of_any_content_is_no_reason_to_fail(tmp_path, capsys):
    path = tmp_path / "a_run.json"
    for content in ("", "[1]", "3", '{"resumed": 3}', '{"resumed": [3]}', "[" * 10**5):
        path.write_text(content)
        assert run_files.read_record(path) is None
        run_files.print_record(path, None)
        assert "no readable record" in capsys.readouterr().out
    assert run_files.whole_record({"resumed": 3}) is run_files.whole_record(None) is None


# ---- flags of a run that goes on


MANY = ["--seq-len", "70", "--stride", "7", "--val-fraction", "0.3", "--test-steps", "3000", "--normalise",
        "--num-workers", "2", "--d-model", "8", "--n-layers", "3", "--d-state", "5", "--d-conv", "2", "--expand", "3",
        "--d-ff", "9", "--relative",
        "--dropout", "0.25", "--max-horizon", "6", "--mixture", "2", "--gate-lr-factor", "0.01",
        "--freeze-A", "--constant", "B,z", "--muon", "--slowness-lambda", "0.1",
        "--contrastive-lambda", "1e-3", "--contrastive-temp", "0.3", "--contrastive-negatives", "5", "--aug-noise",
        "0.7", "--aug-rotate", "--aug-rotate-eps", "0.2", "--aug-scale", "0.15", "--batch-size", "6", "--lr", "3e-4",
        "--warmup-epochs", "2.5", "--epochs", "9", "--ema", "0.9", "--no-compile", "--no-amp", "--no-train-eval",
        "--seed", "8", "--fresh", "--scan", "reference", "--device", "cpu", "--data-dir", "a b", "--log-dir", "logs",
        "--format", "svg", "--style", "talk"]


@pytest.mark.parametrize("flags", [[], MANY])
def test_saved_flags_are_those_of_the_run(flags):
    args = training.parse_args(flags)
    again = run_files.saved_flags(saved(args), "a_last.pt", training.parse_args)
    ignored = {*run_files.OF_THE_COMMAND, "flags_given"}
    assert {k: v for k, v in vars(again).items() if k not in ignored} == {
        k: v for k, v in vars(args).items() if k not in ignored}
    assert all(type(value) is type(getattr(args, name)) or value == getattr(args, name)
               for name, value in vars(again).items() if name not in ignored)


def test_a_flag_that_came_later_has_its_default():
    saved = {"lr": 0.5, "no_such_flag": 3, "scan": "triton"}  # the former name of a back end
    again = run_files.saved_flags(saved, "a_last.pt", training.parse_args)
    assert again.lr == 0.5 and again.seq_len == 1024 and not hasattr(again, "no_such_flag") and again.scan == "cuda"


@pytest.mark.parametrize("name, value", [("lr", math.nan), ("lr", True), ("seq_len", "x"), ("seq_len", 2.5),
                                         ("no_amp", 3), ("scan", "gpu"), ("batch_size", [1])])
def test_a_flag_of_the_wrong_kind_is_refused(name, value):
    with pytest.raises(cli.UserError, match=f"a_last.pt is damaged .*{name.replace('_', '-')}"):
        run_files.saved_flags({name: value}, "a_last.pt", training.parse_args)


FREE = ["--data-dir", "a b", "--num-workers", "2", "--no-compile", "--no-train-eval", "--scan", "reference", "--device",
        "cpu", "--epochs", "9", "--log-dir", "logs", "--format", "svg", "--style", "talk"]


def test_resume_takes_free_flags_from_the_command():
    command = training.parse_args(["--resume", *FREE])
    merged = run_files.flags_for_resume(command, training.parse_args(["--lr", "7"]))
    names = [word[2:].replace("-", "_") for word in FREE if word.startswith("--")]
    assert sorted(names) == sorted(run_files.FREE_ON_RESUME)
    assert all(getattr(merged, name) == getattr(command, name) for name in names) and merged.lr == 7


def test_resume_takes_the_other_flags_from_the_run():
    run = training.parse_args(MANY)
    merged = run_files.flags_for_resume(training.parse_args(["--resume", "--checkpoint", "b.pt"]), run)
    assert vars(merged) == {**vars(run), "resume": True, "checkpoint": Path("b.pt")}
    run_files.flags_for_resume(training.parse_args(["--resume", *MANY]), run)  # the same flags again: no contradiction
    plain = training.parse_args([])
    for name in vars(run).keys() - {*run_files.FREE_ON_RESUME, *run_files.OF_THE_COMMAND, "flags_given"}:
        flag = "--" + name.replace("_", "-")
        value = MANY[MANY.index(flag) + 1]
        words = [flag] if value.startswith("--") else [flag, value]
        with pytest.raises(cli.UserError, match=f"the run was started with {flag} "):
            run_files.flags_for_resume(training.parse_args(["--resume", *words]), plain)


# ---- ranks


@pytest.mark.parametrize("n, world", [(1, 1), (7, 2), (7, 3), (8, 3), (9, 3), (2, 2)])
def test_the_shares_of_the_ranks_make_up_the_batch(n, world):
    batch = torch.arange(n)
    shares = [batch[ranks.Ranks(CPU, None, rank, world).share(n)].tolist() for rank in range(world)]
    assert shares == [part.tolist() for part in batch.tensor_split(world)]


def test_one_process_agrees_with_itself():
    one, totals = ranks.Ranks(CPU), torch.tensor([3.0, 4.0, 5.0])
    one.sum_totals(totals)
    one.divide_totals(totals)
    one.broadcast(totals)
    one.leave()
    assert totals.tolist() == [3, 4, 5] and one.first and not one.should_stop()
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    one.sum_gradients([parameter])
    assert parameter.grad.tolist() == [3, 4]
    with pytest.raises(cli.UserError, match=r"^plain$"), one.together():
        raise cli.UserError("plain")
    stop = SimpleNamespace(signal=None)
    asked = ranks.Ranks(CPU, stop)
    assert asked.agree(True, 3) == (False, True)
    stop.signal = 2
    assert asked.agree(False, 3) == (True, False) and asked.should_stop()


def test_only_rank_0_keeps_totals_that_were_summed_already():
    totals = [torch.tensor([3.0, 4.0, 5.0]) for _ in range(2)]
    for rank in range(2):
        ranks.Ranks(CPU, None, rank, 2).divide_totals(totals[rank])
    assert totals[0].tolist() == [3, 4, 5] and totals[1].tolist() == [0, 0, 5]


@pytest.fixture
def other_rank(monkeypatch):
    """`other_rank(tensor, …)`: what a second rank brings along to the exchanges that follow, one after the other."""
    import torch.distributed

    brought = []

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        combine = {torch.distributed.ReduceOp.SUM: torch.add, torch.distributed.ReduceOp.MIN: torch.minimum,
                   torch.distributed.ReduceOp.MAX: torch.maximum}[op]
        tensor.copy_(combine(tensor, brought.pop(0)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return lambda *tensors: brought.extend(tensors)


@pytest.mark.parametrize("here, there", [(5.0, 3.0), (3.0, 5.0)])
def test_totals_are_summed_and_a_step_is_finite_only_if_it_was_on_all_ranks(other_rank, here, there):
    totals = torch.tensor([1.0, 2.0, here])
    other_rank(torch.tensor([10.0, 20.0, there]), torch.tensor([there]))
    ranks.Ranks(CPU, None, 0, 2).sum_totals(totals)
    assert totals.tolist() == [11, 22, 3]


@pytest.mark.parametrize("rank, left", [(0, [11, 22, 4]), (1, [0, 0, 4])])
def test_totals_that_are_saved_within_an_epoch_are_those_of_all_ranks_and_count_once_afterwards(other_rank, rank, left):
    other_rank(torch.tensor([10.0, 20.0, 4.0]), torch.tensor([4.0]))
    state = SimpleNamespace(totals=torch.tensor([1.0, 2.0, 4.0]), model=torch.nn.Linear(1, 1), step=14)
    saver, saved = run_files.Saver(state, SimpleNamespace(steps_per_epoch=10), {}, ranks.Ranks(CPU, None, rank, 2)), []
    saver.save = lambda: saved.append(state.totals.tolist())
    saver.save_in_epoch()
    assert saved == [[11, 22, 4]] and state.totals.tolist() == left


@pytest.mark.parametrize("here, there", [(False, False), (True, False), (False, True), (True, True)])
def test_all_ranks_stop_or_save_when_one_wants_to(other_rank, here, there):
    other_rank(torch.tensor([float(there), 0.0]), torch.tensor([0.0, float(there)]))
    two = ranks.Ranks(CPU, SimpleNamespace(signal=2 if here else None), 0, 2)
    assert two.agree(False, 1) == (here or there, False)
    two.stop.signal = None
    assert two.agree(here, 1) == (False, here or there)


def test_gpus_ask_each_other_only_now_and_then():
    """Between those steps not even a question is sent: this process has no group that could answer."""
    two = ranks.Ranks(torch.device("cuda"), SimpleNamespace(signal=2), 0, 2)
    assert not any(any(two.agree(True, step)) for step in range(1, ranks.STOP_CHECK_STEPS))


def test_a_second_ctrl_c_does_not_wait_but_a_forwarded_signal_does(monkeypatch):
    """Torchrun sends on what its whole group has got already, and a scheduler sends one signal after the other."""
    handled, clock = {}, [50.0]
    monkeypatch.setattr(ranks.signal, "signal", handled.__setitem__)
    monkeypatch.setattr(ranks.signal, "getsignal", lambda n: signal.SIG_IGN if n == signal.SIGHUP else signal.SIG_DFL)
    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stop = ranks.Stop()
    assert set(handled) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # nohup has the last say on SIGHUP
    handled[signal.SIGUSR1](signal.SIGUSR1, None)
    assert stop.signal == signal.SIGUSR1
    stop.remember(signal.SIGINT, None)
    clock[0] += 60
    stop.remember(signal.SIGTERM, None)
    assert stop.signal == signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):
        stop.remember(signal.SIGINT, None)


# ---- the plan of a run


def test_seeds_are_those_of_earlier_versions_and_differ():
    """A run that an earlier version began goes on bit-identically only with the same seeds."""
    args = training.parse_args(["--seq-len", "10", "--stride", "10", "--batch-size", "4", "--seed", "5",
                                "--epochs", "6", "--warmup-epochs", "1.5"])
    plan = training.Plan(args, 200)
    assert plan.seed(7, 0) == 5_045_022_198 and plan.seed(7, 3) == 5_045_022_201
    assert len({plan.seed(step, rank) for step in range(50) for rank in range(8)}) == 400
    assert (plan.boundary, plan.steps_per_epoch, plan.batch_size, plan.total_steps, plan.warmup_steps) == (
        180, 5, 4, 30, 8)
    assert plan.lr(3) == training.lr_at(3, 1e-3, 8, 30) and plan.val_starts.tolist() == [180, 190]
    assert torch.equal(plan.batches(2), dataset.epoch_batches(plan.train_starts, 180, 10, 10, 4, 5, 2))
