"""The claims about replay, schedules and controllers, and whose they are."""

from __future__ import annotations

from tools.continual_table.arm import NEW, OLD, REPLAY, STATIC, THIRD, TOLERANCE
from tools.continual_table.claims import (
    Claim,
    Sign,
    forgotten,
    gap_of,
    least_step,
    mean_loss,
    new_loss,
    peak,
)
from tools.continual_table.outcome import Seed

LADDER = tuple(REPLAY)
FORGOTTEN, NEW_LOSS = "forgetting of prose", "loss on code"


def forgets(method: str, says: str, arm: str, than: str, sign: Sign = "below 0", of: str = "") -> Claim:
    """The forgetting of one arm against another's."""
    number = f"{FORGOTTEN}, less that of {SHORT.get(than, than)}"
    return Claim(
        method, says, number, lambda s: forgotten(s, arm, of=of) - forgotten(s, than), sign, "forgetting"
    )


def learns(method: str, says: str, arm: str, than: str, sign: Sign = "above 0", of: str = "") -> Claim:
    """The loss on code of one arm against another's."""
    number = f"{NEW_LOSS}, less that of {SHORT.get(than, than)}"
    return Claim(method, says, number, lambda s: new_loss(s, arm, of=of) - new_loss(s, than), sign, "new")


SHORT = {
    "plain": "code alone",
    "replay-5": "5 % replay alone",
    "replay-25": "25 % from the corpus",
    "replay-reservoir": "the reservoir alone",
    "no-rewarm": "no re-warm",
    "static": "equal shares",
}
"""How an arm is called in a sentence."""

REPLAY_CLAIMS = [
    Claim(
        "replay of 0, 5, 25, 50 %",
        "forgetting falls strictly (Ibrahim et al., 2403.08763)",
        f"least fall of the {FORGOTTEN} from one share to the next",
        lambda s: least_step([-forgotten(s, arm) for arm in LADDER]),
        "above 0",
        "forgetting",
    ),
    learns("replay of 50 %", "the new domain pays for it (2403.08763)", "replay-50", "plain"),
    forgets(
        "replay of 25 % from the ledger",
        "as from the corpus, when it was read to the end",
        "replay-ledger",
        "replay-25",
        "within noise",
    ),
    forgets(
        "replay of 25 % from a reservoir",
        "as from the corpus",
        "replay-reservoir",
        "replay-25",
        "within noise",
    ),
]

SCHEDULE_CLAIMS = [
    learns(
        "re-warm and re-decay",
        "learns more than at the floor (2403.08763)",
        "plain",
        "no-rewarm",
        "below 0",
    ),
    forgets("re-warm and re-decay", "and forgets more (2403.08763)", "plain", "no-rewarm", "above 0"),
    Claim(
        "peak of 0.1, 0.3, 1 x the old one",
        "a higher peak forgets more (2403.08763)",
        f"least rise of the {FORGOTTEN} from one peak to the next",
        lambda s: least_step([forgotten(s, arm) for arm in ("no-rewarm", "peak-third", "plain")]),
        "above 0",
        "forgetting",
    ),
    Claim(
        "re-warm on new data",
        "the old loss rises first (Gupta et al., 2308.04014)",
        "depth of the gap of prose",
        lambda s: gap_of(s["plain"], OLD, "plain").depth,
        "above 0",
        "forgetting",
    ),
    Claim(
        "re-warm on new data",
        "and so does the new one (2308.04014)",
        "depth of the gap of code",
        lambda s: gap_of(s["plain"], NEW, "plain").depth,
        "above 0",
        "new",
    ),
    Claim(
        "re-warm on the old data",
        "the loss rises first (2308.04014)",
        "depth of the gap of prose",
        lambda s: gap_of(s["only-replay"], OLD, "only-replay").depth,
        "above 0",
        "forgetting",
    ),
    Claim(
        "re-warm on the old data",
        "and comes back (2308.04014)",
        "prose at the end, less at the start",
        lambda s: forgotten(s, "only-replay"),
        "below 0",
        "forgetting",
    ),
    Claim(
        "stability gap under replay",
        "more replay, a shallower gap (Guo et al., 2406.14833)",
        "least fall of its depth over 0, 5, 25, 50, 100 %",
        lambda s: least_step([-gap_of(s[arm], OLD, arm).depth for arm in (*LADDER, "only-replay")]),
        "above 0",
        "forgetting",
    ),
]


def _peak_difference(seed: Seed, name: str, stage: str, cosine: str) -> float:
    return peak(seed["infinite"].curves[stage][name]) - peak(seed[cosine].curves[cosine][name])


def _against_cosine(what: str, name: str, stage: str, cosine: str) -> Claim:
    return Claim(
        "infinite schedule",
        "beats repeated cosines (Singh et al., 2503.02844)",
        f"peak of {what}, less that under cosines",
        lambda s: _peak_difference(s, name, stage, cosine),
        "below 0",
        "forgetting",
    )


INFINITE_CLAIMS = [
    _against_cosine("prose in the stage on code", OLD, NEW, "plain"),
    _against_cosine("prose in the stage on C++", OLD, THIRD, "cosine-third"),
    _against_cosine("code in the stage on C++", NEW, THIRD, "cosine-third"),
    Claim(
        "infinite schedule",
        "and at the end (2503.02844)",
        "mean loss of prose, code, C++, less that under cosines",
        lambda s: (
            mean_loss(s["infinite"], (OLD, NEW, THIRD)) - mean_loss(s["cosine-third"], (OLD, NEW, THIRD))
        ),
        "below 0",
        "forgetting",
    ),
]


CONTROLLER_CLAIMS = [
    Claim(
        "Skill-it",
        "lower losses at equal tokens (Chen et al., 2307.14430)",
        "mean loss of the sources, less that of equal shares",
        lambda s: mean_loss(s["skillit"], tuple(STATIC)) - mean_loss(s["static"], tuple(STATIC)),
        "below 0",
        "new",
    ),
    Claim(
        "raise_replay from 5 %",
        f"keeps the old loss within its tolerance of {TOLERANCE}",
        f"{FORGOTTEN}, less {TOLERANCE}",
        lambda s: forgotten(s, "raise-replay") - TOLERANCE,
        "below 0",
        "forgetting",
    ),
    forgets("raise_replay from 5 %", "forgets less than fixed shares", "raise-replay", "replay-5"),
    Claim(
        "raise_replay from 5 %",
        "while the new loss falls",
        "loss on code, less at the start",
        lambda s: new_loss(s, "raise-replay") - new_loss(s, "base"),
        "below 0",
        "new",
    ),
]
