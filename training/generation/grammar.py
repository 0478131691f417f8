"""What may come next in an answer, so that it always decodes.

The rules are those that `pre_tokenize` writes by: an image is the layout of its format's vocabulary. In it every place
has one mark, or any code of its level. Outside, images can only be opened, in the order of a layout's first three ids;
codes and the other marks are barred.

Legend: V vocabulary of the model.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pre_tokenize.chameleon import ChameleonFormat
from pre_tokenize.dualvitok import DualViTokFormat
from pre_tokenize.sequences import SequenceFormat
from training.generation.sizes import Size
from vision_tokenizer.models.dualvitok.model import grid_sizes
from vision_tokenizer.models.dualvitok.vocabulary import SIDES

HEAD = 3  # ids that open an image, its size among them


class Kind(NamedTuple):
    """What a place is for. Places of the same kind allow the same ids."""

    name: str  # text, size or code
    level: int = 0  # of a code
    head: tuple[int, ...] = ()  # before a size
    opens: bool = False  # of a text: an image may begin here


class Rules(Protocol):
    """The grammar of one format. A `head` is what is there of an image's first three ids."""

    @property
    def format(self) -> SequenceFormat: ...

    def follow(self, head: tuple[int, ...], token: int) -> tuple[int, ...]:
        """The head after `token`, which came outside of an image."""
        ...

    def expected(self, head: tuple[int, ...]) -> Kind: ...

    def layout(self, head: tuple[int, ...]) -> np.ndarray:
        """The layout of the image that a whole head opens; -1 - level where a code stands."""
        ...

    def head(self, size: Size) -> tuple[int, ...]:
        """What opens an image of this size."""
        ...

    def allowed(self, kind: Kind, *, images: bool) -> np.ndarray:
        """(V,) bool. Without `images` no image can be opened."""
        ...


@dataclass(frozen=True)
class ChameleonRules:
    """`<racm3:break>`, height, width. Without `barred`, anything may stand outside of images, as published."""

    format: ChameleonFormat
    vocab_size: int  # of the model
    barred: bool = True

    def follow(self, head: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*head, token) if head or token == self.format.vocabulary.image_start else ()

    def expected(self, head: tuple[int, ...]) -> Kind:
        return Kind("size") if head else Kind("text")

    def layout(self, head: tuple[int, ...]) -> np.ndarray:
        vocabulary = self.format.vocabulary
        return vocabulary.layout(*vocabulary.image_size(np.array(head)))

    def head(self, size: Size) -> tuple[int, ...]:
        return tuple(self.format.vocabulary.layout(*size)[:HEAD].tolist())

    def allowed(self, kind: Kind, *, images: bool) -> np.ndarray:
        vocabulary = self.format.vocabulary
        sizes = vocabulary.grid_ids[1:]
        if kind.name == "code":
            return _only(vocabulary.image_ids, self.vocab_size)
        if kind.name == "size":
            return _only(sizes, self.vocab_size)
        if not self.barred:
            return np.ones(self.vocab_size, bool)
        mask = _only(self.format.known_ids, self.vocab_size)
        mask[vocabulary.image_ids] = mask[sizes] = False
        mask[[vocabulary.image_end, vocabulary.separator, vocabulary.new_line]] = False
        mask[vocabulary.image_start] = images
        return mask


@dataclass(frozen=True)
class DualViTokRules:
    """Height, width, `<start_of_image>`. A size may also be named without an image after it; widths are those that
    make a known size with the height.
    """

    format: DualViTokFormat
    vocab_size: int
    sizes: Collection[Size]  # that the tokenizer decodes well

    def follow(self, head: tuple[int, ...], token: int) -> tuple[int, ...]:
        vocabulary = self.format.vocabulary
        if token in vocabulary.height_ids:
            return (token,)
        wanted = {1: vocabulary.width_ids, 2: (vocabulary.image_start,)}.get(len(head), ())
        return (*head, token) if token in wanted else ()

    def expected(self, head: tuple[int, ...]) -> Kind:
        return Kind("size", head=head) if len(head) == 1 else Kind("text", opens=len(head) == 2)

    def layout(self, head: tuple[int, ...]) -> np.ndarray:
        size = self.format.vocabulary.image_size(head[:2])
        return self.format.vocabulary.layout(*size, grid_sizes(*size))

    def head(self, size: Size) -> tuple[int, ...]:
        return tuple(self.format.vocabulary.layout(*size, grid_sizes(*size))[:HEAD].tolist())

    def allowed(self, kind: Kind, *, images: bool) -> np.ndarray:
        vocabulary = self.format.vocabulary
        if kind.name == "code":
            return _only(vocabulary.code_ids[kind.level], self.vocab_size)
        if kind.name == "size":
            height = SIDES[vocabulary.height_ids.index(kind.head[0])]
            widths = [vocabulary.width_ids[SIDES.index(w)] for h, w in self.sizes if h == height]
            return _only(widths, self.vocab_size)
        mask = _only(self.format.known_ids, self.vocab_size)
        mask[vocabulary.image_ids] = False
        if images:
            mask[[vocabulary.height_ids[SIDES.index(h)] for h, _ in self.sizes]] = True
            mask[vocabulary.image_start] = kind.opens
        return mask


def _only(ids: Collection[int] | np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[np.asarray(ids)] = True
    return mask


class Grammar:
    """Where one answer is."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self._head: tuple[int, ...] = ()
        self._layout: np.ndarray | None = None  # of the image that is being written
        self._place = 0  # in it

    @property
    def inside(self) -> bool:
        """In an image whose size is known."""
        return self._layout is not None

    @property
    def complete(self) -> bool:
        """What is there so far can be read: no image is cut off."""
        return not self.inside and self._rules.expected(self._head).name == "text"

    @property
    def head(self) -> tuple[int, ...]:
        """The first ids of the image that is being written."""
        return self._head

    def next(self) -> int | Kind:
        """The one id that may come next, or which kind of place it is."""
        if self._layout is None:
            return self._rules.expected(self._head)
        mark = int(self._layout[self._place])
        return mark if mark >= 0 else Kind("code", -1 - mark)

    def push(self, token: int) -> None:
        """Go on by an id that `next` allows."""
        if self._layout is not None:
            self._place += 1
            if self._place == len(self._layout):
                self._head, self._layout = (), None
            return
        self._head = self._rules.follow(self._head, token)
        if len(self._head) == HEAD:
            self._layout, self._place = self._rules.layout(self._head), HEAD
