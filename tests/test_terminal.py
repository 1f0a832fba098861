"""What a terminal shows while something takes long, and that every slow part of every script shows it."""

import io
import sys
import time

import numba
import numpy as np
import pytest
from numba.core import event

import cli
import run_files
import terminal
import visualize_gates
from kernels import numba_cache


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def make_screen(monkeypatch):
    """A function that puts a terminal in place of stderr, on which progress shows after a hundredth of a second. (Not
    the fixture itself: pytest sets stderr anew between it and the test.)"""

    def make(renew_seconds=0.01):
        monkeypatch.setattr(terminal, "RENEW_SECONDS", renew_seconds)
        monkeypatch.setattr(sys, "stderr", Screen())
        return sys.stderr

    return make


def wait_for(screen, text):
    begin = time.monotonic()
    while text not in screen.getvalue():
        assert time.monotonic() - begin < 10, screen.getvalue()
        time.sleep(0.01)


def test_a_busy_line_is_renewed_says_what_compiles_and_is_gone_in_the_end(make_screen, monkeypatch):
    screen = make_screen()
    with terminal.busy("thinking"):
        wait_for(screen, "\rthinking: 00:00")
        monkeypatch.setattr(cli, "DOING", ["compiling kernels, once", "compiling kernels"])
        wait_for(screen, "\rthinking: 00:00, compiling kernels, once")
        wait_for(screen, "\rthinking: 00:01")
    last = screen.getvalue().split("\r")[-2:]
    assert last[0].strip() == last[1] == ""
    shown = screen.getvalue()
    time.sleep(0.05)
    assert screen.getvalue() == shown  # the thread has ended


def test_nothing_is_shown_of_what_is_quick_or_where_there_is_no_terminal(make_screen, monkeypatch):
    screen = make_screen(renew_seconds=60)
    with terminal.busy("thinking"), terminal.Bar(3) as bar:
        bar.update()
    assert screen.getvalue() == ""
    monkeypatch.setattr(terminal, "RENEW_SECONDS", 0.001)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with terminal.busy("thinking"), terminal.Bar(3) as bar:
        bar.update()
        time.sleep(0.02)
    assert sys.stderr.getvalue() == ""


def test_the_time_left_is_not_guessed_from_the_first_part(make_screen, monkeypatch):
    make_screen()
    clock = [100.0]
    with terminal.Bar(11, initial=1) as bar:
        monkeypatch.setattr(bar, "_time", lambda: clock[0])
        bar.start_t = 100.0

        def left():
            return bar.format_meter(**{**bar.format_dict, "ncols": 80}).partition("<")[2]

        assert left() == "?]"
        clock[0] += 50  # which compiled
        bar.update()
        assert left() == "?]"
        clock[0] += 3
        assert left() == "?]"
        bar.update()
        assert left() == "00:24]" and "[00:53<" in bar.format_meter(**bar.format_dict)


def test_numba_tells_what_it_compiles():
    said = []

    class Spy(event.Listener):
        def on_start(self, compiling):
            said.append(list(cli.DOING))

        def on_end(self, compiling):
            said.append(list(cli.DOING))

    with event.install_listener("numba:compile", Spy()):
        assert numba_cache.njit(lambda x: x + 1)(1) == 2
    assert said[0] == ["compiling kernels"] and cli.DOING == []
    cached = numba.njit(cache=True)(test_numba_tells_what_it_compiles)
    start = event.Event("numba:compile", event.EventStatus.START, {"dispatcher": cached})
    assert numba_cache._Tell().words(start) == "compiling kernels, once"


# ---- training


def test_the_bar_of_training_fits_80_columns_and_tells_validation_loss_and_excess(make_screen):
    make_screen()
    assert run_files.bar_text(None, 500) == "epoch 1/500"
    row = {"epoch": 499, "val_loss": 8.21, "excess_percent_1": 1.154}
    assert run_files.bar_text(row, 500) == "epoch 500/500: validation 8.2100, +1.15 %"
    assert run_files.bar_text({**row, "epoch": 500}, 500).startswith("epoch 500/500")
    assert run_files.bar_text({**row, "epoch": 1, "excess_percent_1": None}, 9) == "epoch 2/9: validation 8.2100"
    row |= {"val_loss": -47.123, "excess_nats_1": 0.0123}
    with terminal.Bar(33000, run_files.BAR_FORMAT, initial=12345) as bar:
        bar.set_postfix_str(run_files.bar_text(row, 500))
        shown = bar.format_meter(**{**bar.format_dict, "ncols": 80})
    assert len(shown) <= 80 and shown.endswith("epoch 500/500: validation -47.1230, +0.0123 nats, +1.15 %")


# ---- every slow part of every script


@pytest.mark.parametrize("name, flags, wanted", [
    ("estimate_dimension", "--points 300 --k 5", {"dimension": 5}),
    ("optimal_filter", "--horizons 1,2 --seq-len 64",
     {"filtering": 3000 + 4 * 64, "comparing the data with config.json": None, "entropy rate of the process": None}),
    ("generate", "--seed-len 20 --gen-len 30 --n-samples 2",
     {"generating": 30, "exact smoother": 2 * 2 * 50, "the songs in numbers": None}),
    ("visualize_gates", "--umap --umap-points 40", {"UMAPs": 10, "signals at 40 steps": None}),
    ("evaluate_representations", "--no-umap --no-lb --layers 1,output --lb-points 200",
     {"levels of tiny": 2, "exact filter": 3000, "validation errors": None}),
])
def test_every_slow_part_has_a_bar(script, shared_data, tiny_checkpoint, tmp_path, monkeypatch, name, flags, wanted):
    begun, updates = {}, {}

    class Recorded(terminal.Bar):
        def __init__(self, total=None, *args, desc=None, **settings):
            begun[desc], self.what = total and begun.get(desc, 0) + total, desc
            super().__init__(total, *args, desc=desc, **settings)

        def update(self, n=1):
            updates[self.what] = updates.get(self.what, 0) + n
            return super().update(n)

    monkeypatch.setattr(terminal, "Bar", Recorded)
    monkeypatch.setattr(visualize_gates, "umap_embedding", lambda points, graph, seed: np.zeros((len(points), 2)))
    stride = ["--stride", 70] if name == "optimal_filter" else []
    of_model = [] if name in ("estimate_dimension", "optimal_filter") else ["--checkpoint", tiny_checkpoint]
    assert script(name, *of_model, "--data-dir", shared_data, "--save-dir", tmp_path, *flags.split(), *stride).code == 0
    assert {what: begun.get(what, "missing") for what in wanted} == wanted
    for what, total in wanted.items():
        assert total is None or updates[what] == total  # every part counts
