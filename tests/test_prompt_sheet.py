"""Prompts that are answered at every checkpoint: the same in any number of processes, and training does not notice."""

import errno
import json
from codecs import BOM_UTF8

import pytest
import torch
from lm_small import extended_tokenizer, made_line, write_lines
from lm_small import write_model as write_lm
from PIL import Image
from train_small import flags, golden_samples, train, train_processes, write_data_config, write_model, write_record
from unitoken_small import IMAGES

from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.text import TextTokenizer
from training import generate
from training.generation.decode import Decoder
from vistoken.errors import UserError
from vistoken.jobs.chunks import Item

SHORT = {"epochs": 2, "save_iteration_interval": 1, "dropout": 0.1, "max_seq_len": 100}


def chat(human, gpt, **more):
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], **more}


PICTURE = chat("Generate an image of a red barn.", "<|image|>", image=["not_read.png"], size=[64, 96], id="barn")
QUESTION = chat("<|image|> What is this?", "", image=[str(IMAGES / "sq_gray.png")])


@pytest.fixture(scope="module")
def unitoken(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "unitoken")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    manifest = {"settings": {"target_size": 64, "crop": "square"}}
    record = write_record(folder / "tokens", golden_samples(), manifest=manifest)
    return write_data_config(folder / "data.yaml", record)


@pytest.fixture
def sheet(tmp_path, chameleon_folder):
    path = write_lines(tmp_path / "sheet.jsonl", [PICTURE, QUESTION])
    path.write_bytes(BOM_UTF8 + path.read_bytes())  # as editors on Windows write it
    return {
        "prompt_sheet": path,
        "tokenizer_dir": chameleon_folder,
    }


