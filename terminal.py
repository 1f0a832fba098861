"""What a terminal shows while something takes long: a bar, or, where nothing can be counted, a line with the time.

Both are renewed every second, also while a single part takes long, and say when Numba compiles meanwhile, which most
functions need only once per machine. Nothing is written where stderr is no terminal, nor in the first second.
"""

import contextlib
import threading

from tqdm import tqdm

import cli

RENEW_SECONDS = 1.0


class Bar(tqdm):
    """A tqdm bar of `total` parts that a thread renews. The time left is not guessed from the first part, which may
    have compiled. It may be updated from several threads; print beside it inside `with bar.external_write_mode():`.
    """

    def __init__(self, total=None, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                 disable=None, **settings):
        self.counted_from = None  # (how many parts were done, when) at the end of the first part
        self.ended = threading.Event()
        super().__init__(total=total, bar_format=bar_format, disable=disable, dynamic_ncols=True, leave=False,
                         delay=RENEW_SECONDS, mininterval=0.5, **settings)
        if not self.disable:
            threading.Thread(target=self.keep_renewing, daemon=True).start()

    def keep_renewing(self):
        while not self.ended.wait(RENEW_SECONDS):
            with self.get_lock():
                if not self.ended.is_set():
                    self.refresh()

    def refresh(self, *args, **kwargs):
        if not self.disable and self._time() - self.start_t >= RENEW_SECONDS:
            self.last_print_t = self._time()  # so tqdm knows that there is something to clear in the end
            super().refresh(*args, **kwargs)

    def update(self, n=1):
        with self.get_lock():
            shown = super().update(n)
            if self.counted_from is None and not self.disable:
                self.counted_from = self.n, self._time()
        return shown

    @property
    def format_dict(self):
        """What tqdm fills the format with."""
        values = super().format_dict
        if not self.disable:
            n, since = self.counted_from or (self.n, 0.0)
            values["rate"] = (self.n - n) / (self._time() - since) if self.n > n else 0.0  # 0: not known yet
            values["postfix"] = ", ".join(filter(None, [self.postfix, *cli.DOING[:1]]))
        return values

    def close(self):
        with self.get_lock():
            self.ended.set()
            super().close()


@contextlib.contextmanager
def busy(what):
    """While the block, or a function decorated with this, runs, a line says what is done and for how long already."""
    with Bar(desc=what, bar_format="{desc}: {elapsed}{postfix}"):
        yield
