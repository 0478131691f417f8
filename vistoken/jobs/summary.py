"""What a run did, as a table to read and a file to keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from vistoken.jobs.counts import Account
from vistoken.jobs.files import write_bytes

SUMMARY = "run_summary.json"


def write_summary(path: Path, **content: Any) -> None:
    write_bytes(path, orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows (the first is the head) with aligned columns; numbers to the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    right = [all(isinstance(row[column], int | float) for row in rows[1:]) for column in range(len(cells[0]))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def accounts_table(accounts: Mapping[str, Account], what: str = "data set") -> str:
    """One row for each account and the reasons below it; done + rejected + failed = items is there to be seen."""
    rows: list[Sequence[object]] = [(what, "items", "done", "rejected", "failed")]
    for name, account in accounts.items():
        rows.append((name, account.items, account.done, account.rejected, account.failed))
    reasons = [
        f"  {name}: {kind}: {reason}: {count:,}"
        for name, account in accounts.items()
        for (kind, reason), count in sorted(account.reasons.items())
    ]
    return "\n".join([table(rows), *reasons])


def time_line(account: Account, stages: Sequence[str]) -> str:
    """Where the time of the processing threads went, e.g. `encode 91 %, wait for decode 6 %, write 3 %`."""
    spent = sum(account.seconds[stage] for stage in stages)
    return ", ".join(f"{stage} {account.seconds[stage] / spent:.0%}" for stage in stages) if spent else "nothing to do"