def said(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def ask(run, prompts, *more):
    """What the finished model says, by the command."""
    out = run.with_name("asked")
    flags = ["--model", run, "--prompts", prompts, "--out", out, "--precision", "fp32", "--guidance", 1, *more]
    assert generate.main([str(flag) for flag in [*flags, "--max_new_tokens", 256]]) == 0
    return said(out)


@pytest.mark.slow
def test_training_does_not_notice_its_sheet_and_the_last_answers_are_the_models(
    tmp_path, unitoken, images, chameleon_folder, sheet
):
    without = train(unitoken, images, tmp_path / "without", **SHORT)
    assert train(unitoken, images, tmp_path / "out", **SHORT, **sheet) == without
    first, last = (tmp_path / "out" / "samples" / f"step_{step:08d}" for step in (1, 2))
    barn, question = said(last)
    assert barn["id"] == "barn" and Image.open(last / barn["files"][0]).size == (96, 64)
    assert barn["tokens"] != said(first)[0]["tokens"]
    assert question["files"] == [] and question["tokens"] and "red barn" in (html := (last / "report.html").read_text())
    assert "not found" not in html and "text temperature 1.0, top k 5" in html and "{" not in html.split("</style>")[1]
    [board] = (tmp_path / "out" / "tensorboard").iterdir()
    assert b"samples/barn" in board.read_bytes()

    asked = ask(tmp_path / "out", sheet["prompt_sheet"], "--tokenizer_dir", chameleon_folder, "--target_size", 64)
    assert [line["tokens"] for line in asked] == [line["tokens"] for line in said(last)]


@pytest.mark.slow
def test_two_processes_answer_as_one(tmp_path, unitoken, images, sheet):
    """Whichever holds an image; the second one has no decoder and decides nothing."""
    settings = {**SHORT, **sheet, "dropout": 0, "epochs": 1, "condition_dropout": 0.5, "variant": "anyres"}
    train(unitoken, images, tmp_path / "one", **settings)
    process = train_processes(
        2, flags(unitoken, images, tmp_path / "two", **settings, global_batch_size=4, batch_size=1)
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "2 prompts are answered at every checkpoint" in output
    one, two = (said(tmp_path / name / "samples" / "step_00000001") for name in ("one", "two"))
    assert one == two and one[0]["settings"]["guidance"] == 3


@pytest.mark.slow
def test_what_has_no_room_keeps_the_checkpoint(tmp_path, unitoken, images, sheet, monkeypatch):
    """On the device, then on the disk; the same command then goes on."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "answer", no_memory)
        with pytest.raises(
            UserError, match=r"--prompt_sheet: too little memory for its 2 answers .* at step 1\. Ask for fewer"
        ):
            train(unitoken, images, out, **SHORT, **sheet)
    with monkeypatch.context() as patched:
        patched.setattr("training.generation.sheet.write_report", full)
        with pytest.raises(UserError, match=r"cannot write the answers \(No space left on device\)"):
            train(unitoken, images, out, **SHORT | {"epochs": 3}, **sheet)
    assert [line["step"] for line in train(unitoken, images, out, **SHORT | {"epochs": 3}, **sheet)] == [1, 2, 3]
    answered = sorted(path.name for path in (out / "samples").iterdir())
    assert answered == ["step_00000001", "step_00000002", "step_00000003"]  # the first late, by the resumed run


@pytest.mark.slow
def test_a_language_model_answers_its_sheet(tmp_path, dualvitok_config, dualvitok_checkpoint):
    tokenizer = extended_tokenizer(tmp_path)
    format = DualViTokFormat(TextTokenizer(tokenizer))
    lines = [made_line(f"Draw {text}, {{resolution_tag}}\n", "<image>", anchors=[(64, 64)]) for text in ("a", "b")]
    samples = [
        format.sample(draft, {}) for draft in format.drafts([Item(n, "", b"", line) for n, line in enumerate(lines)])
    ]
    data = write_data_config(tmp_path / "data.yaml", write_record(tmp_path / "tokens", samples))
    bare = chat("Draw a barn, {resolution_tag}\n", "<image>", size=[64, 64])
    bare["conversations"].pop()
    sheet = {"prompt_sheet": write_lines(tmp_path / "sheet.jsonl", [bare, chat("Hello", "")])}
    settings = {**SHORT, "variant": "lm", "tokenizer_from": tokenizer, "batch_size": 2, "unmask_image_logits": False}
    settings |= {"dropout": 0, "epochs": 1}
    model = write_lm(tmp_path / "lm")
    with pytest.raises(UserError, match=r"sheet.jsonl, line 1: no image tokenizer: .*--model_config"):
        train(model, data, tmp_path / "refused", **settings, **sheet)
    sheet |= {"model_config": dualvitok_config, "tokenizer_checkpoint": dualvitok_checkpoint}
    without = train(model, data, tmp_path / "without", **settings)
    assert train(model, data, tmp_path / "one", **settings, **sheet) == without
    arguments = flags(model, data, tmp_path / "two", **settings | sheet | {"batch_size": 1}, global_batch_size=2)
    process = train_processes(2, arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    one, two = (said(tmp_path / name / "samples" / "step_00000001") for name in ("one", "two"))
    assert one == two and one[0]["matched_ratios"] == [[64, 64]] and one[1]["tokens"]
    assert Image.open(tmp_path / "two" / "samples" / "step_00000001" / one[0]["files"][0]).size == (64, 64)
    decoder = ("--model_config", dualvitok_config, "--tokenizer_checkpoint", dualvitok_checkpoint)
    asked = ask(tmp_path / "one", sheet["prompt_sheet"], *decoder)
    assert [line["tokens"] for line in asked] == [line["tokens"] for line in one]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"conversations": 3}', "line 2: no conversation: .*`conversations`"),
        ("{", "line 2: .*"),
        (json.dumps(PICTURE | {"size": [64, 70]}), r"line 2: bad `size`: \[64, 70\]: .*multiples of 32"),
        (json.dumps(PICTURE | {"size": "64"}), "line 2: bad `size`: expected .height, width."),
        (json.dumps(QUESTION | {"image": ["absent.png"]}), "line 2: .*absent.png"),
        (json.dumps(QUESTION | {"image": []}), "line 2: image count"),
        (json.dumps(PICTURE | {"size": [512, 512]}), "line 2: longer than the model knows: .* trained on 100"),
    ],
)
def test_a_sheet_that_cannot_be_answered_is_refused_before_training(tmp_path, unitoken, images, sheet, line, told):
    with sheet["prompt_sheet"].open("w") as file:
        file.write(json.dumps(PICTURE) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"--prompt_sheet .*sheet.jsonl, {told}"):
        train(unitoken, images, tmp_path / "out", **SHORT, **sheet)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_sheet_needs_its_flags(tmp_path, unitoken, images, sheet):
    with pytest.raises(UserError, match="--prompt_sheet needs --tokenizer_dir"):
        train(unitoken, images, tmp_path, prompt_sheet=sheet["prompt_sheet"])
    with pytest.raises(UserError, match=r"--prompt_sheet .*absent.jsonl: cannot read it"):
        train(unitoken, images, tmp_path, **sheet | {"prompt_sheet": tmp_path / "absent.jsonl"})
    sheet["prompt_sheet"].write_text("\n")
    with pytest.raises(UserError, match="expected 1 to 64 prompts"):
        train(unitoken, images, tmp_path, **sheet)
