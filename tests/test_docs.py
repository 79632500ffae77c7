"""The documents say what the code does."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from authsvc.config import Settings
from benches.picture import FIGURES, PICTURE, WAYS, draw

ROOT = Path(__file__).parents[1]


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        variable = "AUTHSVC_" + f"{prefix}{name}".replace(".", "__").upper()
        default = "" if field.default in (None, "", ()) or field.default_factory else field.default
        if name == "state_dir":
            default = "$XDG_STATE_HOME/authsvc"
        if isinstance(default, tuple):
            default = ", ".join(default)
        shown = f"`{default}`" if default != "" else ""
        yield f"| `{prefix}{name}` | `{variable}` | {shown} | {field.description or ''} |"


def test_settings_table_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    found = re.findall(r"^\| `.*AUTHSVC_.*$", text, re.MULTILINE)
    assert found == list(rows(Settings))


def test_picture_is_drawn_from_the_figures_beside_it() -> None:
    line = json.loads(FIGURES.read_text())
    assert PICTURE.read_text() == draw(line)
    line["ways"]["local"]["cpu_us"] *= 2
    assert PICTURE.read_text() != draw(line)
    assert line["ways"].keys() == WAYS.keys()


def test_every_link_of_a_document_leads_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (document, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text())
        if "://" not in target
    ]
    assert links
    broken = [f"{doc.name}: {to}" for doc, to in links if not (doc.parent / to).exists()]
    assert not broken


def test_every_make_target_in_a_document_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        target
        for document in documents
        for target in re.findall(r"`make ([a-z-]+)", document.read_text())
    }
    assert named
    assert named <= targets
