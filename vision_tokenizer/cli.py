"""How every command of the toolkit ends: results with 0, failures with a message and never with 0."""

import os
import sys
import warnings
from collections.abc import Callable

from vision_tokenizer.errors import UserError


def run_command(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code; a `UserError` prints its message and exits with 2.

    Anything else that escapes is a defect of ours and keeps its traceback.
    """
    warnings.filterwarnings("ignore", module="PIL")  # remarks on single images; bad ones are accounted for
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def note(message: str) -> None:
    """Tell the user something, once per crew: only the first rank speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
