"""What is printed before the first step, so that a wrong setting is seen before it costs GPU hours."""

from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from pre_tokenize.text import tokenizer_file
from training.assemble import Data
from training.config import TrainConfig
from training.data.packing import IMAGE_END, IMAGE_START, NEWLINE_TOKEN, SEPARATOR, Sample
from training.estimate import Memory, longest_batch
from training.generation.sheet import Sheet
from training.models.folder import ModelFolder
from training.models.llm import LLMConfig
from training.models.siglip import VisionConfig
from vision_tokenizer.models.dualvitok import vocabulary
from vistoken.errors import Failed, UserError

SHOWN = 60  # tokens of a run of text that are printed


def parts_table(model: nn.Module, origins: dict[str, str]) -> str:
    """Parameters trained and frozen by part, and where each part's weights come from."""
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        (trained if parameter.requires_grad else frozen)[name.split(".")[0]] += parameter.numel()
    lines = [f"{'part':<10}{'trained':>16}{'frozen':>16}  weights from"]
    lines += [f"{part:<10}{trained[part]:>16,}{frozen[part]:>16,}  {origin}" for part, origin in origins.items()]
    return "\n".join([*lines, f"{'all':<10}{trained.total():>16,}{frozen.total():>16,}"])


def memory_lines(memory: Memory, config: TrainConfig, vision: VisionConfig | None, world: int) -> str:
    samples, batches = config.shares(world)
    tokens, tiles = longest_batch(config, vision, samples)
    longest = f"{tokens:,} tokens" + (f" and {tiles} tiles" if tiles else "")
    step = f"{world} processes x {batches} batches x {samples} samples"
    if config.batch_tokens:
        step = f"{samples * world} samples over {world} processes, in batches of at most {config.batch_tokens:,} tokens"
    return f"a step: {step}\nmemory a process: about {memory}, with a batch of {longest}"


def sheet_line(sheet: Sheet, config: TrainConfig, llm: LLMConfig) -> str:
    """What the prompt sheet will take, while no batch is on the device."""
    number_bytes = 4 if config.precision in ("fp32", "tf32") else 2
    cache = sheet.memory(llm.num_hidden_layers, llm.num_key_value_heads * llm.head_dim, number_bytes)
    return (
        f"{config.prompt_sheet}: {len(sheet.questions)} prompts are answered at every checkpoint; keys and values take "
        f"up to {cache / 2**30:.1f} GiB a process meanwhile, and each token gathers the weights once"
    )


def data_lines(data: Data) -> str:
    """Samples and lengths by record, steps by type."""
    lines, sampler, limit = [], data.sampler, data.dataset.rules.max_seq_len
    for files, source in zip(data.dataset.sources, sampler.sources, strict=True):
        rows = np.arange(0, len(source.lengths), max(len(source.lengths) // 100_000, 1))
        low, middle, high = np.quantile(source.lengths[rows], (0, 0.5, 1)).astype(int)
        lines.append(
            f"{files.record.path}: {len(source.lengths):,} samples, {source.drawn:,} an epoch as {source.type!r}; "
            f"discrete tokens {low} / {middle} / {high} (least / median / most)"
        )
        if source.continuous:
            low, middle, high = np.quantile(source.continuous(rows), (0, 0.5, 1)).astype(int)
            lines[-1] += f", continuous {low} / {middle} / {high}"
            if unknown := np.count_nonzero(files.record.image_counts < 0):
                lines[-1] += (
                    f"; {unknown:,} lack the sizes of their images, whose continuous tokens do not count where batches "
                    "are shared out (concat_record.py --image_sizes)"
                )
        if longer := np.count_nonzero(source.lengths > limit):
            lines[-1] += f"; {longer:,} are longer than --max_seq_len {limit} and are cut off there"
    for files in data.validation.sources if data.validation else ():
        lines.append(f"{files.record.path}: {len(files):,} samples held out for validation")
    by_type = ", ".join(f"{kind!r} {steps:,}" for kind, steps in zip(sampler.types, sampler.type_steps, strict=True))
    return "\n".join([*lines, f"{len(sampler):,} steps of {sampler.step_size} samples an epoch: {by_type}"])


def sample_text(data: Data, folder: ModelFolder) -> str:
    """The first sample as the model sees it: images as their token counts, what is learned in [[ ]]."""
    for number in reversed(next(data.sampler.epoch(0))):  # the longest shows most
        try:
            sample = data.dataset.sample(number)
            break
        except Failed as failure:
            reason = failure
    else:
        raise UserError(f"no sample of the first step can be used; the last one: {reason}")
    file = tokenizer_file(folder.tokenizer)
    tokenizer = Tokenizer.from_file(str(file)) if file else None
    kind = token_kinds(sample) if folder.vision else _kinds_of_words(sample, tokenizer)
    text = "".join(_runs(sample, kind, tokenizer))
    unchecked = f"{folder.tokenizer}: no tokenizer file, so the tokens' vocabulary is not checked against the model's\n"
    return f"{'' if file else unchecked}{sample.name}, {len(sample)} tokens, learned parts in [[ ]]:\n  {text}"


def token_kinds(sample: Sample) -> np.ndarray:
    """(L,) what each token is: 0 text, 1 discrete image token, 2 continuous token."""
    kind = np.where(sample.features >= 0, 2, 0)
    _mark_blocks(sample, kind, IMAGE_START, IMAGE_END)
    kind[np.isin(sample.tokens, (SEPARATOR, IMAGE_END))] = 0
    kind[1:][(sample.tokens[1:] == NEWLINE_TOKEN) & (sample.features[:-1] >= 0)] = 2
    return kind


def _kinds_of_words(sample: Sample, tokenizer: Tokenizer | None) -> np.ndarray:
    """The same for a language model, whose images are words of its vocabulary, if it has such words."""
    kind = np.zeros(len(sample), np.int64)
    start = tokenizer.token_to_id(vocabulary.IMAGE_START) if tokenizer else None
    end = tokenizer.token_to_id(vocabulary.IMAGE_END) if tokenizer else None
    if start is not None and end is not None:
        _mark_blocks(sample, kind, start, end)
    return kind


def _mark_blocks(sample: Sample, kind: np.ndarray, first: int, last: int) -> None:
    starts, ends = (np.flatnonzero(sample.tokens == token) for token in (first, last))
    for start, end in zip_longest(starts, ends, fillvalue=len(sample)):  # the last block may be cut off
        kind[start : end + 1] = np.maximum(kind[start : end + 1], 1)


def _runs(sample: Sample, kind: np.ndarray, tokenizer: Tokenizer | None) -> Iterator[str]:
    learned = sample.labels >= 0
    borders = np.flatnonzero((np.diff(kind) != 0) | (np.diff(learned) != 0)) + 1
    for run in np.split(np.arange(len(sample)), borders):
        ids = sample.tokens[run]
        if kind[run[0]]:
            text = f"<{len(ids)} {'continuous' if kind[run[0]] == 2 else 'image'} tokens>"
        elif tokenizer:
            text = tokenizer.decode(ids[:SHOWN].tolist(), skip_special_tokens=False)
        else:
            text = " ".join(map(str, ids[:SHOWN])) + " "
        text += f"... {len(ids) - SHOWN} more" if not kind[run[0]] and len(ids) > SHOWN else ""
        yield f"[[{text}]]" if learned[run[0]] else text
