"""Generation as a job: prompts by chunks, answers as results, every prompt accounted for.

{out}/answers.jsonl            a line an answer
{out}/images/                  its pictures, {item}-{sample}-{number}.png
{out}/answers.rejected.jsonl   prompts without an answer, and why
{out}/report.html              the first answers, to look at
{out}/manifest.json, run_summary.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from training.generation.answers import ANSWERS, answer_line, picture_files, png, say
from training.generation.cache import LanguageModel
from training.generation.decode import Decoder, Prompt, Settings
from training.generation.interpreter import Interpreter, Question, prompts
from training.generation.report import write_report
from vistoken.errors import ItemError, UserError, is_out_of_memory
from vistoken.jobs.chunks import chunk_table
from vistoken.jobs.counts import SUMMARY, Counts, counts_table
from vistoken.jobs.files import write_json
from vistoken.jobs.progress import Progress, Stopwatch
from vistoken.jobs.results import Results
from vistoken.jobs.run import WORK, JoinedSource, OpenChunk, Output, Task, todo
from vistoken.jobs.workers import Workers
from vistoken.store import Location


class AnswerOutput(Output):
    folder: Path
    sources: Sequence[JoinedSource]

    def __init__(self, folder: Path, manifest: Mapping[str, Any], prompts: Path, chunk_items: int):
        table = chunk_table(prompts, chunk_items, folder / WORK / "chunks.json")
        source = JoinedSource(table, Results(folder / WORK / "results"), folder / ANSWERS)
        super().__init__(folder, {**manifest, "prompts": table.sha256}, [source])
        self.source = source

    def made(self) -> list[Location]:
        names = (ANSWERS, self.source.rejected.name, "report.html", SUMMARY)
        written = (path for name in names if (path := self.folder / name).exists())
        return [*written, *self.folder.glob("images/*.png")]

    def finish(self) -> Counts:
        counts = self.source.finish().counts
        write_json(self.folder / SUMMARY, {"answers": counts.as_dict()})
        write_report(self.folder, self.folder / ANSWERS, self.manifest)
        return counts


def run_generation(
    output: AnswerOutput,
    interpreter: Interpreter,
    model: LanguageModel,
    settings: Settings,
    samples: int,
    batch_size: int,
    workers: Workers,
    *,
    overwrite: bool = False,
) -> Counts | None:
    """Answer all prompts that this worker gets. Returns the run's counts on the first worker, None on the others."""
    with (
        output.begin(workers, "any" if overwrite else None),
        Progress(workers, output.source.table.items, "answering", rates=("tokens",)) as progress,
    ):
        decoder = Decoder(
            model,
            interpreter.rules,
            settings,
            interpreter.close_image,
            on_tokens=lambda count: progress.count(tokens=count),
        )
        for task in todo([output.source], workers, progress):
            chunk = AnswerChunk(task, output.folder, interpreter, settings)
            chunk.ask(model, samples)
            for start in range(0, len(chunk.asked), batch_size):
                chunk.answer(chunk.asked[start : start + batch_size], decoder)
            chunk.write(progress)
        progress.wait_for_all()
        return output.finish() if workers.rank == 0 else None


class AnswerChunk(OpenChunk):
    """A chunk of prompts on its way to answers."""

    def __init__(self, task: Task, folder: Path, interpreter: Interpreter, settings: Settings):
        super().__init__(task)
        self._folder, self._interpreter, self._watch = folder, interpreter, Stopwatch()
        self._settings = {"seed": interpreter.wishes.seed, **asdict(settings)}
        self._files: dict[Location, bytes] = {}
        self._failed: set[int] = set()
        self._lines: dict[int, list[bytes]] = {}
        self.asked: list[tuple[Question, int, Prompt]] = []  # with the number of the sample
        kept = set(self.done_before())
        for line in self._path.read_bytes().splitlines(keepends=True) if kept else ():
            if (item := orjson.loads(line)["item"]) in kept:
                self._lines.setdefault(item, []).append(line)

    @property
    def _path(self) -> Location:
        return self.source.results.path(self.chunk.index, ".jsonl")

    def ask(self, model: LanguageModel, samples: int) -> None:
        for item in self.todo():
            try:
                with self._watch("prompts"):
                    question = self._interpreter.question(item)
                    asked = prompts(question, model, self._interpreter.rules, self._interpreter.wishes, samples)
            except ItemError as error:
                self.fail(item, error)
                continue
            self.asked += [(question, sample, prompt) for sample, prompt in enumerate(asked)]

    def answer(self, batch: Sequence[tuple[Question, int, Prompt]], decoder: Decoder) -> None:
        """Raises `UserError` where the device has no room for the batch."""
        try:
            with self._watch("decode"):
                answers = decoder.answer([prompt for _, _, prompt in batch])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(len(batch), decoder) from error
        for (question, sample, _), answer in zip(batch, answers, strict=True):
            try:
                with self._watch("pictures"):
                    said = say(answer, self._interpreter)
            except ItemError as error:
                self.fail(question.item, error)
                self._failed.add(question.item.index)
                continue
            item = question.item.index
            for name, picture in zip(picture_files(item, sample, said), said.pictures, strict=True):
                self._files[self._folder / name] = png(picture)
            self._lines.setdefault(item, []).append(answer_line(question, sample, answer, said, self._settings))

    def write(self, progress: Progress) -> None:
        """The chunk's result. An item of which one answer failed has none."""
        for item in self._failed:
            self._lines.pop(item, None)
            self._files = {path: file for path, file in self._files.items() if not path.name.startswith(f"{item:06d}-")}
        lines = [line for item in sorted(self._lines) for line in self._lines[item]]
        tallies = {"answers": len(lines), "pictures": sum(len(orjson.loads(line)["files"]) for line in lines)}
        files = {**self._files, self._path: b"".join(lines)}
        self.save(files, tallies=tallies, seconds=self._watch.take(), progress=progress)


def out_of_memory(answers: int, decoder: Decoder) -> UserError:
    """The error for a batch of answers that the device has no room for."""
    ways = [f"lower --batch_size, which is {answers} here"] if answers > 1 else []
    ways += ["turn guidance off (--guidance 1), which halves the sequences"] if decoder.settings.guidance != 1 else []
    ways += ["ask for smaller pictures (--height, --width) or shorter texts (--max_new_tokens)"]
    return UserError(
        f"{decoder.model.device} has too little memory for {answers} answers at a time: {', or '.join(ways)}. Where "
        "prompts are answered already, other settings need another --out, or --overwrite."
    )


def summary(output: AnswerOutput, counts: Counts) -> str:
    """The run in words and numbers, for the terminal."""
    lines = [
        counts_table({output.source.table.path.name: counts}, "prompts"),
        f"answers: {counts.tallies['answers']:,}, pictures: {counts.tallies['pictures']:,}, in {output.source.output}",
        f"look at {output.folder / 'report.html'}",
    ]
    if counts.rejected + counts.failed:
        lines.append(f"not answered: {output.source.rejected}")
    return "\n".join(lines)
