"""The formats by the names of their image tokenizers, as a manifest has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import ProcessItem, SequenceFormat, as_it_is
from pre_tokenize.text import TextTokenizer
from vistoken.errors import UserError
from vistoken.store import Location


def load_format(
    manifest: Mapping[str, Any] | None,
    text: TextTokenizer,
    process_item: ProcessItem = as_it_is,
    image_dir: Location = Path(),
) -> SequenceFormat:
    """The format of token files with this manifest; published pickles, which have none, are Chameleon's."""
    name = manifest["image_tokenizer"]["name"] if manifest else "chameleon"
    if name == "chameleon":
        return ChameleonFormat(text, process_item, image_dir)
    if name == "dualvitok":
        return DualViTokFormat(text, process_item)
    raise UserError(f"the token files say they hold codes of {name!r}; known are chameleon, dualvitok")
