"""Any transformers causal language model, trained on text and codes without a vision tower.

The model is transformers' own; what is ours is the packed batch's way through it and the loss.

Legend: T packed tokens, B samples, L the longest of them, C hidden size.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pre_tokenize.text import TOKENIZER_FILES, TextTokenizer
from training.config import TrainConfig
from training.data.packing import Batch
from training.models.folder import ModelFolder, language_sizes, read_config
from training.models.loss import linear_loss
from vistoken.cli import note
from vistoken.errors import UserError

RESHAPED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what the loss does not know of


class CausalLM(nn.Module):
    def __init__(self, lm: nn.Module, z_weight: float, checkpointing: bool):
        super().__init__()
        self.z_weight = z_weight
        self._lm = [lm]  # in a list, so that tensors keep the names they have in its folder
        for name, child in lm.named_children():
            self.add_module(name, child)
        if checkpointing:
            name = "activation_checkpointing_enable"  # before transformers 5 the other one
            enable = getattr(lm, name if hasattr(lm, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})
        self.train()  # loaded models are not

    def units(self) -> list[nn.Module]:
        """What is sharded and compiled on its own: the decoder's layers."""
        lists = (module for module in self._lm[0].base_model.modules() if isinstance(module, nn.ModuleList))
        return list(next(lists))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """As `UniToken.forward`. Padding goes at the end, where causal attention never looks; samples of a batch are
        of similar length, so that there is little of it.
        """
        lm, lengths = self._lm[0], batch.lengths.tolist()
        padded = pad_sequence(batch.tokens.split(lengths), batch_first=True)  # (B, L)
        hidden = lm.base_model(input_ids=padded, use_cache=False).last_hidden_state  # (B, L, C)
        hidden = torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])  # (T, C)
        return linear_loss(hidden[batch.learned], lm.get_output_embeddings().weight, batch.targets, self.z_weight)


def open_causal_lm(settings: TrainConfig) -> tuple[CausalLM, ModelFolder]:
    """The model, loaded on the CPU, with room for all words of its tokenizer or of `tokenizer_from`.

    Raises `UserError` for a folder that is no model or lacks weights.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("--variant lm needs transformers: pip install 'vistoken[train]'") from error
    path, config = read_config(Path(settings.init_from))
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is checked here
    transformers.utils.logging.disable_progress_bar()
    try:
        load = transformers.AutoModelForCausalLM.from_pretrained
        lm, info = load(path, torch_dtype="auto", output_loading_info=True)  # as stored: mapped files are not copied
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: no causal language model that transformers can load ({error})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UserError(f"{path}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(info[kind])[:4]))}")
    if lm.get_output_embeddings().bias is not None or any(config.get(name) for name in RESHAPED_LOGITS):
        raise UserError(f"{path}: logits with a bias, a cap or a scale are not supported")
    tokenizer = Path(settings.tokenizer_from or path)
    if settings.tokenizer_from or any((path / name).is_file() for name in TOKENIZER_FILES):
        grow(lm, TextTokenizer(tokenizer).size, settings.seed)
        config["vocab_size"] = lm.config.vocab_size
    origins = dict.fromkeys((name.split(".")[0] for name, _ in lm.named_parameters()), str(path))
    folder = ModelFolder(path, tokenizer, config, language_sizes(lm.config.to_dict(), path), None, {}, origins)
    return CausalLM(lm, settings.z_loss_weight, settings.checkpointing), folder


def grow(lm: nn.Module, vocab_size: int, seed: int) -> None:
    """Add embeddings for new words, drawn around the mean of those there are; the same on every process."""
    known = lm.get_input_embeddings().num_embeddings
    if vocab_size > known:
        note(f"the tokenizer has {vocab_size:,} words, the model {known:,}: embeddings for the others are made")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm.resize_token_embeddings(vocab_size)
