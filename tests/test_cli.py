"""What a command says last, alone and as one of torchrun's processes."""

import os
import signal
import subprocess
import sys

import pytest

from vistoken.cli import run_command

COMMAND = """
import os, time
from vistoken.cli import run_command
from vistoken.errors import UserError

def main():
    if os.environ.get("LOCAL_RANK", "1") not in "{failing}":
        time.sleep(60)  # at work on something else
    raise UserError("data.json, line 3: no such thing")

run_command(main)
"""


def launch(tmp_path, failing: str, *launcher: str) -> subprocess.CompletedProcess:
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(failing=failing))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_mistake_is_told_without_traceback(tmp_path):
    done = launch(tmp_path, "1")
    assert (done.returncode, done.stderr) == (2, "error: data.json, line 3: no such thing\n")


@pytest.mark.parametrize("lines", [1, 100_000])  # buffered until the end, or more than a pipe holds
def test_a_reader_that_leaves_early_ends_it_quietly(tmp_path, lines):
    script = tmp_path / "command.py"
    script.write_text(
        "import sys; from vistoken.cli import run_command\n"
        f"run_command(lambda: sys.stdin.read() and None or [print('line') for _ in range({lines})] and 0)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert (process.wait(60), process.stderr.read()) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("resumes, said", [(True, "interrupted; run the same command again"), (False, "interrupted\n")])
def test_an_interrupted_command_says_whether_it_can_go_on(capsys, resumes, said):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_command(interrupted, resumes=resumes)
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("failing", ["1", "01"])
def test_torchruns_last_lines_tell_it_whichever_process_failed(tmp_path, failing):
    done = launch(tmp_path, failing, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert done.returncode == 1
    assert "error: data.json, line 3: no such thing" in done.stderr.split("FAILED")[-1]
    assert done.stderr.split("Traceback")[0].count("error: data.json") <= 1


def test_a_process_that_leaves_at_once_leaves_nothing_unsaid(tmp_path):
    """And no thread of C++ meets an interpreter that is being torn down, which would abort the process."""
    script = tmp_path / "command.py"
    script.write_text(
        "import atexit\n"
        "from vistoken.cli import leave_at_once, run_command\n"
        "atexit.register(print, 'torn down')\n"
        "run_command(lambda: print('done') or 3, leave_at_once)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "done\n", "")
