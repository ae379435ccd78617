"""How large the demo is, which two ways it compares, on how many ranks and in which layouts, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from parallel.layout import Layout

VOCABULARY = 1024
NUM_LAYERS = 4
RANKS = (1, 2, 4, 8)
"""Numbers of ranks that the demo has layouts for."""
STAGES = ("prose", "code")
"""Names of the two stages of a run, of what is new in each, and of the held-out sets: the old and the new."""


@dataclass(frozen=True)
class Way:
    """A way to go on with code.

    Attributes:
        name: of the run, its folder and its run file.
        short, label: for people.
        replay: share of the sequences in the second stage that are prose.
    """

    name: str
    short: str
    label: str
    replay: float


REWARM = Way("rewarm", "re-warm", "re-warm, 0% replay", 0.0)
INFINITE = Way("infinite", "infinite", "infinite, 10% replay", 0.1)
WAYS = (REWARM, INFINITE)


@dataclass(frozen=True)
class Size:
    """How much work it is. Both ways take as many steps, and so as many tokens.

    Attributes:
        first_steps: of the stage on prose.
        second_steps: of the stage on code, on top of them.
        warmup_steps: of each schedule.
        cooldown_steps, anneal_steps: of the infinite schedule.
        eval_batches: global batches that are read of each held-out set.
    """

    first_steps: int
    second_steps: int
    warmup_steps: int
    cooldown_steps: int
    anneal_steps: int
    eval_batches: int


FULL = Size(
    first_steps=160,
    second_steps=120,
    warmup_steps=10,
    cooldown_steps=80,
    anneal_steps=40,
    eval_batches=6,
)
FAST = Size(first_steps=6, second_steps=4, warmup_steps=1, cooldown_steps=2, anneal_steps=2, eval_batches=1)


@dataclass(frozen=True)
class Plan:
    """One demo from beginning to end.

    Attributes:
        folder: absolute; everything goes there.
        layouts: of the first and the second stage.
        gpu: every rank has a GPU.
        record_every: steps between two records of a run.
        seed: of the weights and of the order of the documents.
    """

    folder: Path
    ranks: int
    layouts: tuple[Layout, Layout]
    gpu: bool
    size: Size
    record_every: int
    seed: int

    @property
    def data(self) -> Path:
        """Folder of the text and what is prepared from it."""
        return self.folder / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json that is trained on that text."""
        return self.data / "tokenizer.json"

    @property
    def picture(self) -> Path:
        """The PNG that compares the two ways."""
        return self.folder / "forgetting.png"

    def run_file(self, way: Way) -> Path:
        """The run file of both stages."""
        return self.folder / f"{way.name}.toml"

    def run_folder(self, way: Way) -> Path:
        """What the run leaves: a folder for each stage, and the report on forgetting."""
        return self.folder / way.name

    def layout_name(self, stage: int) -> str:
        """The degrees of a stage's layout, such as TP2 x PP2 x DP1."""
        layout = self.layouts[stage]
        return f"TP{layout.tensor} x PP{layout.pipeline} x DP{layout.data(self.ranks)}"

    @property
    def precision(self) -> str:
        """bf16 on GPUs, fp32 on the CPU."""
        return "bf16" if self.gpu else "fp32"


def choose_ranks(ranks: int | None, gpus: int) -> int:
    """What was asked for, else one rank a GPU, at most 4, else 4 on the CPU.

    Raises:
        ValueError: the demo has no layouts for so many.
    """
    if ranks is None:
        return max(count for count in RANKS if count <= min(gpus or 4, 4))
    if ranks not in RANKS:
        raise ValueError(f"--ranks {ranks}: the demo has layouts for {', '.join(map(str, RANKS))} ranks")
    return ranks


def choose_layouts(ranks: int) -> tuple[Layout, Layout]:
    """Two layouts that differ where there is more than one rank; data parallelism takes what is left over."""
    two, four = (2 if ranks >= least else 1 for least in (2, 4))
    return Layout(tensor=two, pipeline=four), Layout(tensor=1, pipeline=two)


def choose_folder(wanted: Path) -> Path:
    """`wanted` where it is new or empty, else the first of 2, 3, ... that is free inside it.

    Raises:
        ValueError: it is a file.
    """
    wanted = wanted.absolute()
    if wanted.is_file():
        raise ValueError(f"--dir {wanted} is a file: name a folder")
    if not wanted.exists() or not any(wanted.iterdir()):
        return wanted
    number = 2
    while (wanted / str(number)).exists():
        number += 1
    return wanted / str(number)
