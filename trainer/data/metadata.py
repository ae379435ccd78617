"""What stands before a document: its metadata, written by a template (MeCo, arXiv 2501.01956, section 2)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

METADATA = ".meta"
"""PREFIX.meta.bin and .idx: document i of them is the metadata of document i of PREFIX."""
VALUE, DOMAIN = "{}", "{domain}"
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
FILE_PATH = "path"
"""The key that a file which is one document has: its path, as seen from the folder that was named."""


@dataclass(frozen=True)
class MetadataOptions:
    """`--metadata KEY` and `--metadata-template`.

    Attributes:
        key: where a JSON line has it; "a.b" also means the field b of the field a. A file that is one
            document has `FILE_PATH` only.
        template: what stands before the text; `VALUE` in it becomes the value, `DOMAIN` the host of a value
            that is a URL. \\n and \\t stand for a line break and a tab. Empty: "KEY: {}\\n\\n".
    """

    key: str
    template: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError("metadata key is empty; name the field that has the metadata")
        if VALUE not in self.pattern and DOMAIN not in self.pattern:
            raise ValueError(
                f"metadata template {self.template!r} has neither {VALUE} nor {DOMAIN}, so it would say the "
                "same of every document; put one where the value is to stand"
            )

    @property
    def pattern(self) -> str:
        """The template with its line breaks."""
        written = self.template or f"{self.key}: {VALUE}\\n\\n"
        return written.replace("\\n", "\n").replace("\\t", "\t")

    def value_of(self, record: Mapping[str, Any]) -> str:
        """The value in a JSON record; empty where it is missing or no text, number or boolean."""
        found: Any = record.get(self.key)
        if self.key not in record:
            found = record
            for part in self.key.split("."):
                found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, bool | int | float):
            return json.dumps(found)
        if not isinstance(found, str) or HALF_CHARACTER.search(found):
            return ""
        return found

    def render(self, value: str) -> str:
        """What stands before a document with this value; nothing where it has none."""
        value = value.strip()
        if not value:
            return ""
        written = {VALUE: value, DOMAIN: _host(value)}
        return re.sub(r"\{(domain)?\}", lambda place: written[place[0]], self.pattern)


def _host(value: str) -> str:
    """The host of a URL; the value itself where it is none."""
    try:
        return urlsplit(value).hostname or value
    except ValueError:
        return value
