"""How every command of the toolkit starts and ends: its parser, the flags that several commands share, its exit code.

Imports nothing heavy: `--help` of every command goes through here.
"""

import argparse
import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import signature
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO, TypeVar

from vistoken.errors import DataError, Preempted, UserError, is_out_of_memory
from vistoken.files import is_text

OK, BAD_DATA, BAD_CALL, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE
PREEMPTED = os.EX_TEMPFAIL  # 75: a batch system may start the same command again
EXIT_CODES = """exit codes:
  0    all right
  1    the data were not all right: items failed, or something is missing, damaged or does not agree
  2    the call, a config, or the place to write to is wrong
  75   stopped by SIGTERM or SIGUSR1 before the end: the same command, started again, goes on
  130  interrupted"""

DTYPES = ("fp32", "tf32", "bf16", "fp16")  # what they are to torch: see device.py
DEVICES = ("auto", "cpu", "cuda")
BATCH_ON_CPU, BATCH_ON_GPU = 1, 32  # one image fills a core, its activations stay near to it; a GPU wants many
MAX_WORKERS = 16
FULL = (errno.ENOSPC, errno.EDQUOT)


T = TypeVar("T")


class Outcome(NamedTuple):
    """What a worker of a job has to say at its end: of those that do one together, only the first says something."""

    report: str = ""
    warning: str = ""
    code: int = OK

    def tell(self) -> int:
        if self.report:
            print(self.report)
        if self.warning:
            print(self.warning, file=sys.stderr, flush=True)
        return self.code


stopping = threading.Event()  # after SIGUSR1: a worker takes no more chunks and finishes those it has


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The module's docstring stays as it is laid out, and every flag shows its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or action.required or action.default in (None, "", argparse.SUPPRESS)
        told = told or action.default is False  # a switch that is off until it is given
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default))})"
        return text if told else f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ever, but for paths that are not UTF-8: manifests and records name them, and JSON cannot spell them."""
        for text in sys.argv[1:] if args is None else args:
            if not is_text(text):
                self.error(f"not UTF-8: {text!r}. Rename the file or folder.")
        return super().parse_known_args(args, namespace)


def command_parser(description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of a command: its docstring is the manual, the rule of exit codes stands at the end."""
    return CommandParser(description=description, epilog=EXIT_CODES, formatter_class=HelpFormatter, **options)


