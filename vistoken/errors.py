"""What can go wrong, in three kinds.

`UserError` ends a command with a message and no traceback: exit code 2, or 1 where it is a `DataError`.
`Rejected` and `Failed` end one item: the first because a rule of the format says no, the second because its input is
bad or could not be read.
Both carry a short `reason` that accounting can count and a `detail` that a person can act on.
"""


class UserError(Exception):
    """A mistake the user can fix; the message names the file, the line or field, and what to do."""


class DataError(UserError):
    """Data that are missing, damaged or do not agree. The call, the configs and the place to write to are all right."""


class Preempted(Exception):
    """This process was asked to make room; what it has not finished is for the next run of the same command."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on the CPU (a plain RuntimeError) or on a GPU."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in message for words in ("out of memory", "can't allocate memory", "not enough memory"))
    )


class ItemError(Exception):
    """One item cannot be done. `kind` is the column it is counted in."""

    kind: str

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason  # a few fixed words, e.g. "image not found"
        self.detail = detail  # this item's particulars, e.g. the path


class Rejected(ItemError):
    kind = "rejected"


class Failed(ItemError):
    kind = "failed"
