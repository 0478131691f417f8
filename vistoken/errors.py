"""What can go wrong, in three kinds.

`UserError` ends a command with a message and no traceback. `Rejected` and `Failed` end one item: the
first because a rule of the format says no, the second because its input is bad or could not be read.
Both carry a short `reason` that accounting can count and a `detail` that a person can act on.
"""


class UserError(Exception):
    """A mistake the user can fix; the message names the file, the line or field, and what to do."""


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
