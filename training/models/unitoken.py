"""UniToken: a language model that reads an image's discrete codes and its continuous features in one sequence.

`model` and `lm_head` are the language model, `vit` the vision tower and `adapter` what joins them; these are also the
names in a model folder.

Legend: T packed tokens, C the language model's width, F continuous tokens, N tiles, P features of a tile.
"""

import torch
from torch import nn

from training.data.packing import Batch
from training.models.llm import Decoder, LLMConfig
from training.models.loss import Head
from training.models.siglip import VisionConfig, VisionTower
from training.models.units import LayeredModel


class UniToken(LayeredModel):
    def __init__(
        self,
        llm: LLMConfig,
        vision: VisionConfig,
        *,
        z_weight: float,
        masked: range | None = None,
        dropout: float = 0.0,
    ):
        """`masked` are words that the loss leaves out of the vocabulary."""
        super().__init__()
        self.z_weight, self.masked = z_weight, masked
        self.model = Decoder(llm, dropout)
        self.lm_head = Head(llm.hidden_size, llm.vocab_size, bias=False)
        self.adapter = nn.Sequential(
            nn.Linear(vision.hidden_size, llm.hidden_size), nn.GELU(), nn.Linear(llm.hidden_size, llm.hidden_size)
        )
        self.vit = VisionTower(vision)

    def units(self) -> list[nn.Module]:
        return [*self.vit.encoder.layers, *self.model.layers]

    def ends(self) -> list[nn.Module]:
        return [self.model.embed_tokens, self.lm_head]

    def embed(self, batch: Batch) -> torch.Tensor:
        """(T, C) input: token embeddings with the images' features in their places."""
        features = self.adapter(self.vit(batch.tiles)).flatten(0, 1)  # (N * P, C)
        x = self.model.embed_tokens(batch.tokens)
        if len(batch.feature_places) == 0:
            return x + features[:0].sum()  # a batch of text keeps the tower in the graph, as every other rank has it
        return x.index_copy(0, batch.feature_places, features[batch.feature_rows])

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the batch's labelled positions: the loss, and (2,) cross-entropy and unweighted z-loss."""
        hidden = self.model(self.embed(batch), batch.positions, batch.lengths)
        return self.lm_head(hidden[batch.learned], batch.targets, self.z_weight, self.masked)
