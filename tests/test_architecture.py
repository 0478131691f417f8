"""The house stands: imports only go down, no folder hides a package, and the documents say what is there."""

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("vistoken", "vision_tokenizer", "pre_tokenize", "training")  # from the ground up
MODULES = sorted(path.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


def imported(module: Path) -> set[str]:
    """The top-level packages that a module imports anywhere, in its functions, too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=FLOORS)
def test_imports_only_go_down(floor):
    above = set(FLOORS[floor + 1 :])
    modules = [module for module in MODULES if module.parts[0] == FLOORS[floor]]
    assert modules and not {str(module): imported(module) & above for module in modules if imported(module) & above}


def test_no_folder_or_module_hides_a_package():
    """The documents put these folders on sys.path: by `cd vision_tokenizer` and PYTHONPATH, or as a script's folder."""
    packages = {*sys.stdlib_module_names, *packages_distributions()} - set(FLOORS)
    for folder in ("vision_tokenizer", "vision_tokenizer/tokenizer", "pre_tokenize", "training", "exps"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.is_dir() or path.suffix == ".py"}
        assert not names & packages - {"__init__", "__pycache__"}, folder


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_every_page_has_an_index_line():
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {page for page in pages if f"]({page})" not in index}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    for link in (link for link in links if "://" not in link):
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@cache
def anchors(page: Path) -> set[str]:
    """The names that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_architecture_names_what_is_there():
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    folders: list[str] = []
    for line in tree.strip().splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            folders[indent:] = [name]
            assert (ROOT / "/".join(folders)).exists(), line
