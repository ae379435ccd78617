"""The claims about runs on Markov chains, and whose they are."""

from __future__ import annotations

from statistics import fmean

from tools.continual_table.arm import CONDITIONED
from tools.continual_table.claims import Claim, mean_loss
from tools.continual_table.domains import CHAINS, MIXED, entropy
from tools.continual_table.outcome import Seed


def velocities(seed: Seed, arm: str) -> dict[str, float]:
    """What is left of the way to Velocitune's targets at the end, by source: 1 at the start, 0 there."""
    start = {name: seed["velocitune"].curves["velocitune"][name][0][1] for name in CHAINS}
    end, goal = seed[arm].end, entropy()
    return {name: (end[name] - goal) / (start[name] - goal) for name in CHAINS}


def _spread(seed: Seed, arm: str) -> float:
    found = velocities(seed, arm).values()
    return max(found) - min(found)


def _slowest_share(seed: Seed) -> float:
    found = velocities(seed, "equal")
    return seed["velocitune"].mean_shares[max(found, key=lambda name: found[name])] - 1.0 / len(CHAINS)


PACE_CLAIMS = [
    Claim(
        "Velocitune",
        "sources come nearer to the same pace (Luo et al., 2411.14318)",
        "spread of V (no unit), less that of equal shares",
        lambda s: _spread(s, "velocitune") - _spread(s, "equal"),
        "below 0",
    ),
    Claim(
        "Velocitune",
        "the slowest source gets more (2411.14318)",
        "its mean share, less a third",
        _slowest_share,
        "above 0",
    ),
    Claim(
        "Velocitune",
        "lower losses at equal tokens (2411.14318)",
        "mean loss of the sources, less that of equal shares",
        lambda s: mean_loss(s["velocitune"], tuple(CHAINS)) - mean_loss(s["equal"], tuple(CHAINS)),
        "below 0",
    ),
]


def _training_difference(seed: Seed) -> float:
    """Over the last third of the text that is read with names, and over the same text without."""
    read = seed["metadata"].training["names"]
    plain = seed["domains"].training["domains"]
    plain = plain[: round(CONDITIONED * len(plain))]
    return fmean(read[-len(read) // 3 :]) - fmean(plain[-len(plain) // 3 :])


METADATA_CLAIMS = [
    Claim(
        "MeCo: its domain before every document",
        "makes the text easier to tell (Gao et al., 2501.01956)",
        "training loss with names of domains, less that of plain text",
        _training_difference,
        "below 0",
    ),
    Claim(
        "MeCo: its domain before every document",
        "after the cooldown plain text is no worse, at equal text (2501.01956)",
        "loss on domains, less that of plain text alone",
        lambda s: s["metadata"].end[MIXED] - s["domains"].end[MIXED],
        "below 0",
    ),
    Claim(
        "MeCo: its domain before every document",
        "and without the cooldown it is worse (2501.01956)",
        "loss on domains without the cooldown, less that with it",
        lambda s: s["metadata-hot"].end[MIXED] - s["metadata"].end[MIXED],
        "above 0",
    ),
]
