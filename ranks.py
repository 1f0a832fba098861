"""The processes of one training run under torchrun: they join, agree, stop together, and rank 0 alone speaks.

A run without torchrun has one process, and then every method of `Ranks` is trivial: a script that calls them needs no
second way for one process. torch is imported only where it is used: a script reads its command line before.
"""

import contextlib
import datetime
import os
import signal
import sys
import time

import cli

STOP_CHECK_STEPS = 10  # steps of several GPUs between two agreements: each waits for the device
# A Ctrl-C reaches a process under torchrun twice, from the terminal and from torchrun: that is no second one.
SECOND_CTRL_C_SECONDS = 1
PROCESS_TIMEOUT = datetime.timedelta(hours=2)  # the others wait while rank 0 computes the floor and evaluates


def is_first():
    """Whether this process is the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def n_processes():
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Stop:
    """Remembers a Ctrl-C, or a signal by which schedulers and closed terminals end a job, until the step in flight is
    done."""

    def __init__(self):
        self.signal, self.asked_at = None, 0.0
        for number in cli.STOP_SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.remember)

    def remember(self, number, frame):
        if self.signal is None:
            self.signal, self.asked_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.asked_at > SECOND_CTRL_C_SECONDS:
            raise KeyboardInterrupt  # this one doesn't wait for the step


class Ranks:
    """This process among the `world` processes of a run, with its `device`, and what they agree on.

    stop: a Stop, or None where nobody will ask this process to stop. `first` is True on rank 0 alone.
    """

    def __init__(self, device, stop=None, rank=0, world=1):
        self.device, self.stop, self.rank, self.world = device, stop, rank, world
        self.first = rank == 0

    @contextlib.contextmanager
    def together(self):
        """A UserError in this block, on whichever rank, ends all of them, and rank 0 says it.

        Every rank must enter this block. Inside it, do all exchanges between ranks before anything that can raise;
        otherwise one rank waits for one that has left.
        """
        error = None
        try:
            yield
        except cli.UserError as raised:
            error = raised
        if self.world > 1:
            from torch import distributed

            messages = [None] * self.world
            distributed.all_gather_object(messages, error and str(error))
            failed = [rank for rank, message in enumerate(messages) if message is not None]
            if failed and not self.first:
                sys.exit(cli.EXIT_BAD_INPUT)
            if failed and failed[0] > 0:
                error = cli.UserError(f"process {failed[0]} of 0…{self.world - 1}: {messages[failed[0]]}")
        if error is not None:
            raise error

    def should_stop(self):
        """Whether any rank was asked to stop."""
        return self.agree(False)[0]

    def agree(self, due, step=0):
        """(whether any rank was asked to stop, whether any rank says that a save is `due`), the same on all ranks:
        where some stopped or saved and others went on, each would wait for the other for ever.

        step: steps taken in this epoch. Several GPUs ask each other only at every STOP_CHECK_STEPS-th of them.
        """
        asked = self.stop is not None and self.stop.signal is not None
        if self.world == 1:
            return asked, due
        if self.device.type == "cuda" and step % STOP_CHECK_STEPS:
            return False, False
        import torch
        from torch import distributed

        flags = torch.tensor([float(asked), float(due)], device=self.device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        asked, due = flags.tolist()
        return asked > 0, due > 0

    def share(self, batch_size):
        """The slice of a batch that is this rank's; the ranks' slices differ by at most one window in length."""
        size, rest = divmod(batch_size, self.world)
        begin = self.rank * size + min(self.rank, rest)
        return slice(begin, begin + size + (self.rank < rest))

    def sum_gradients(self, parameters):
        """Sum the parameters' gradients over the ranks, in place: one exchange, which a CUDA graph can hold."""
        if self.world == 1:
            return
        import torch
        from torch import distributed

        gradients = [p.grad for p in parameters]
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(summed)
        pieces = summed.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])

    def sum_totals(self, totals):
        """Sum an epoch's totals over the ranks, in place. Their last number counts steps whose loss was finite: of
        these counts the smallest is what all ranks had."""
        if self.world == 1:
            return
        from torch import distributed

        finite_steps = totals[-1:].clone()
        distributed.all_reduce(totals)
        distributed.all_reduce(finite_steps, distributed.ReduceOp.MIN)
        totals[-1:] = finite_steps

    def divide_totals(self, totals):
        """The reverse of sum_totals, for totals that all ranks have read from a file: rank 0 keeps what was summed."""
        if not self.first:
            totals[:-1] = 0

    def broadcast(self, numbers):
        """Give all ranks the tensor that rank 0 has, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.broadcast(numbers, 0)

    def leave(self):
        if self.world > 1:
            from torch import distributed

            distributed.destroy_process_group()


def unwrapped(model):
    """The model itself, out of the wrapper that torch.compile puts around it."""
    return getattr(model, "_orig_mod", model)


def join(device_name, stop):
    """The Ranks of this process: under torchrun one of several, otherwise the only one, on the device of --device."""
    if n_processes() == 1:
        return Ranks(cli.pick_device(device_name), stop)
    import torch
    from torch import distributed

    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    try:
        if missing:
            raise cli.UserError(f"WORLD_SIZE is set but {', '.join(missing)} not; start several processes by torchrun")
        device = cli.pick_device(device_name)
        if device.type == "cuda":
            if local_world > torch.cuda.device_count():
                raise cli.UserError(
                    f"{local_world} processes on a machine with {cli.count(torch.cuda.device_count(), 'GPU')}; "
                    "start one per GPU: "
                    f"torchrun --nproc-per-node={torch.cuda.device_count()}")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
    except cli.UserError:
        if local_rank > 0:
            sys.exit(cli.EXIT_BAD_INPUT)  # the machine's first process says it
        raise
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PROCESS_TIMEOUT)
    return Ranks(device, stop, distributed.get_rank(), distributed.get_world_size())


@contextlib.contextmanager
def joined(device_name):
    """A block in which this process is one of the run's: gives its Ranks, and leaves the others at the block's end.

    Raises UserError where the block fails because another process has ended.
    """
    ranks = join(device_name, Stop())
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of this process: rank 0 alone speaks
    try:
        yield ranks
    except RuntimeError as error:
        from torch import distributed

        if ranks.world == 1 or not (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            raise
        raise cli.UserError(f"process {ranks.rank} of 0…{ranks.world - 1} lost the others: one of them has ended"
                            ) from None
    except (cli.UserError, SystemExit):  # raised on all ranks alike
        ranks.leave()
        raise
    ranks.leave()


def parse_command_line(parse_args):
    """`cli.start()` and `parse_args()`, where a bad flag, which torchrun has given to all processes, is answered by
    rank 0 alone."""
    cli.start()
    if is_first():
        return parse_args()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return parse_args()
    except SystemExit:
        time.sleep(5)  # torchrun ends all processes with the first that fails: that must be the one that says why
        raise


def run(main, args):
    """`cli.run(main, args)`, after which one of several processes ends at once.

    Threads that torch uses to talk to the other processes may still run, and the interpreter's tear-down would abort
    on them with messages of its own.
    """
    code = None
    try:
        cli.run(main, args)
    except SystemExit as end:
        code = end.code
    if n_processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
