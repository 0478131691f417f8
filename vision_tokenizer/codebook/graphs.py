"""Encoding by CUDA graphs: the thousand kernels of a batch are recorded once for its shape and then launched as one.

Launching them one by one takes Python, and a lock that decoding threads want, too. Batches have one fixed shape for
each resolution, which is what a recording needs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vision_tokenizer.images.dualvitok import normalize
from vision_tokenizer.models.protocol import ImageTokenizer
from vistoken.errors import UserError


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    pixels: Tensor  # where the kernels read the batch
    codes: tuple[Tensor, ...]  # and where they write: valid until the next replay


class Recordings:
    """What a tokenizer does with batches of the shapes that have come, all in the same memory."""

    def __init__(self, tokenizer: ImageTokenizer):
        self._tokenizer, self._device = tokenizer, tokenizer.device
        self._stream = torch.cuda.Stream(self._device)
        self._memory = torch.cuda.graph_pool_handle()
        self._made: dict[tuple[torch.dtype, torch.Size], Recording] = {}

    def encode(self, batch: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) pixels in pinned memory -> codes of each branch, to be copied before the next call."""
        key = batch.dtype, batch.shape
        if key not in self._made:
            self._made[key] = self._record(batch)
        recording = self._made[key]
        recording.pixels.copy_(batch, non_blocking=True)
        recording.graph.replay()
        return recording.codes

    def _record(self, batch: Tensor) -> Recording:
        pixels, current = batch.to(self._device), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._tokenizer.encode(normalize(pixels))  # what is made once, such as workspaces, is not recorded
        graph = torch.cuda.CUDAGraph()
        # only this thread records: those that decode may allocate meanwhile
        with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
            codes = self._tokenizer.encode(normalize(pixels))
        current.wait_stream(self._stream)
        return Recording(graph, pixels, codes)


def check_graphs(wanted: bool, device: torch.device) -> None:
    """Raises `UserError` where CUDA graphs are asked for without a GPU."""
    if wanted and device.type != "cuda":
        raise UserError(f"--cuda_graphs needs a GPU, and this runs on {device}: leave the flag out")
