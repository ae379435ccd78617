"""Which sources a pattern of a run file means."""

import pytest

from trainer.data.choice import choice_problems, is_chosen
from trainer.data.config import SourceConfig

SOURCES = [
    SourceConfig(name="web-de", path="a", group="web", tags={"language": "de", "year": 2024, "clean": True}),
    SourceConfig(name="web-en", path="b", group="web", tags={"language": "en", "clean": False}),
    SourceConfig(name="books", path="c", tags={"language": "de"}),
]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("books", ["books"]),
        ("web-*", ["web-de", "web-en"]),
        ("web", []),
        ("group:web", ["web-de", "web-en"]),
        ("group:*", ["web-de", "web-en"]),
        ("tag:language=de", ["web-de", "books"]),
        ("tag:language=*", ["web-de", "web-en", "books"]),
        ("tag:year=2024", ["web-de"]),
        ("tag:clean=true", ["web-de"]),
        ("tag:clean", ["web-de", "web-en"]),
        ("tag:clean=", []),
    ],
)
def test_what_a_pattern_means(pattern: str, names: list[str]) -> None:
    assert [source.name for source in SOURCES if is_chosen(source, [pattern])] == names


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("wbe-de", "'wbe-de', which is no source; [[data.sources]] has web-de, web-en, books"),
        ("group:wbe", "'group:wbe', which is no source; their groups are web"),
        ("tag:language=fr", "their tags are language=de, year=2024, clean=true, language=en, clean=false"),
    ],
)
def test_a_pattern_that_means_nothing_is_told_what_there_is(pattern: str, words: str) -> None:
    (found,) = choice_problems(["books", pattern], SOURCES)
    assert words in found