def at_least(low: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `low` up to what a signed 64-bit integer holds."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {low} and below 2^63, not {value}")
        return value

    return whole_number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def share(text: str) -> float:
    """The type of a flag that takes a share."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is a share from 0 to 1, not {text}")
    return value


def above_zero(text: str) -> float:
    """The type of a flag that takes a speed, a length or the like."""
    value = _number(text)
    if not (value > 0 and isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def folder_name(text: str) -> str:
    """The type of a flag that names a folder inside another one: a name, not a path that could lead out of it."""
    if text in ("", ".", "..") or "/" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"is the name of a folder, not a path: {text!r}")
    return text


Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_device(flags: Flags) -> None:
    flags.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU if there is one")


def add_dtype(flags: Flags) -> None:
    flags.add_argument(
        "--torch_dtype", choices=DTYPES, default="fp32", help="fp32 is IEEE and exact; the others are faster"
    )


def add_speed(flags: Flags) -> None:
    flags.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    flags.add_argument(
        "--cuda_graphs", action="store_true", help="on a GPU: record a batch's kernels once, then launch them as one"
    )


def add_batches(flags: Flags) -> None:
    batches = f"images per batch (default: {BATCH_ON_CPU} on CPU, {BATCH_ON_GPU} on a GPU)"
    threads = f"decoding threads (default: this process's share of the cores, at most {MAX_WORKERS})"
    flags.add_argument("--batch_size", type=at_least(1), help=batches)
    flags.add_argument("--num_workers", type=at_least(1), help=threads)


def add_max_failed(flags: Flags, of: str = "items") -> None:
    flags.add_argument("--max_failed", type=share, default=0.01, help=f"exit with 1 if a larger share of {of} failed")


def add_other_devices(flags: Flags) -> None:
    flags.add_argument(
        "--allow_other_devices",
        action="store_true",
        help="go on, or mix processes, on another GPU model or version of CUDA or cuDNN, though last bits may differ",
    )


def add_workers(flags: Flags) -> None:
    """Who does the work, where it is not torchrun or srun that says so."""
    splits = "processes that share nothing but the output: a shell loop, a Slurm array, a Kubernetes indexed job"
    flags.add_argument("--splits", type=at_least(1), default=1, help=splits)
    number = "which of them this is, from 0 (default: what SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX say, else 0)"
    flags.add_argument("--rank", type=at_least(0), help=number)
    address = "run on Ray: on the cluster at ADDRESS or in RAY_ADDRESS, else one on this machine (default: without Ray)"
    flags.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=address)
    cpus = "CPUs of one Ray actor (default: a GPU's share of the cluster's, without GPUs 1)"
    flags.add_argument("--ray_cpus", type=at_least(1), help=cpus)


def check_workers(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.ray is None and args.ray_cpus is not None:
        parser.error("--ray_cpus is for --ray")
    if args.ray is not None and args.splits > 1:
        parser.error("--splits is for processes that share nothing; those of --ray share the work by themselves")
    if args.rank is None:
        args.rank = _array_rank(os.environ, parser) if args.splits > 1 else 0
    if args.rank >= args.splits:
        parser.error(f"--rank {args.rank} is outside of 0 to {args.splits - 1}, given --splits {args.splits}")
    if args.splits > 1 and args.overwrite:
        parser.error("--overwrite would delete what other ranks are writing: delete the output before they start")
    if args.splits > 1 and "RANK" in os.environ:
        parser.error(
            "--splits is for shell loops and arrays; under torchrun the processes share the work by themselves"
        )


def _array_rank(environment: Mapping[str, str], parser: argparse.ArgumentParser) -> int:
    """The number of this task of a Slurm array or of a Kubernetes indexed job; 0 outside of both."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return int(environment.get("JOB_COMPLETION_INDEX", "0"))
    number, low, high, count = (int(environment[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "MIN", "MAX", "COUNT"))
    if high - low + 1 != count:  # resubmitted in part, or with a step: their places are not to be known
        parser.error("the array is not a range of numbers in steps of 1: say which --rank this task is")
    return number - low


def add_sample(flags: Flags, what: str, default: int, low: int = 1) -> None:
    """How much of the data is looked at, and which."""
    flags.add_argument("--sample", type=at_least(low), default=default, help=what)
    flags.add_argument("--seed", type=at_least(0), default=0, help="another one draws others")


def settings_of(kind: type[T], args: argparse.Namespace) -> T:
    """A dataclass of the flags that have its fields' names; the other fields are as they are by default."""
    return kind(**{name: value for name, value in vars(args).items() if name in signature(kind).parameters})


def run_command(main: Callable[[], int | None], leave: Callable[[int], None] = sys.exit, resumes: bool = False) -> None:
    """Run `main` and `leave` with its exit code; what a user can mend ends in a message, see `EXIT_CODES`.

    Anything else that escapes is a defect of ours: it keeps its traceback, and the process then leaves in its own way,
    too, or it would wait for others that wait for it. `resumes`: the same command goes on from
    where it was interrupted.
    """
    warnings.filterwarnings("ignore", module="PIL")  # remarks on single images; bad ones are counted
    if leave is not sys.exit:

        def hook(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:  # torch.distributed hands over a stand-in for sys.stderr
            traceback.print_exception(kind, error, trace, file=sys.__stderr__)
            leave(BAD_DATA)

        sys.excepthook = hook
    if resumes:
        signal.signal(signal.SIGTERM, _drop_open_work)
        signal.signal(signal.SIGUSR1, lambda *_: stopping.set())
    try:
        code = main() or OK
        sys.stdout.flush()  # a pipe that nobody reads any more, or a full disk, shows here at the latest
    except DataError as error:
        _tell(f"error: {error}")
        code = BAD_DATA
    except UserError as error:
        _tell(f"error: {error}")
        code = BAD_CALL
    except Preempted as error:
        _tell(f"{error}; run the same command again to go on from here")
        code = PREEMPTED
    except KeyboardInterrupt:
        again = "; run the same command again to go on from here" if resumes else ""
        _tell(f"interrupted{again}")
        code = INTERRUPTED
    except BrokenPipeError:  # as of `| head`
        _discard(sys.stdout)
        code = BROKEN_PIPE
    except (OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            _discard(sys.stdout)  # perhaps it was this: `> log` on the full disk
            where = f": {error.filename}" if error.filename else ""
            _tell(f"error: the disk is full{where} ({error.strerror}). Make room, then run the same command again.")
        elif isinstance(error, OSError) and error.filename is not None:
            _tell(f"error: {error.filename!s:.300}: {error.strerror}")
        elif is_out_of_memory(error):
            _tell(f"error: out of memory. Make --batch_size smaller, or on a CPU --num_workers.\n{error}")
        else:
            raise
        code = BAD_CALL
    leave(code)


def _drop_open_work(*signal_and_frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Preempted("stopped by SIGTERM: what was under way is dropped, what was finished is kept")


def leave_at_once(code: int) -> None:
    """End this process without tearing the interpreter down: for commands that used `torch.distributed`.

    DTensor keeps the process group alive, so gloo's threads outlive it. Such a thread may still have a tensor of the
    last collective to let go of; before Python 3.14 that aborts the process if the interpreter is being torn down.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it, or its disk is full: `code` says so already
            stream.flush()
    os._exit(code)


def _discard(stream: TextIO) -> None:
    """Let go of what `stream` buffers and cannot write, or the interpreter fails on it once more when it ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell(message: str) -> None:
    """Print why this process ends. Of torchrun's processes on a machine only the first does.

    torchrun ends the others as soon as one has failed, perhaps before it could speak; so each leaves its message with
    torchrun, too, whose last lines on the screen then hold the first.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        with suppress(OSError):
            Path(file).write_text(json.dumps(content))
    if not file or os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:  # `2> log` on a full disk: the exit code has to say it
            _discard(sys.stderr)


def note(message: str) -> None:
    """Tell the user something once: of all processes of a job only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
