"""What a command says last, alone and as one of torchrun's processes."""

import argparse
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vistoken.cli import EXIT_CODES, above_zero, at_least, command_parser, folder_name, run_command, share
from vistoken.errors import DataError, UserError
from vistoken.files import read_yaml

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


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["1", "01"])
def test_torchruns_last_lines_tell_it_whichever_process_failed(tmp_path, failing):
    done = launch(tmp_path, failing, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert done.returncode == 1
    assert "error: data.json, line 3: no such thing" in done.stderr.split("FAILED")[-1]
    assert done.stderr.split("Traceback")[0].count("error: data.json") <= 1


def test_a_process_with_a_defect_leaves_though_a_thread_of_it_waits_for_others(tmp_path):
    """As one of NCCL does for processes that wait for this one."""
    script = tmp_path / "command.py"
    script.write_text(
        "import threading\n"
        "from vistoken.cli import leave_at_once, run_command\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "run_command(lambda: [][0], leave_at_once)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stderr.endswith("IndexError: list index out of range\n")


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


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (UserError("meta.json: no data set in it"), 2, "error: meta.json: no data set in it"),
        (DataError("0.arrow: damaged"), 1, "error: 0.arrow: damaged"),
        (OSError(errno.ENOSPC, "No space left on device", "out.jsonl"), 2, "error: the disk is full: out.jsonl"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), 2, "error: out of memory. Make --batch_size"),
        (MemoryError(), 2, "error: out of memory"),
    ],
    ids=["call", "data", "full disk", "memory of the GPU", "memory"],
)
def test_one_rule_for_exit_codes(capsys, raised, code, said):
    def main():
        raise raised

    with pytest.raises(SystemExit, match=f"^{code}$"):
        run_command(main)
    assert capsys.readouterr().err.startswith(said)


