"""Metadata beside a corpus: document i of PREFIX.meta stands before document i of PREFIX."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_cli import invoke
from trainer.data import blocks, documents
from trainer.data.corpus import read_sidecar
from trainer.data.indexed import IndexedReader
from trainer.data.metadata import MetadataOptions
from trainer.data.prepare import PrepareOptions, PrepareReport, prepare
from trainer.data.tokenizer import BytesTokenizer

RECORDS = [
    {"text": f"text {n}\n" * (1 + n % 5)} | ({"url": f"https://site-{n}.org/{n}"} if n % 3 else {})
    for n in range(90)
]


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def run(folder: Path, *inputs: str, key: str = "url", template: str = "", **more: Any) -> PrepareReport:
    metadata = MetadataOptions(key, template)
    return prepare(PrepareOptions(inputs, str(folder / "out"), metadata=metadata, **more))


def texts(prefix: Path) -> list[str]:
    reader = IndexedReader(prefix)
    return [BytesTokenizer().decode(reader[n]) for n in range(len(reader))]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_records(tmp_path / "in.jsonl", RECORDS)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_document_keeps_its_metadata(
    tmp_path: Path, lines: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 256)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    report = run(tmp_path, lines, workers=workers, validation_share=0.3)
    found = [
        pair
        for name in ("out", "out-validation")
        for pair in zip(texts(tmp_path / name), texts(tmp_path / f"{name}.meta"), strict=True)
    ]
    expected = [(one["text"], f"url: {one['url']}\n\n" if "url" in one else "") for one in RECORDS]
    assert sorted(found) == sorted(expected)
    assert report.validation_documents > 0
    assert (report.documents, report.with_metadata) == (90, 60)


def test_the_corpus_itself_is_that_without_metadata(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines)
    prepare(PrepareOptions((lines,), str(tmp_path / "plain")))
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"out{suffix}").read_bytes() == (tmp_path / f"plain{suffix}").read_bytes()
    assert not (tmp_path / "plain.meta.idx").exists()


def test_the_sidecar_says_how_it_was_written(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines, template=r"URL: {domain}\n\n")
    assert texts(tmp_path / "out.meta")[1] == "URL: site-1.org\n\n"
    made = read_sidecar(str(tmp_path / "out.meta"))
    assert made is not None
    assert (made.documents, made.template) == (90, "URL: {domain}\n\n")


def test_files_have_their_path(tmp_path: Path) -> None:
    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "code" / "deep" / "one.py").write_text("print(1)\n")
    (tmp_path / "two.txt").write_text("two\n")
    run(tmp_path, str(tmp_path / "code"), str(tmp_path / "two.txt"), key="path", template="# {}\\n")
    assert texts(tmp_path / "out.meta") == ["# deep/one.py\n", "# two.txt\n"]


@pytest.mark.parametrize(
    ("record", "rendered"),
    [
        ({"meta": {"url": "a"}}, "<a>"),
        ({"meta.url": "b", "meta": {"url": "a"}}, "<b>"),
        ({"meta": {"url": 7}}, "<7>"),
        ({"meta": {"url": True}}, "<true>"),
        ({"meta": {"url": "  "}}, ""),
        ({"meta": {"url": None}}, ""),
        ({"meta": {"url": ["a"]}}, ""),
        ({"meta": {"url": "\ud800"}}, ""),
        ({"meta": "url"}, ""),
        ({}, ""),
    ],
)
def test_what_a_record_has(record: dict[str, Any], rendered: str) -> None:
    options = MetadataOptions("meta.url", "<{}>")
    assert options.render(options.value_of(record)) == rendered


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("https://En.wikipedia.org:443/wiki", "en.wikipedia.org"),
        ("no url", "no url"),
        ("http://[", "http://["),
    ],
)
def test_the_domain_of_a_url(value: str, host: str) -> None:
    assert MetadataOptions("url", "{domain}|{}").render(value) == f"{host}|{value}"


def test_a_value_that_looks_like_a_template_stays(tmp_path: Path) -> None:
    assert MetadataOptions("k", "{}-{domain}").render("{domain}{}") == "{domain}{}-{domain}{}"


def test_a_key_that_no_record_has_is_refused(tmp_path: Path, lines: str) -> None:
    with pytest.raises(ValueError, match="none of the 90 documents has the metadata 'source'"):
        run(tmp_path, lines, key="source")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("template", ["URL:", " "])
def test_a_template_without_a_place_for_the_value_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="has neither"):
        MetadataOptions("url", template)


def test_metadata_of_replaced_documents_is_not_left_behind(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines)
    with pytest.raises(ValueError, match=r"out\.meta\.\* belongs to what was prepared here before"):
        prepare(PrepareOptions((lines,), str(tmp_path / "out"), overwrite=True))
    run(tmp_path, lines, overwrite=True)


def test_metadata_that_is_there_is_not_overwritten(tmp_path: Path, lines: str) -> None:
    run(tmp_path, lines)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"out{suffix}").unlink()
    with pytest.raises(ValueError, match=r"already there: .*out\.meta\.bin"):
        run(tmp_path, lines)


def test_the_command(tmp_path: Path, lines: str) -> None:
    template = ["--metadata", "url", "--metadata-template", r"URL: {domain}\n\n"]
    shown = invoke("prepare", lines, "--output", str(tmp_path / "out"), "--workers", "2", *template)
    tokens = sum(len(f"URL: site-{n}.org\n\n") for n in range(90) if n % 3)
    assert f"60 documents, {tokens:,} tokens; 30 have none" in shown
    assert 'kind = "metadata"' in shown
    assert texts(tmp_path / "out.meta")[2] == "URL: site-2.org\n\n"
