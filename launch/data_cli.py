"""`ratoon data`: prepare corpora, train tokenizers, look inside. Heavy imports are inside the commands."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from launch.errors import FAILED, ReportingGroup, show_error

if TYPE_CHECKING:
    from trainer.data.prepare import PrepareOptions

app = typer.Typer(
    name="data",
    cls=ReportingGroup,
    help="Prepare corpora, train tokenizers, look inside.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

INPUTS_HELP = (
    "Files or folders: .txt, .md and source code (one document a file), .jsonl (one a line); "
    "each also as .gz or .zst."
)
InputsArgument = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help=INPUTS_HELP, show_default=False)
]
TextKeyOption = Annotated[str, typer.Option(metavar="KEY", help="Where a JSON line has its text.")]
SuffixOption = Annotated[
    list[str] | None,
    typer.Option(
        "--suffix",
        metavar="SUFFIX",
        help="Take only such files from folders, as in .py; read files of such a name as text. May be "
        "repeated.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
MetadataOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Also write PREFIX.meta: this field of every JSON line, to stand before its text; of other "
        "files, path.",
        show_default=False,
    ),
]
MetadataTemplateOption = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="How it stands there: {} is the value, {domain} the host of a URL, \\n a line break. By "
        "default KEY: {}\\n\\n",
        show_default=False,
    ),
]
TOKENIZER_HELP = "bytes, a tokenizer.json, a folder that has one, or a SentencePiece .model."
EodOption = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN", help="Token that ends a document; by default the one the tokenizer declares."
    ),
]


@app.command()
def prepare(
    inputs: InputsArgument,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PREFIX", help="Write PREFIX.bin, .idx and .json.")
    ],
    tokenizer: Annotated[str, typer.Option(metavar="T", help=TOKENIZER_HELP)] = "bytes",
    eod: EodOption = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes; by default one a core.", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad record.")] = False,
    text_key: TextKeyOption = "text",
    suffix: SuffixOption = None,
    validation_share: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of the documents to hold out in PREFIX-validation, as in 0.01."
        ),
    ] = 0.0,
    metadata: MetadataOption = None,
    metadata_template: MetadataTemplateOption = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Turn text into Megatron's .bin and .idx.

    Bad records (invalid JSON or UTF-8, no text) are skipped and counted.

    The bytes are the same for any number of workers. Files appear when they are whole.
    """
    from launch.environment import count_cores
    from trainer.data.config import without_extension
    from trainer.data.metadata import MetadataOptions
    from trainer.data.prepare import PrepareOptions

    if metadata_template and not metadata:
        raise ValueError("--metadata-template needs --metadata KEY: the field that it is to write")
    _prepare(
        PrepareOptions(
            inputs=tuple(inputs),
            output=without_extension(output),
            tokenizer=tokenizer,
            eod=eod,
            text_key=text_key,
            suffixes=tuple(suffix or ()),
            workers=workers or count_cores(),
            strict=strict,
            validation_share=validation_share,
            overwrite=overwrite,
            metadata=MetadataOptions(metadata, metadata_template) if metadata is not None else None,
        )
    )


def _prepare(options: PrepareOptions) -> None:
    from launch.data_report import DataProgress, print_prepared
    from trainer.data.prepare import BadRecordError, prepare

    if options.workers > 1:  # each worker is one thread: theirs times the tokenizer's would be too many
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _cleaning_up_on_sigterm(), DataProgress() as progress:
            report = prepare(options, progress.update)
    except BadRecordError as error:
        hint = "Nothing was written. Mend the record, or leave --strict out to skip and count bad records."
        show_error("Bad record", f"{error}\n{hint}")
        raise typer.Exit(FAILED) from None
    print_prepared(report, options)


@contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, as batch systems send it, end the work as Ctrl-C does: nothing half-written stays."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command("train-tokenizer")
def train_tokenizer(
    inputs: InputsArgument,
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Ids in all, the 256 bytes included.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The tokenizer.json to write.")
    ],
    text_key: TextKeyOption = "text",
    suffix: SuffixOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a byte-level BPE tokenizer on text."""
    from launch.data_report import DataProgress, print_trained_tokenizer
    from trainer.data.train_tokenizer import train_bpe

    if Path(output).exists() and not overwrite:
        raise ValueError(f"{output} exists already; choose another output or pass --overwrite")
    with DataProgress() as progress:
        report = train_bpe(
            inputs,
            output,
            vocab_size=vocab_size,
            text_key=text_key,
            suffixes=suffix or (),
            on_progress=progress.update,
        )
    print_trained_tokenizer(report, output, vocab_size)


@app.command("inspect")
def inspect_corpus(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Of PREFIX.bin and PREFIX.idx.")],
    documents: Annotated[int, typer.Option(min=0, metavar="N", help="Documents to show.")] = 3,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="T", help="Decode with this one.", show_default=False)
    ] = None,
    eod: EodOption = None,
) -> None:
    """Show what a prepared corpus holds: counts, lengths, tokenizer, first documents."""
    from launch.data_report import print_preview, print_summary
    from trainer.data.config import without_extension
    from trainer.data.summary import preview, summarise, tokenizer_of

    prefix = without_extension(prefix)
    summary = summarise(prefix)
    print_summary(summary)
    if documents:
        print_preview(preview(prefix, documents, 400), tokenizer_of(summary.sidecar, tokenizer, eod))


@app.command("demo")
def demo_corpora(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="For the corpora and their tokenizer.")],
    overwrite: OverwriteOption = False,
) -> None:
    """Write the small corpora that the recipes run on: see `ratoon recipe`.

    From what Python and torch bring along: prose, code, C++ headers, and some made of these. Downloads
    nothing, and takes a few seconds.
    """
    from launch.demo.corpora import show_demo_corpora

    show_demo_corpora(folder, overwrite=overwrite)


@app.command("ledger")
def ledger(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A run file, a run's or a stage's folder, or a checkpoint.",
            show_default=False,
        ),
    ],
    segments: Annotated[
        bool, typer.Option("--segments", help="Also the shares of every stretch of constant terms.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what a run has read: documents, tokens, epochs, shares asked and realised.

    Of its newest checkpoint, exactly: over all stages and restarts, whatever the layout.
    """
    from launch.data_ledger import show_ledger

    show_ledger(run, as_json=as_json, segments=segments)
