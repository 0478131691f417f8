"""How every command of the toolkit ends: results with 0, failures with a message and never with 0."""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from vistoken.errors import UserError


def run_command(main: Callable[[], int | None], leave: Callable[[int], None] = sys.exit, resumes: bool = False) -> None:
    """Run `main` and `leave` with its exit code; a `UserError` prints its message and exits with 2.

    Anything else that escapes is a defect of ours and keeps its traceback. `resumes`: the same command goes on from
    where it was interrupted.
    """
    warnings.filterwarnings("ignore", module="PIL")  # remarks on single images; bad ones are accounted for
    try:
        code = main() or 0
        sys.stdout.flush()  # a pipe that nobody reads any more shows here at the latest
    except UserError as error:
        _tell(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        again = "; run the same command again to go on from here" if resumes else ""
        print(f"interrupted{again}", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        code = 128 + signal.SIGPIPE
    leave(code)


def leave_at_once(code: int) -> None:
    """End this process without tearing the interpreter down: for commands that used `torch.distributed`.

    DTensor keeps the process group alive, so gloo's threads outlive it. Such a thread may still have a tensor of the
    last collective to let go of; before Python 3.14 that aborts the process if the interpreter is being torn down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(message: str) -> None:
    """Print why this process ends. Of torchrun's processes on a machine only the first does.

    torchrun ends the others as soon as one has failed, perhaps before it could speak; so each leaves its message with
    torchrun, too, whose last lines on the screen then hold the first.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        Path(file).write_text(json.dumps(content))
    if not file or os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def note(message: str) -> None:
    """Tell the user something, once per crew: only the first rank speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
