"""Inputs damaged at random, and what none of them may do to a command."""

import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vistoken.cli import run_command

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
WEIRD = [None, True, False, -1, 0, 1, 7, 1.5, -0.0, 1e308, 2**31, 2**63, 2**70, "", " ", "\0", "x", "a.png", "../a.png"]
WEIRD += ["/etc/hostname", "a" * 300, "b/" * 2500, "中\u202e😀é", "\x7f\n", "<image>", "<|image|>", "\ufeff", [], {}]
WEIRD += [[[]], {"a": 1}, [None], ["a.png"] * 20, {"from": "gpt", "value": 3}, float("inf"), [[1e999]]]


class Hang(BaseException):
    pass


class Watch:
    """What no input may do: start a process, or take longer than a minute."""

    def __init__(self) -> None:
        self.active, self.started = False, []
        sys.addaudithook(self._seen)  # hooks stay, so there is one for all tests

    def _seen(self, event: str, arguments: tuple) -> None:
        if self.active and event in STARTS:
            self.started.append((event, arguments))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        def hang(*_):
            raise Hang

        before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(60)
        self.active, self.started = True, []
        try:
            yield
        finally:
            self.active = False
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert not self.started


class Found:
    """What went wrong, by input; told at the end, so that one defect does not hide the others."""

    def __init__(self, watch: Watch):
        self._watch, self._wrong, self.inputs = watch, [], 0

    def run(self, what: Any, command: Callable[[], Any], *allowed: type[BaseException]) -> Any:
        """The result of `command`, or None where it raised what it may."""
        self.inputs += 1
        try:
            with self._watch():
                return command()
        except allowed:
            return None
        except (Exception, Hang) as error:  # noqa: BLE001 what it may be is the question
            where = error.__traceback__
            while where.tb_next:
                where = where.tb_next
            place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            self._wrong.append(f"{type(error).__name__} {str(error)[:120]!r} at {place} for {str(what)[:300]!r}")
            return None

    def end(self, what: Any, main: Callable, argv: list, codes: tuple[int, ...] = (0, 1, 2)) -> int | None:
        """The exit code of a command."""
        ended: list[int] = []

        def command() -> None:
            try:
                run_command(lambda: main([str(one) for one in argv]), ended.append)
            except SystemExit as error:  # argparse
                ended.append(error.code)
            assert ended and ended[0] in codes, f"exit code {ended}"

        self.run(what, command)
        return ended[0] if ended else None

    def check(self, at_least: int) -> None:
        assert not self._wrong, f"{len(self._wrong)} of {self.inputs}:\n" + "\n".join(self._wrong[:40])
        assert self.inputs >= at_least


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, lost, doubled or invented."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        length = min(int(rng.expovariate(1 / 20)) + 1, len(changed) - at)
        kind = rng.randrange(6)
        if kind < 2 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return bytes(changed)


def twisted(rng: random.Random, value: Any) -> Any:
    """A JSON value with one of its nodes replaced, dropped, doubled or wrapped."""
    if isinstance(value, dict) and value and rng.random() < 0.75:
        key, changed = rng.choice(list(value)), dict(value)
        kind = rng.randrange(8)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[f"{key}x"] = changed.pop(key)
        else:
            changed[key] = twisted(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.75:
        at, changed = rng.randrange(len(value)), list(value)
        if rng.random() < 0.2:
            changed.insert(at, changed[at])
        else:
            changed[at] = twisted(rng, value[at])
        return changed
    return [value] if rng.random() < 0.1 else rng.choice(WEIRD)
