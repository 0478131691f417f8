"""Any transformers causal language model, trained on text and codes without a vision tower.

The model is transformers' own; what is ours is the packed batch's way through it and the loss.

Legend: T packed tokens, B samples, L the longest of them, C hidden size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pre_tokenize.text import TextTokenizer, tokenizer_file
from training.config import TrainConfig
from training.data.packing import Batch
from training.models.folder import ModelFolder, language_sizes, read_config
from training.models.loss import Head
from training.models.units import LayeredModel
from vistoken.cli import note
from vistoken.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NARROW = 1e-9  # of the known words' covariance
MIXED = 16  # known words that a new one is drawn from
COLUMNS = 128  # of the embeddings that are in fp32 at a time
RESHAPED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what the loss does not know of


class CausalLM(LayeredModel):
    def __init__(self, lm: "PreTrainedModel", z_weight: float):
        super().__init__()
        self.z_weight = z_weight
        _, head = words_and_head(lm)
        own = Head(head.in_features, head.out_features, bias=False, device="meta")
        own.weight = head.weight
        lm.set_output_embeddings(own)
        self._lm = [lm]  # in a list, so that tensors keep the names they have in its folder
        for name, child in lm.named_children():
            self.add_module(name, child)
        self.train()  # loaded models are not

    @property
    def lm(self) -> "PreTrainedModel":
        """transformers' own model."""
        return self._lm[0]

    def units(self) -> list[nn.Module]:
        lists = (module for module in self.lm.base_model.modules() if isinstance(module, nn.ModuleList))
        return list(next(lists))

    def ends(self) -> list[nn.Module]:
        """None where both are one."""
        words, head = words_and_head(self.lm)
        return [] if words.weight is head.weight else [words, head]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `UniToken.forward`. Padding goes at the end, where causal attention never looks; samples of a batch are
        of similar length, so that there is little of it.
        """
        lm, lengths = self.lm, batch.lengths.tolist()
        padded = pad_sequence(batch.tokens.split(lengths), batch_first=True)  # (B, L)
        hidden = lm.base_model(input_ids=padded, use_cache=False).last_hidden_state  # (B, L, C)
        hidden = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])  # (T, C)
        return lm.get_output_embeddings()(hidden[batch.learned], batch.targets, self.z_weight)


def load_causal_lm(folder: Path) -> "tuple[PreTrainedModel, Path, dict[str, Any]]":
    """transformers' model on the CPU, the folder that holds it, and its config.json.

    Raises `UserError` for a folder that is no model or lacks weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("--variant lm needs transformers: pip install 'vistoken[train]'") from error
    path, config = read_config(folder)
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is checked here
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        # "auto": numbers as stored, so that mapped files are not copied
        pair: Any = load(path, torch_dtype="auto", output_loading_info=True)  # typed as a model alone
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: no causal language model that transformers can load ({error})") from error
    lm, info = pair
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"{path}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:4]))}")
    if words_and_head(lm)[1].bias is not None or any(config.get(name) for name in RESHAPED_LOGITS):
        raise UserError(f"{path}: logits with a bias, a cap or a scale are not supported")
    return lm, path, config


def open_causal_lm(settings: TrainConfig, *, drawn: bool = True) -> tuple[CausalLM, ModelFolder]:
    """The model, loaded on the CPU, with room for all words of its tokenizer or of `tokenizer_from`."""
    lm, path, config = load_causal_lm(Path(settings.init_from))
    tokenizer = Path(settings.tokenizer_from or path)
    if settings.tokenizer_from or tokenizer_file(path):
        grow(lm, TextTokenizer(tokenizer).size, settings.seed, drawn=drawn)
        config["vocab_size"] = lm.config.vocab_size
    origins = dict.fromkeys((name.split(".")[0] for name, _ in lm.named_parameters()), str(path))
    folder = ModelFolder(path, tokenizer, config, language_sizes(lm.config.to_dict(), path), None, {}, origins)
    return CausalLM(lm, settings.z_loss_weight), folder


def words_and_head(lm: "PreTrainedModel") -> tuple[nn.Embedding, nn.Linear]:
    """What turns ids into vectors, and vectors into logits. Raises `UserError` for a model that has others."""
    words, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if not isinstance(words, nn.Embedding) or not isinstance(head, nn.Linear):
        raise UserError(f"{type(lm).__name__}: its words and logits come from {type(words)} and {type(head)}")
    return words, head


def grow(lm: "PreTrainedModel", vocab_size: int, seed: int, *, drawn: bool = True) -> None:
    """Make room for new words.

    As in transformers, a new word is drawn around the mean of those there are, with 1e-9 of their covariance; see
    `draw_words`. With `drawn` false, all weights will come from a checkpoint.
    """
    words, head = words_and_head(lm)
    known = words.num_embeddings
    if vocab_size <= known:
        return
    note(f"the tokenizer has {vocab_size:,} words, the model {known:,}: embeddings for the others are made")
    generator, tied = torch.Generator().manual_seed(seed), words.weight is head.weight
    tables: list[nn.Embedding | nn.Linear] = [words] if tied else [words, head]
    for table in tables:
        grown = torch.empty(vocab_size, table.weight.shape[1], dtype=table.weight.dtype)
        if drawn:
            grown[:known] = table.weight.data
            draw_words(grown[:known], generator, out=grown[known:])
        table.weight = nn.Parameter(grown)
    if tied:
        head.weight = words.weight
    words.num_embeddings = head.out_features = lm.config.get_text_config().vocab_size = vocab_size
    if hasattr(lm, "vocab_size"):
        lm.vocab_size = vocab_size


def draw_words(known: torch.Tensor, generator: torch.Generator, out: torch.Tensor) -> None:
    """Fill `out` (n, C) with words that have the mean of the rows of `known` (V, C) and 1e-9 of their covariance.

    Each is the mean and a random share of how far a few random rows are from it. The normal distribution that
    transformers draws from has the same mean and covariance, but needs the covariance itself, and its root for each new
    word: 4e12 operations each at 7B's width.
    """
    rows = torch.randint(len(known), (len(out), MIXED), generator=generator)
    shares = torch.randn(len(out), MIXED, generator=generator) * (NARROW / MIXED) ** 0.5
    rest = 1 - shares.sum(1, keepdim=True)
    for start in range(0, known.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        block = known[:, columns].float()
        mixed = F.embedding_bag(rows, block, per_sample_weights=shares, mode="sum")
        out[:, columns] = mixed.addcmul_(rest, block.mean(0))
