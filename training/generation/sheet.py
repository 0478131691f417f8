"""The prompt sheet: what the model in training says to the same few prompts, each time that it is saved.

A sharded model answers only as a whole: every process makes the same calls, token by token, and each layer's weights
come together for each token as they do for a batch. So no process needs more memory than its keys and values, and a
token costs one gathering of the weights. Rank 0 decides each token, for processes may differ in their last bits; it
alone reads the prompts, decodes the pictures, on the CPU, and writes.

Nothing here draws from PyTorch's random state: training goes on as it would have without.
"""

import shutil
from codecs import BOM_UTF8
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import orjson
import torch
import torch.distributed as dist

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import as_it_is
from pre_tokenize.text import TextTokenizer
from training.assemble import Data, on_rank_0
from training.config import TrainConfig
from training.generation.answers import ANSWERS, Said, answer_line, picture_files, png, say
from training.generation.cache import CachedLM, CachedUniToken, LanguageModel
from training.generation.decode import PUBLISHED, Answer, Decoder, Settings
from training.generation.interpreter import (
    Interpreter,
    LMInterpreter,
    Question,
    UniTokenInterpreter,
    Wishes,
    prompts,
    room,
)
from training.generation.load import load_image_tokenizer, load_vqgan
from training.generation.report import write_report
from training.models.causal_lm import CausalLM
from training.models.folder import ModelFolder
from training.models.unitoken import UniToken
from training.models.units import LayeredModel
from training.parallel import ends_whole
from vision_tokenizer.images.chameleon import crop_sizes
from vistoken.errors import Failed, ItemError, UserError, is_out_of_memory
from vistoken.files import reading
from vistoken.jobs.chunks import Item

MOST = 64  # prompts: all are answered as one batch
TEXT_TOKENS = 256  # of an answer in text


def sheet_folder(output_dir: str, step: int) -> Path:
    """Where the answers of a step are, once they are all there."""
    return Path(output_dir) / "samples" / f"step_{step:08d}"