def test_a_defect_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["written at the end", "written in between"])
@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")], ids=["> log", "> log 2>&1"])
def test_a_full_disk_behind_the_log_is_a_message(tmp_path, lines, streams):
    script = tmp_path / "command.py"
    script.write_text(
        f"from vistoken.cli import run_command\nrun_command(lambda: [print('line') for _ in range({lines})] and 0)"
    )
    with Path("/dev/full").open("wb") as full:
        pipes = {"stdout": full, "stderr": full if "stderr" in streams else subprocess.PIPE}
        done = subprocess.run([sys.executable, str(script)], **pipes, text=True, timeout=60)
    assert done.returncode == 2
    if done.stderr is not None:
        assert done.stderr.startswith("error: the disk is full") and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def type_error(kind, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    return str(caught.value)


def test_types_of_flags_say_what_they_take():
    assert (at_least(1)("7"), share("0"), share("1"), above_zero("0.5")) == (7, 0.0, 1.0, 0.5)
    assert type_error(at_least(1), "0") == "must be at least 1 and below 2^63, not 0"
    assert type_error(at_least(1), "1.5") == "must be a whole number, not '1.5'"
    for text in ("-0.1", "1.1", "nan"):
        assert type_error(share, text) == f"is a share from 0 to 1, not {text}"
    for text in ("0", "-1", "inf", "nan"):
        assert type_error(above_zero, text) == f"must be a number above 0, not {text}"


COMMANDS = [
    "pre_tokenize.concat_record",
    "pre_tokenize.extend_tokenizer",
    "pre_tokenize.pre_tokenize",
    "pre_tokenize.preview_tokens",
    "pre_tokenize.verify_tokens",
    "training.export_checkpoint",
    "training.toy_model",
    "training.train",
    "vision_tokenizer.fitting.export",
    "vision_tokenizer.fitting.size_list",
    "vision_tokenizer.fitting.teach_vit",
    "vision_tokenizer.models.chameleon.untrained",
    "vision_tokenizer.models.dualvitok.untrained",
    "vision_tokenizer.tokenizer.evaluate_tokenizer",
    "vision_tokenizer.tokenizer.import_annotations",
    "vision_tokenizer.tokenizer.plan_codebook_inference",
    "vision_tokenizer.tokenizer.preview_codes",
    "vision_tokenizer.tokenizer.tokenizer_codebook_inference",
    "vision_tokenizer.tokenizer.train_dualvitok",
    "vision_tokenizer.tokenizer.verify_codebook",
]


FLAG = re.compile(r"^  (--\w+).*?(?:  +|\n +)(.*)$", re.MULTILINE)  # in a help: the flag, what it says
NO_DEFAULT = ("--note", "--data_config")  # what they are for says that they may be left out


def parser_of(command: str, monkeypatch) -> argparse.ArgumentParser:
    class Caught(Exception):
        pass

    def catch(parser, *_):
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    with pytest.raises(Caught) as caught:
        importlib.import_module(command).main([])
    return caught.value.args[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_manual_and_shows_defaults_and_exit_codes(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # one line each
    shown = parser_of(command, monkeypatch).format_help()
    usage = shown.partition("\n")[0]
    assert importlib.import_module(command).__doc__.strip() in shown  # as it is laid out
    assert EXIT_CODES in shown
    for flag, text in FLAG.findall(shown):
        assert text, f"{flag} has no help"
        optional = f"[{flag} " in usage
        if optional and flag not in NO_DEFAULT and command != "training.train":
            assert "default: " in text, f"{flag}: {text}"


def test_help_and_mistakes_in_the_call_need_no_torch():
    """The whole list in one process: it takes seconds to import torch, and nobody waits that long for help."""
    code = (
        "import importlib, sys\n"
        f"for name in {COMMANDS}:\n"
        "    try:\n        importlib.import_module(name).main(['--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0, name\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)


@pytest.mark.parametrize("flag", ["--use-ema", "--use_ema"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if "codebook_inference" in name or "codes" in name])
def test_the_documented_spelling_and_ours(flag, command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    monkeypatch.undo()
    if "plan" not in command:
        usage = re.sub(r"\[.*?\]", "", parser.format_usage().partition(".py")[2])
        required = [word for name in re.findall(r"--\w+", usage) for word in (name, "x")]
        assert parser.parse_args([flag, *required]).use_ema


@pytest.mark.parametrize("name", ["pre_tokenize", "concat_record", "preview_tokens", "verify_tokens"])
def test_a_command_of_pre_tokenize_finds_its_package_though_a_file_beside_it_has_its_name(name):
    repo = Path(__file__).parents[1]
    command = [sys.executable, str(repo / "pre_tokenize" / f"{name}.py"), "--help"]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    source = (repo / "pre_tokenize" / f"{name}.py").read_text()
    assert "sys.path" not in source


@pytest.mark.parametrize("text", ["/abs", "..", ".", "", "a/b", "a/../../b", "a\0b", "a\nb", "\udce9"])
def test_a_flag_that_names_a_folder_takes_no_path(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a path"):
        folder_name(text)
    assert folder_name("DualViTok v1.0 \u4e2d") == "DualViTok v1.0 \u4e2d"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1, 2\nb: 3\n", r"c\.yaml, line 2, column 2: this config is not valid YAML: "),
        (b"a: 1\n\tb: 2\n", r"c\.yaml, line 2, column 1: this config is not valid YAML: .*\\t"),
        (b"a: \x00\n", r"c\.yaml: this config is not text \(special characters are not allowed, at position 3\)"),
        (b"a: caf\xe9\n", r"c\.yaml: this config is not text"),
        (b"a: 2024-99-99\n", r"c\.yaml: cannot read this config \(month must be in 1\.\.12"),
        (b"[" * 5000, r"c\.yaml: brackets of this config are nested too deeply"),
        (b"a: !!python/object:os.system x\n", r"c\.yaml, line 1, column 4: .*could not determine a constructor"),
    ],
)
def test_a_yaml_that_cannot_be_read_says_where_on_one_line(tmp_path, content, message):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        read_yaml(tmp_path / "c.yaml", "config")
    assert "\n" not in str(told.value) and not str(told.value).endswith("^)")


def test_a_name_that_is_not_utf8_is_refused_at_the_start(capsys):
    """Manifests and records name files, and JSON cannot spell these."""
    parser = command_parser("d")
    parser.add_argument("--out_dir")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--out_dir", os.fsdecode(b"caf\xe9")])
    assert ended.value.code == 2 and r"not UTF-8: 'caf\udce9'" in capsys.readouterr().err


def test_whatever_the_file_system_says_of_a_path_is_no_traceback(capsys):
    ended = []
    run_command(lambda: Path("x" * 300).exists(), ended.append)
    assert ended == [2] and capsys.readouterr().err == f"error: {'x' * 300}: File name too long\n"
