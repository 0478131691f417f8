"""HTML reports as trees, and in headless Chromium; tests that need the browser are skipped where there is none."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

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


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.builder = ElementTree.TreeBuilder()

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in ("meta", "img", "br", "link"):
            self.builder.end(tag)

    def handle_endtag(self, tag):
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


def parse(document: str) -> ElementTree.Element:
    """The <html> element; its tags must nest properly."""
    tree = _Tree()
    tree.feed(document)
    return tree.builder.close()


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def section_names(document: str) -> list[str]:
    return [section.get("id") for section in parse(document).iter("section")]


def facts(element: ElementTree.Element) -> dict[str, str]:
    """Label -> value of the large numbers below an element."""
    tiles = [tile for tile in element.iter("div") if tile.get("class") == "tiles"]
    return {cell.findtext("span"): cell.findtext("b") for cell in tiles[0]}


def pairs(element: ElementTree.Element) -> list[ElementTree.Element]:
    """The figures of an original beside its reconstruction."""
    return [figure for figure in element.iter("figure") if figure.get("class", "").startswith("pair")]


def shown(pair: ElementTree.Element) -> list[str]:
    """What each picture of a pair is said to be; its content must be in the page."""
    images = list(pair.iter("img"))
    assert all(image.get("src").startswith("data:image/webp;base64,") for image in images)
    return [image.get("alt") for image in images]
