"""Images to discrete codes and back."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_tokenizer` on first use: importing the package must not take the time that importing torch takes."""
    if name == "load_tokenizer":
        from vision_tokenizer.api import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