class Sheet:
    def __init__(self, questions: Sequence[Question], interpreter: Interpreter, settings: Settings, *, compiled: bool):
        self.questions, self._interpreter, self._settings = questions, interpreter, settings
        self._compiled = compiled  # the layers, for batches: an answer has another length at every step

    def memory(self, layers: int, width: int, number_bytes: int) -> int:
        """Bytes of keys and values, of `width` numbers each in a layer, when all answers are as long as they can be."""
        rules, wishes = self._interpreter.rules, self._interpreter.wishes
        given = [len(one.ids) + sum(len(image.layout) + 1 for image in one.tower) for one in self.questions]
        answers = [room(question, rules, wishes) for question in self.questions]
        longest = max(map(sum, zip(given, answers, strict=True)))
        rows = len(self.questions) * (1 if self._settings.guidance == 1 else 2)
        return 2 * layers * width * number_bytes * rows * longest

    def answer(self, model: LayeredModel, output_dir: str, step: int) -> list[tuple[str, Said]]:
        """Every process calls this; rank 0 writes `samples/step_*/` and gets the prompts' names and answers, the others
        nothing.

        Raises `UserError` where the device has no room, or rank 0's disk.
        """
        try:
            answers = self._answers(model)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"--prompt_sheet: too little memory for its {len(self.questions)} answers beside the training, at step "
                f"{step}. Ask for fewer or smaller ones, or leave it out: the same command goes on from the newest "
                "checkpoint."
            ) from error
        if dist.get_rank() > 0:
            return []
        said = [say(answer, self._interpreter) for answer in answers]
        self._write(sheet_folder(output_dir, step), answers, said)
        names = [
            str(question.item.index if question.item.id is None else question.item.id) for question in self.questions
        ]
        return list(zip(names, said, strict=True))

    @torch.no_grad()
    def _answers(self, model: LayeredModel) -> list[Answer]:
        rules, wishes = self._interpreter.rules, self._interpreter.wishes
        as_written = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        with ends_whole(model), as_written:
            asked: LanguageModel
            if isinstance(model, CausalLM):
                asked = CachedLM(model.lm)
            else:
                assert isinstance(model, UniToken)
                asked = CachedUniToken(model)

            def rank_0s(tokens: list[int]) -> list[int]:
                agreed = torch.tensor(tokens, device=asked.device)
                dist.broadcast(agreed, 0)
                return agreed.tolist()

            batch = [prompts(question, asked, rules, wishes, samples=1)[0] for question in self.questions]
            answers = Decoder(asked, rules, self._settings, agree=rank_0s).answer(batch)
        model.train()
        return answers

    def _write(self, folder: Path, answers: Sequence[Answer], said: Sequence[Said]) -> None:
        """Whole or not at all, in the form of generate.py's output."""
        settings = {"seed": self._interpreter.wishes.seed, **asdict(self._settings)}
        temporary = folder.with_suffix(".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "images").mkdir(parents=True)
            lines = []
            for question, answer, one in zip(self.questions, answers, said, strict=True):
                lines.append(answer_line(question, 0, answer, one, settings))
                for name, picture in zip(picture_files(question.item.index, 0, one), one.pictures, strict=True):
                    (temporary / name).write_bytes(png(picture))
            (temporary / ANSWERS).write_bytes(b"".join(lines))
            manifest = {"model": {"path": f"{folder.parents[1]}, {folder.name}"}, "settings": settings}
            write_report(temporary, temporary / ANSWERS, manifest)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(
                f"{folder}: cannot write the answers ({error.strerror or error}). Make room, then run the same command "
                "again."
            ) from error


def open_sheet(config: TrainConfig, folder: ModelFolder, data: Data) -> Sheet | None:
    """Read and check the sheet, if there is one: on rank 0, whose `UserError` is raised everywhere."""
    if not config.prompt_sheet:
        return None
    lm, path = config.variant == "lm", Path(config.prompt_sheet)
    drawing = PUBLISHED[lm] | ({} if config.condition_dropout else {"guidance": 1.0})  # else nothing to compare with
    wishes = Wishes(max_new_tokens=TEXT_TOKENS, max_seq_len=config.max_seq_len, seed=config.seed)
    text, vocab_size, image_dir = TextTokenizer(folder.tokenizer), folder.llm.vocab_size, path.absolute().parent
    interpreter: UniTokenInterpreter | LMInterpreter
    if lm:
        interpreter = LMInterpreter(DualViTokFormat(text), vocab_size, None, wishes, as_it_is, image_dir)
    else:
        made = (data.dataset.sources[0].manifest() or {}).get("settings", {})  # input images are cropped as there
        crops = crop_sizes(made.get("target_size", 512), made.get("crop", "square"))
        format, reader = ChameleonFormat(text, image_dir=image_dir), data.dataset.rules.continuous
        interpreter = UniTokenInterpreter(format, vocab_size, None, reader, crops, wishes, as_it_is)

    def read() -> list[Question]:
        cpu = torch.device("cpu")  # the device is the training's
        if isinstance(interpreter, UniTokenInterpreter):
            interpreter.image_tokenizer = load_vqgan(config.tokenizer_dir, interpreter.format, cpu)
        elif config.model_config:
            given = Path(config.model_config), config.tokenizer_checkpoint
            interpreter.image_tokenizer = load_image_tokenizer(*given, interpreter.format, cpu)
        return read_sheet(path, interpreter)

    return Sheet(on_rank_0(read), interpreter, Settings.of(lm=lm, **drawing), compiled=config.compile)


def read_sheet(path: Path, interpreter: Interpreter) -> list[Question]:
    """Raises `UserError` that names the line of a prompt that cannot be answered."""
    with reading(f"--prompt_sheet {path}"):
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = Item.of(len(questions), f"line {number}", line, orjson.loads(line))
            question = interpreter.question(item)
            room(question, interpreter.rules, interpreter.wishes)
            if question.task == "image" and interpreter.image_tokenizer is None:
                raise Failed("no image tokenizer", "a picture needs --model_config and --tokenizer_checkpoint")
        except (orjson.JSONDecodeError, ItemError) as error:
            raise UserError(f"--prompt_sheet {path}, line {number}: {error}") from error
        questions.append(question)
    if not 0 < len(questions) <= MOST:
        raise UserError(f"--prompt_sheet {path}: expected 1 to {MOST} prompts, one JSON object a line")
    return questions
