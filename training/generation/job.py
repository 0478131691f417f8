"""Generation as a job: prompts by chunks, answers as results, every prompt accounted for.

{out}/answers.jsonl            a line an answer
{out}/images/                  its pictures, {item}-{sample}-{number}.png
{out}/answers.rejected.jsonl   prompts without an answer, and why
{out}/report.html              the first answers, to look at
{out}/manifest.json, run_summary.json
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from training.generation.decode import Decoder, Prompt, Settings
from training.generation.interpreter import Interpreter, Question, Said, Wishes, png, prompt, say
from training.generation.report import write_report
from vistoken.errors import ItemError
from vistoken.jobs.chunks import chunk_table
from vistoken.jobs.counts import SUMMARY, Counts, counts_table, write_summary
from vistoken.jobs.progress import Progress, Stopwatch
from vistoken.jobs.results import Results
from vistoken.jobs.run import WORK, JoinedSource, OpenChunk, Output, Task, todo
from vistoken.jobs.workers import Workers

ANSWERS = "answers.jsonl"


class AnswerOutput(Output):
    sources: Sequence[JoinedSource]

    def __init__(self, folder: Path, manifest: Mapping[str, Any], prompts: Path, chunk_items: int):
        table = chunk_table(prompts, chunk_items, folder / WORK / "chunks.json")
        source = JoinedSource(table, Results(folder / WORK / "results"), folder / ANSWERS)
        super().__init__(folder, {**manifest, "prompts": table.sha256}, [source])
        self.source = source

    def made(self) -> list[Path]:
        names = (ANSWERS, self.source.rejected.name, "report.html", SUMMARY)
        return [path for name in names if (path := self.folder / name).exists()] + [*self.folder.glob("images/*.png")]

    def finish(self) -> Counts:
        counts = self.source.finish().counts
        write_summary(self.folder / SUMMARY, answers=counts.as_dict())
        write_report(self.folder, self.folder / ANSWERS, self.manifest)
        return counts


def run_generation(
    output: AnswerOutput,
    interpreter: Interpreter,
    settings: Settings,
    wishes: Wishes,
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
            interpreter.model,
            interpreter.rules,
            settings,
            interpreter.close_image,
            on_tokens=lambda count: progress.count(tokens=count),
        )
        for task in todo([output.source] if output.source.finished() is None else [], workers, progress):
            chunk = AnswerChunk(task, output.folder, {"seed": wishes.seed, **asdict(settings)})
            chunk.ask(interpreter, wishes, samples)
            for start in range(0, len(chunk.prompts), batch_size):
                chunk.answer(chunk.prompts[start : start + batch_size], decoder, interpreter)
            chunk.write(progress)
        workers.wait_for_all(meanwhile=progress.refresh)
        progress.refresh()
        return output.finish() if workers.rank == 0 else None


class AnswerChunk(OpenChunk):
    """A chunk of prompts on its way to answers."""

    def __init__(self, task: Task, folder: Path, settings: Mapping[str, Any]):
        super().__init__(task)
        self._folder, self._settings, self._watch = folder, settings, Stopwatch()
        self._files: dict[Path, bytes] = {}
        self._failed: set[int] = set()
        self._lines: dict[int, list[bytes]] = {}
        self.prompts: list[tuple[Question, int, Prompt]] = []  # with the number of the sample
        kept = set(self.done_before())
        for line in self._earlier() if kept else ():
            if (item := orjson.loads(line)["item"]) in kept:
                self._lines.setdefault(item, []).append(line)

    @property
    def _path(self) -> Path:
        return self.source.results.path(self.chunk.index, ".jsonl")

    def _earlier(self) -> Iterator[bytes]:
        return iter(self._path.read_bytes().splitlines(keepends=True))

    def ask(self, interpreter: Interpreter, wishes: Wishes, samples: int) -> None:
        for item in self.todo():
            try:
                with self._watch("prompts"):
                    question = interpreter.question(item)
                    prompts = [prompt(question, interpreter, wishes, sample) for sample in range(samples)]
            except ItemError as error:
                self.fail(item, error)
                continue
            self.prompts += [(question, sample, one) for sample, one in enumerate(prompts)]

    def answer(self, batch: Sequence[tuple[Question, int, Prompt]], decoder: Decoder, interpreter: Interpreter) -> None:
        with self._watch("decode"):
            answers = decoder.answer([prompt for _, _, prompt in batch])
        for (question, sample, _), answer in zip(batch, answers, strict=True):
            try:
                with self._watch("pictures"):
                    said = say(answer, interpreter)
            except ItemError as error:
                self.fail(question.item, error)
                self._failed.add(question.item.index)
                continue
            files = [f"images/{question.item.index:06d}-{sample}-{n}.png" for n in range(len(said.pictures))]
            for name, picture in zip(files, said.pictures, strict=True):
                self._files[self._folder / name] = png(picture)
            line = self._line(question, sample, said, answer.tokens, answer.finish, files)
            self._lines.setdefault(question.item.index, []).append(line)

    def _line(
        self, question: Question, sample: int, said: Said, tokens: list[int], finish: str, files: list[str]
    ) -> bytes:
        item_id = question.item.id
        line = {
            "id": question.item.index if item_id is None else item_id,
            "item": question.item.index,
            "sample": sample,
            "prompt": question.turns,
            "images": question.images,
            "text": said.text,
            "files": files,
            "finish": finish,
            "matched_ratios": said.sizes,
            "image_embed_inds": [[grid.tolist() for grid in grids] for grids in said.grids],
            "tokens": tokens,
            "settings": {**self._settings, "task": question.task},
        }
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    def write(self, progress: Progress) -> None:
        """The chunk's result. An item of which one answer failed has none."""
        for item in self._failed:
            self._lines.pop(item, None)
            self._files = {path: png for path, png in self._files.items() if not path.name.startswith(f"{item:06d}-")}
        lines = [line for item in sorted(self._lines) for line in self._lines[item]]
        tallies = {"answers": len(lines), "pictures": sum(len(orjson.loads(line)["files"]) for line in lines)}
        files = {**self._files, self._path: b"".join(lines)}
        self.save(files, tallies=tallies, seconds=self._watch.take(), progress=progress)


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
