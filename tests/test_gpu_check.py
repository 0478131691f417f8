"""The rehearsal of what a first hour on a GPU should settle, in part: all of it takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPS = Path(__file__).parents[1] / "exps"


@pytest.mark.slow
def test_parts_tell_their_figures_and_one_that_fails_takes_no_other_with_it(tmp_path):
    for file in EXPS.glob("*.py"):
        (tmp_path / file.name).write_text(
            file.read_text().replace("def syncs(check: Check)", "def syncs(check, absent)")
        )
    command = [sys.executable, str(tmp_path / "gpu_check.py"), "syncs,packed", "--small", "--device", "cpu"]
    done = subprocess.run(command, cwd=EXPS.parent, capture_output=True, text=True, timeout=300)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "failed: syncs"
    assert [line["largest_difference"] < 1e-5 for line in told if "largest_difference" in line] == [True, True]


def test_the_clock_starts_and_stops_when_the_gpu_is_done(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPS))
    import measure

    order = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(len(order) + (order.append("clock") or 0)))
    assert measure.timed(lambda: order.append("work")) > 0
    assert order == ["wait", "clock", "work", "wait", "clock"]
