"""Trained models that go on from where they are: sessions of several sequences, with keys and values kept.

A session has a row for every sequence. `extend` feeds some rows any number of embeddings each and tells what comes
next in them; a row does not see the others. `CachedUniToken` keeps keys and values itself, `CachedLM` leaves that to
transformers, and `Recomputing` keeps nothing but the inputs: what the other two must agree with.

Legend: R rows, n new tokens, S tokens kept, C hidden size, H heads, K key/value heads, D head size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pre_tokenize.token_file import IGNORE
from training.data.anyres import ImageInput
from training.data.packing import interleave, pack
from training.models.causal_lm import words_and_head
from training.models.llm import LLMConfig
from training.models.unitoken import UniToken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PADDED = 8  # so many new tokens a row, or fewer, go through as one padded batch; more, as a prompt, row by row


class Session(Protocol):
    def extend(self, inputs: Mapping[int, Tensor]) -> Tensor:
        """Row -> (n, C) embeddings, appended to what the row has. Returns (len(inputs), V) float32 logits of what
        follows the last of each, in the order of `inputs`.
        """
        ...

    def forget(self, row: int) -> None:
        """Start the row anew."""
        ...


class LanguageModel(Protocol):
    """What can be asked for an answer."""

    vocab_size: int
    device: torch.device

    def embed(self, ids: Sequence[int] | np.ndarray, images: Sequence[ImageInput] = ()) -> Tensor:
        """(n, C). `images` are those that end in `ids`, for a model with a vision tower."""
        ...

    def session(self, rows: int, room: int = 0) -> Session:
        """`room` is how many tokens a row will surely have, if that is known: room that grows is copied."""
        ...


class CachedUniToken:
    def __init__(self, model: UniToken):
        self.model = model.eval()
        self.config = model.model.config
        self.vocab_size = self.config.vocab_size
        self.device = model.lm_head.weight.device

    @torch.no_grad()
    def embed(self, ids: Sequence[int] | np.ndarray, images: Sequence[ImageInput] = ()) -> Tensor:
        if not images:
            return self.model.model.embed_tokens(torch.as_tensor(ids, dtype=torch.int64, device=self.device))
        tokens = np.asarray(ids)
        sample = interleave("", tokens, np.full(len(tokens), IGNORE), list(images))
        return self.model.embed(pack([sample], side=images[0].tiles.shape[-1]).to(self.device))

    def session(self, rows: int, room: int = 0) -> "UniTokenSession":
        return UniTokenSession(self, rows, room)


class UniTokenSession:
    def __init__(self, parent: CachedUniToken, rows: int, room: int):
        self._model = parent.model
        weight = self._model.lm_head.weight
        self._cache = KVCache(parent.config, rows, room, weight.device, weight.dtype)

    @torch.no_grad()
    def extend(self, inputs: Mapping[int, Tensor]) -> Tensor:
        x, last = self._cache.begin(inputs)
        hidden = self._model.model(x, self._cache.positions, self._cache.sizes, self._cache.layers)
        return self._model.lm_head(hidden[last]).float()

    def forget(self, row: int) -> None:
        self._cache.lengths[row] = 0


class KVCache:
    """Keys and values of R sequences, each from the start of its own row: (layers, R, K, S, D).

    Tokens of padding are written behind a row's end, where the next ones overwrite them, and no mask lets them be seen.
    """

    def __init__(self, config: LLMConfig, rows: int, room: int, device: torch.device, dtype: torch.dtype):
        self.lengths = [0] * rows
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, room, config.head_dim)
        self._keys, self._values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.layers = [partial(self.attend, number) for number in range(config.num_hidden_layers)]

    def begin(self, inputs: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Make room for new tokens. Returns their embeddings as one sequence (T, C), and which of them are the rows'
        last, (len(inputs),); `positions` (T,) and `sizes` (sequences,) belong to it.
        """
        device, counts = self._keys.device, {row: len(new) for row, new in inputs.items()}
        most = max(counts.values())
        if most <= PADDED:
            first = next(iter(inputs.values()))
            x = first.new_zeros(len(self.lengths), most, first.shape[1])
            for row, new in inputs.items():
                x[row, : len(new)] = new
            starts = torch.tensor(self.lengths, device=device)
            self._grow(max(self.lengths) + most)
            self.positions = starts[:, None] + torch.arange(most, device=device)  # (R, n)
            self.sizes = torch.full((len(self.lengths),), most)
            self._attend = partial(self._attend_padded, seen=max(self.lengths) + most, positions=self.positions)
            self.positions = self.positions.flatten()
            x = x.flatten(0, 1)
            last = torch.tensor([row * most + count - 1 for row, count in counts.items()], device=device)
        else:
            self._grow(max(self.lengths[row] + count for row, count in counts.items()))
            spans = {row: (self.lengths[row], self.lengths[row] + count) for row, count in counts.items()}
            self.positions = torch.cat([torch.arange(*span, device=device) for span in spans.values()])
            self.sizes = torch.tensor(list(counts.values()))
            self._attend = partial(self._attend_row_by_row, spans=spans)
            x = torch.cat(list(inputs.values()))
            last = self.sizes.cumsum(0).to(device) - 1
        for row, count in counts.items():
            self.lengths[row] += count
        return x, last

    def _grow(self, needed: int) -> None:
        room = self._keys.shape[3]
        if needed > room:
            more = max(needed - room, room // 2, 64)
            self._keys, self._values = (F.pad(kept, (0, 0, 0, more)) for kept in (self._keys, self._values))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`Attend` of a layer."""
        return self._attend(self._keys[layer], self._values[layer], q, k, v)

    def _attend_padded(
        self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, *, seen: int, positions: Tensor
    ) -> Tensor:
        """Every row has as many new tokens."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        keys[rows, :, positions] = k.unflatten(0, positions.shape)  # (R, n, K, D)
        values[rows, :, positions] = v.unflatten(0, positions.shape)
        mask = torch.arange(seen, device=positions.device) <= positions[:, None, :, None]  # (R, 1, n, S)
        q = q.unflatten(0, positions.shape).transpose(1, 2)  # (R, H, n, D)
        out = _attention(q, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)

    def _attend_row_by_row(
        self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor, *, spans: Mapping[int, tuple[int, int]]
    ) -> Tensor:
        outputs, sizes = [], [end - start for start, end in spans.values()]
        for (row, (start, end)), qs, ks, vs in zip(
            spans.items(), q.split(sizes), k.split(sizes), v.split(sizes), strict=True
        ):
            keys[row, :, start:end], values[row, :, start:end] = ks.transpose(0, 1), vs.transpose(0, 1)
            mask = None  # a row's first tokens see one another only, which has a kernel of its own
            if start:
                mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
            out = _attention(
                qs.transpose(0, 1)[None], keys[None, row, :, :end], values[None, row, :, :end], mask, start == 0
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=gqa)


class CachedLM:
    """Any transformers causal language model."""

    def __init__(self, lm: "PreTrainedModel"):
        self.lm = lm.eval()
        self.words, self.head = words_and_head(lm)
        self.vocab_size = len(self.head.weight)
        self.device = self.head.weight.device

    @torch.no_grad()
    def embed(self, ids: Sequence[int] | np.ndarray, images: Sequence[ImageInput] = ()) -> Tensor:
        return self.words(torch.as_tensor(ids, dtype=torch.int64, device=self.device))

    def session(self, rows: int, room: int = 0) -> "LMSession":
        return LMSession(self, rows)


class LMSession:
    """New tokens of all rows end in the same column of transformers' cache. Where a row has fewer, its columns before
    are left out by the mask; positions are counted without them.
    """

    def __init__(self, parent: CachedLM, rows: int):
        self._lm, self._head = parent.lm, parent.head
        self._used = torch.zeros(rows, 0, dtype=torch.int64, device=parent.device)  # (R, S): 1 where a token is
        self._cache = None

    @torch.no_grad()
    def extend(self, inputs: Mapping[int, Tensor]) -> Tensor:
        most = max(len(new) for new in inputs.values())
        first = next(iter(inputs.values()))
        x = first.new_zeros(len(self._used), most, first.shape[1])
        used = self._used.new_zeros(len(self._used), most)
        for row, new in inputs.items():
            x[row, most - len(new) :] = new
            used[row, most - len(new) :] = 1
        starts = self._used.sum(1, keepdim=True)
        positions = (starts + used.cumsum(1) - 1).clamp(min=0)
        self._used = torch.cat((self._used, used), dim=1)
        seen = self._used.clone()
        seen[:, -1] = 1  # a row without new tokens sees itself: attention to nothing at all is not a number
        out = self._lm.base_model(
            inputs_embeds=x, attention_mask=seen, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        self._cache = out.past_key_values
        return self._head(out.last_hidden_state[list(inputs), -1]).float()

    def forget(self, row: int) -> None:
        self._used[row] = 0


class Recomputing:
    """The same model without a cache: every step goes through whole sequences."""

    def __init__(self, model: LanguageModel):
        self._model = model
        self.vocab_size, self.device, self.embed = model.vocab_size, model.device, model.embed

    def session(self, rows: int, room: int = 0) -> "RecomputingSession":
        return RecomputingSession(self._model, rows)


class RecomputingSession:
    def __init__(self, model: LanguageModel, rows: int):
        self._model = model
        self._inputs: list[list[Tensor]] = [[] for _ in range(rows)]

    def extend(self, inputs: Mapping[int, Tensor]) -> Tensor:
        for row, new in inputs.items():
            self._inputs[row].append(new)
        fresh = self._model.session(len(self._inputs))
        return fresh.extend({row: torch.cat(self._inputs[row]) for row in inputs})

    def forget(self, row: int) -> None:
        self._inputs[row] = []
