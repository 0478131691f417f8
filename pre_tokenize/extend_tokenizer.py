"""Add the words of DualViTok's images to a language model's tokenizer.

    python pre_tokenize/extend_tokenizer.py --tokenizer_dir ckpts/Qwen2.5-7B --output_dir ckpts/Qwen2.5-dualvitok

`--tokenizer_dir` is any folder with a Hugging Face tokenizer.json, such as a model's, or that file. The words follow
the ids that are there: 7 marks, 16 heights, 16 widths, 32,768 semantic and 98,304 pixel codes, in the order of the
ILLUME+ release. They are special tokens: pre_tokenize.py then takes them, where somebody wrote them, for plain text.
The other files of the tokenizer are copied; no weights are. A tokenizer that has the words already is left as it is;
one that has some of them, or has them in another order, is refused.

The embeddings grow when training starts: `training/train.py --variant lm --tokenizer_from OUTPUT_DIR`.
"""

from pathlib import Path

from vision_tokenizer.models.dualvitok.vocabulary import (
    CODEBOOK_SIZES,
    LEVEL_MARKS,
    DualViTokVocabulary,
    added_names,
    find_words,
)
from vistoken.cli import at_least, command_parser, run_command
from vistoken.errors import UserError
from vistoken.jobs.files import write_bytes
from vistoken.store import Location

# what may lie beside tokenizer.json and belongs to it
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def main(argv: list[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--tokenizer_dir", required=True, help="folder with tokenizer.json, or the file")
    parser.add_argument("--output_dir", type=Path, required=True, help="may be the same folder")
    add = parser.add_argument
    add("--semantic_size", type=at_least(1), default=CODEBOOK_SIZES[0], help="codes of the semantic codebook")
    parser.add_argument("--pixel_size", type=at_least(1), default=CODEBOOK_SIZES[1], help="codes of the pixel codebook")
    args = parser.parse_args(argv)
    extend(args.tokenizer_dir, args.output_dir, (args.semantic_size, args.pixel_size))


def extend(source: str, target: Path, codebook_sizes: tuple[int, int]) -> range:
    """Write the tokenizer of `source` with the words into `target`, and tell their ids, which are returned.

    Raises `UserError` for a tokenizer with some of the words, and leaves `target` alone.
    """
    from tokenizers import AddedToken

    from pre_tokenize.text import find_tokenizer, parse_tokenizer

    file = find_tokenizer(source)
    content = file.read_bytes()
    tokenizer = parse_tokenizer(content, file)
    found = find_words(tokenizer.get_vocab(with_added_tokens=True), codebook_sizes, str(file))
    if found is None:
        names = added_names(codebook_sizes)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        content = tokenizer.to_str(pretty=True).encode()
    ids = DualViTokVocabulary(parse_tokenizer(content, file).get_vocab(with_added_tokens=True), str(file)).image_ids
    _write(file, content, target)
    print(f"{target / 'tokenizer.json'}: {'written' if found is None else 'all words were there already'}")
    print(id_table(ids, codebook_sizes))
    return ids


def _write(file: Location, content: bytes, target: Path) -> None:
    there = target / "tokenizer.json"
    if there.is_file() and there.resolve() != file.resolve() and there.read_bytes() != content:
        raise UserError(f"{there}: another tokenizer is there. Choose another --output_dir, or delete the file.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in COMPANIONS:
            companion = file.parent / name
            if companion.is_file() and companion.resolve() != (target / name).resolve():
                write_bytes(target / name, companion.read_bytes())
        if not there.is_file() or there.read_bytes() != content:
            write_bytes(there, content)  # last: it is what others look for
    except OSError as error:
        raise UserError(f"--output_dir {target}: cannot write there ({error.strerror})") from error


def id_table(ids: range, codebook_sizes: tuple[int, int]) -> str:
    """The ids of the words, group by group."""
    names = added_names(codebook_sizes)
    counts = (3 + 2 * len(LEVEL_MARKS), 16, 16, *codebook_sizes)
    lines, start = [], 0
    for kind, count in zip(("marks", "heights", "widths", "semantic codes", "pixel codes"), counts, strict=True):
        end = start + count
        lines.append(f"{kind:<16}{ids[start]:>9} to {ids[end - 1]:<9}{names[start]} ... {names[end - 1]}")
        start = end
    return "\n".join([*lines, f"the vocabulary has {ids[-1] + 1:,} ids, {len(ids):,} of them for images"])


if __name__ == "__main__":
    run_command(main)
