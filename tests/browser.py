"""Reports in headless Chromium; tests that need it are skipped where there is none."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
_QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run", "--hide-scrollbars")


def browse(page: Path, profile: Path, *more: str) -> str:
    """Load a page and return the document as the browser has it."""
    command = [CHROMIUM, "--headless", "--no-sandbox", *_QUIET, f"--user-data-dir={profile}", *more, "--dump-dom"]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


def screenshot(page: Path, profile: Path, out: Path, *, dark: bool, width: int) -> Path:
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, "--headless", "--no-sandbox", *_QUIET, f"--user-data-dir={profile}", theme]
    command += [f"--window-size={width},1600", f"--screenshot={out}", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    return out


def section_names(document: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', document)
