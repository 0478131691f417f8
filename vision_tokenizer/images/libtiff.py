"""What libtiff says, caught: it prints by itself, without the name of the file, across the progress bar."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_said = threading.local()
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list


@_Handler
def _keep(module: bytes | None, form: bytes | None, arguments: int | None) -> None:
    text = ctypes.create_string_buffer(300)
    ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(len(text)), form, ctypes.c_void_p(arguments))
    messages = getattr(_said, "messages", None)
    if messages is not None:
        messages.append(text.value.decode(errors="replace").strip())


@cache
def _install() -> None:
    """Once per process. Where Pillow has no libtiff, or has it inside itself, there is nothing to do."""
    from PIL import _imaging

    try:
        library = ctypes.CDLL(_imaging.__file__)
        set_error, set_warning = library.TIFFSetErrorHandler, library.TIFFSetWarningHandler
        ctypes.CDLL(None).vsnprintf  # noqa: B018 (is it there?)
    except (OSError, AttributeError, TypeError):
        return
    for function in (set_error, set_warning):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_error(ctypes.cast(_keep, ctypes.c_void_p))
    set_warning(None)


@contextmanager
def messages() -> Iterator[list[str]]:
    """The errors that libtiff tells in this thread inside the block; its warnings are dropped."""
    _install()
    caught: list[str] = []
    _said.messages = caught
    try:
        yield caught
    finally:
        _said.messages = None
