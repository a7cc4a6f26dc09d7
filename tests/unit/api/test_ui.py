"""The page's files: small, of this device alone, and nothing that a strict policy forbids."""

import gzip
import re
from pathlib import Path

import pytest

from agentd.api.app import UI
from agentd.api.ui import FOLDER

FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
TOTAL = 60_000  # bytes of all files together, as a browser gets them


def test_the_page_is_small() -> None:
    assert sum(len(gzip.compress(path.read_bytes(), 6)) for path in FILES) <= TOTAL // 2
    assert sum(path.stat().st_size for path in FILES) <= 80_000


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_users_wrote_can_never_become_html(path: Path) -> None:
    text = path.read_text()
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc|DOMParser", text
    )
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?://|@import|url\(|//cdn", text)


def test_every_module_that_is_asked_for_is_there() -> None:
    names = {path.name for path in FILES}
    for path in SCRIPTS:
        assert set(re.findall(r'from "\./([\w.]+)"', path.read_text())) <= names
    asked = re.findall(r'(?:href|src)="([\w.]+)"', (FOLDER / "index.html").read_text())
    assert asked
    assert set(asked) <= names


def test_the_document_has_no_inline_script_or_style() -> None:
    text = (FOLDER / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text)


def test_the_page_is_served_to_everybody_and_nothing_else_is() -> None:
    assert all(getattr(route, "scope", None) is not None for route in UI)
    assert {getattr(route, "path", "") for route in UI} == {"/ui", "/ui/", "/ui/session", "/ui/{name}"}
