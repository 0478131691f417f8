"""Text to ids, in batches, in such a way that no text can pass for anything but text.

Special tokens spelt out by a user (`<racm3:break>`, `<reserved08706>`, `</s>`) are tokenised like any other words.
The only atoms are the marks of `conversation.py`, which no text may contain.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from tokenizers import AddedToken, Tokenizer

from pre_tokenize.conversation import END_MARK, IMAGE_MARK
from vistoken.errors import Failed, UserError
from vistoken.store import Location, location
from vistoken.weights import check_on_hub, looks_like_hub_id

TOKENIZER_FILES = ("text_tokenizer.json", "tokenizer.json")
IMAGE, END = -1, -2  # what the marks become


class TextTokenizer:
    """A Hugging Face tokenizer file as plain-text tokenizer.

    Args:
        source: the file, a folder that holds text_tokenizer.json or tokenizer.json, or a hub id.

    `ids` maps every name to its id; `vocabulary` is a hash of them, `sha256` one of the file. Raises `UserError` where
    there is no such tokenizer.
    """

    def __init__(self, source: str | Location):
        self.path = find_tokenizer(str(source))
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._tokenizer = parse_tokenizer(content, self.path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        by_id = sorted(self.ids.items(), key=lambda pair: pair[::-1])
        self.vocabulary = hashlib.sha256(json.dumps(by_id).encode()).hexdigest()
        self.size = max(self.ids.values()) + 1  # of the vocabulary
        marks = [AddedToken(mark, normalized=False, special=False) for mark in (IMAGE_MARK, END_MARK)]
        if self._tokenizer.add_tokens(marks) != 2:
            raise UserError(f"{self.path}: has a token for U+FDD0 or U+FDD1, which this toolkit needs for itself")
        self._control = np.zeros(self.size + 2, bool)  # what no text may become
        self._final = np.arange(self.size + 2, dtype=np.int32)  # id of the tokenizer -> our id
        for number, added in self._tokenizer.get_added_tokens_decoder().items():
            self._control[number] = added.special
            self._final[number] = {IMAGE_MARK: IMAGE, END_MARK: END}.get(added.content, number)
        self._tokenizer.encode_special_tokens = True  # special tokens in a text are words

    def forbid(self, ids: Iterable[int]) -> None:
        """Ids that no text may become, beside the special tokens: those of images."""
        self._control[list(ids)] = True

    def encode(self, text: str) -> np.ndarray:
        """A marked text -> int32 ids. Raises `Failed` as `encode_batch` tells it."""
        [ids] = self.encode_batch([text])
        if isinstance(ids, Failed):
            raise ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray | Failed]:
        """Marked texts -> int32 ids each, IMAGE and END in the places of the marks.

        A text that becomes a forbidden id in spite of all (a tokenizer may have image names among its words)
        comes back as `Failed`.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._checked(np.asarray(encoding.ids, np.int64)) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        """Ids -> text, special tokens shown by their names."""
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def _checked(self, ids: np.ndarray) -> np.ndarray | Failed:
        if forbidden := self._control[ids].nonzero()[0].tolist():
            name = self._tokenizer.id_to_token(int(ids[forbidden[0]]))
            return Failed("special token in text", f"the tokenizer reads {name!r} in it as a special token")
        return self._final[ids]


def parse_tokenizer(content: bytes, path: Location) -> Tokenizer:
    """A tokenizer file's content; `path` is blamed in the `UserError` for what is none."""
    try:
        return Tokenizer.from_buffer(content)
    except ValueError as error:
        raise UserError(f"{path}: not a Hugging Face tokenizers file ({error})") from error


def tokenizer_file(folder: Location) -> Location | None:
    """The one in `folder`, if it has one."""
    return next((path for name in TOKENIZER_FILES if (path := folder / name).is_file()), None)


def find_tokenizer(source: str) -> Location:
    """The tokenizer file that a file name, a folder or a hub id means. Raises `UserError`."""
    path = location(source)
    if path.is_file():
        return path
    if path.is_dir():
        if file := tokenizer_file(path):
            return file
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: neither {' nor '.join(TOKENIZER_FILES)} in this folder; it holds {found}")
    if not looks_like_hub_id(source):
        names = " or ".join(TOKENIZER_FILES)
        raise UserError(f"{source}: no such file or folder. Name a folder that holds {names}, or a hub id.")
    return _download(source)


def _download(hub_id: str) -> Path:
    check_on_hub(hub_id)
    for name in TOKENIZER_FILES:
        try:
            return Path(hf_hub_download(hub_id, name))
        except (EntryNotFoundError, OSError, ValueError) as error:  # what the hub client raises derives from these
            reason = str(error).strip().splitlines()[0]
            if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
                break  # no such repository, or no connection: another file will not be had either
    raise UserError(f"{hub_id}: no such file or folder here, and as a hub id: {reason}")
