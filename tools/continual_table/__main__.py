"""Every method of continual pre-training on small corpora: `python -m tools.continual_table`.

    python -m tools.continual_table [--seeds 1 2 3] [--update docs/continual.md] [--json FILE]

Makes the demo corpora, trains a tiny model on prose once a seed, lets every method go on from there, and
compares what came of it with what papers expect. Prints a table in Markdown; every number goes to the JSON
file. Takes two processes for about eleven minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.demo.corpora import demo_corpora
from tools.continual_table import bed
from tools.continual_table.arm import Arm, seed_folder
from tools.continual_table.bed import CORPORA, Bed, Size
from tools.continual_table.claims import Found, judge, measure_noise
from tools.continual_table.domains import MIXED, write_chains
from tools.continual_table.markdown import claim_table, replaced, run_table, summary
from tools.continual_table.methods import CLAIMS, arms
from tools.continual_table.outcome import Outcome, Seed, read_outcome
from tools.continual_table.running import Cost, run_all


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and write the table."""
    given = _parser().parse_args(arguments)
    document = given.update.read_text(encoding="utf-8") if given.update else None
    if document is not None:
        replaced(document, "")  # a document without the markers is refused before the work
    seeds, seconds = _outcomes(given)
    if given.only:
        return
    noise = measure_noise(list(seeds.values()))
    found = [judge(claim, [claim.value(seed) for seed in seeds.values()], noise) for claim in CLAIMS]
    table = text_of(found, list(seeds.values()), noise, seconds=seconds)
    print(table)
    tree = tree_of(found, seeds, noise) | {"seconds": seconds}
    given.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    if document is not None:
        given.update.write_text(replaced(document, table), encoding="utf-8")


def _outcomes(given: argparse.Namespace) -> tuple[dict[int, Seed], float]:
    """By seed, measured or read from a file, and the seconds that all of it took."""
    if given.read:
        tree = json.loads(given.read.read_text(encoding="utf-8"))
        return seeds_of(tree), tree["seconds"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="continual-table-") as scratch:
        size = bed.TINY if given.tiny else bed.FULL
        seeds = measure(given.folder or Path(scratch), given.seeds, size, given.only)
    return seeds, time.monotonic() - began


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="continual_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--update", type=Path, help="a document: what is between its two markers")
    parser.add_argument("--json", type=Path, default=Path("continual_table.json"), help="all numbers")
    parser.add_argument("--read", type=Path, help="no runs: the numbers of such a JSON file")
    parser.add_argument("--folder", type=Path, help="keep the runs there; by default they are removed")
    parser.add_argument("--only", nargs="*", default=[], help="names of runs, and no table: to try things")
    parser.add_argument("--tiny", action="store_true", help="a few steps: does it run?")
    return parser


def measure(folder: Path, seeds: Sequence[int], size: Size, only: Sequence[str] = ()) -> dict[int, Seed]:
    """Make the corpora in `folder` and run the arms of every seed; `only` some, with what they need."""
    data = folder / "data"
    if not (data / "tokenizer.json").exists():
        demo_corpora(data, CORPORA)
        write_chains(data, documents=size.documents, held_out=size.held_out)
    work = []
    share = metadata_share(data)
    for seed in seeds:
        place = Bed(data, seed_folder(folder.absolute(), seed), seed, size, share)
        work += [(place, arm) for arm in chosen(arms(place), only)]
    outcomes: dict[int, dict[str, Outcome]] = {seed: {} for seed in seeds}
    began = time.monotonic()

    def done(place: Bed, arm: Arm, cost: Cost) -> None:
        outcome = read_outcome(place.folder, arm.name, wall=cost.wall, cpu=cost.cpu)
        outcomes[place.seed][arm.name] = outcome
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in outcome.end.items())
        passed = time.monotonic() - began
        print(f"{passed:6.0f} s  seed {place.seed}  {arm.name:18} {losses}", file=sys.stderr, flush=True)

    run_all(work, done=done)
    order = [arm.name for _, arm in work]
    return {seed: {name: ran[name] for name in order if name in ran} for seed, ran in outcomes.items()}


def metadata_share(data: Path) -> float:
    """Tokens of the names of domains, for each token of their text."""
    from trainer.data.indexed import IndexedReader
    from trainer.data.metadata import METADATA

    prefix = str(data / MIXED)
    return IndexedReader(prefix + METADATA).num_tokens / IndexedReader(prefix).num_tokens


def chosen(every: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """All arms, or those called so and what they need.

    Raises:
        ValueError: there is no such arm.
    """
    by_name = {arm.name: arm for arm in every}
    if unknown := [name for name in only if name not in by_name]:
        raise ValueError(f"no run is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    wanted = list(only or by_name)
    for name in wanted:  # grows as it goes
        wanted += [need for need in by_name[name].needs if need not in wanted]
    return [arm for arm in every if arm.name in wanted]


def text_of(found: Sequence[Found], seeds: Sequence[Seed], noise: dict[str, float], *, seconds: float) -> str:
    """Both tables and what is to be said of them."""
    cpu = sum(outcome.cpu for seed in seeds for outcome in seed.values())
    count = sum(len(seed) for seed in seeds)
    cost = f"{count} runs took {seconds / 60:.1f} minutes, {cpu / 60:.1f} minutes of processor time."
    return "\n\n".join((summary(found, noise), claim_table(found), cost, run_table(seeds)))


def tree_of(found: Sequence[Found], seeds: dict[int, Seed], noise: dict[str, float]) -> dict[str, Any]:
    """Every number, for JSON."""
    return {
        "noise": noise,
        "claims": [
            {
                "method": one.claim.method,
                "expected": one.claim.says,
                "measured": one.claim.number,
                "sign": one.claim.sign,
                "values": dict(zip(map(str, seeds), one.values, strict=True)),
                "median": one.median,
                "holds": one.verdict,
            }
            for one in found
        ],
        "seeds": {
            str(seed): {name: asdict(outcome) for name, outcome in ran.items()} for seed, ran in seeds.items()
        },
    }


def seeds_of(tree: dict[str, Any]) -> dict[int, Seed]:
    """The outcomes that `tree_of` has written."""
    return {
        int(seed): {name: Outcome(**one) for name, one in ran.items()} for seed, ran in tree["seeds"].items()
    }


if __name__ == "__main__":
    main()
