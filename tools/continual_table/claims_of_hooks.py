"""The claims about losses, updates and slow weights, and whose they are."""

from __future__ import annotations

from tools.continual_table.arm import OLD, STRENGTHS
from tools.continual_table.claims import Claim, beside_front, forgotten, least_step, new_loss
from tools.continual_table.claims_of_data import FORGOTTEN, NEW_LOSS, forgets, learns
from tools.continual_table.outcome import Seed

LOSS_CLAIMS = [
    forgets(
        "KL to the start on replayed prose",
        "retains more than as much replay (Baichuan4-Finance, 2412.15270)",
        "kl-replay",
        "replay-5",
    ),
    Claim(
        "KL to the start on replayed prose",
        "no other source has a part in it (2412.15270)",
        "other sources that it was measured on (a number)",
        lambda s: float(len(set(s["kl-replay"].auxiliary_sources["kl"]) - {OLD})),
        "0",
    ),
    forgets(
        "KL to the start on code, no replay",
        "retains more (Li and Hoiem, 1606.09282; Jin et al., 2110.08534)",
        "kl-new",
        "plain",
    ),
    learns("KL to the start on code, no replay", "and the new domain pays (1606.09282)", "kl-new", "plain"),
    forgets("KL on both, 5 % replay", "retains more than replay alone (1606.09282)", "kl-all", "replay-5"),
    Claim(
        "z-loss of 1e-3",
        "log^2 Z falls (PaLM, 2204.02311)",
        "mean of log^2 Z over the last quarter, less that without",
        lambda s: s["z"].auxiliary["z"] - s["plain"].auxiliary["z"],
        "below 0",
    ),
]


def _falls(kind: str) -> Claim:
    return Claim(
        NAMES[kind],
        f"forgets less, the more the stronger ({SOURCES[kind]})",
        f"least fall of the {FORGOTTEN} from none to weak to strong to strongest",
        lambda s: least_step([-forgotten(s, arm) for arm in _strengths(kind)]),
        "above 0",
        "forgetting",
    )


def _rises(kind: str) -> Claim:
    return Claim(
        NAMES[kind],
        "and learns less, the less the stronger",
        f"least rise of the {NEW_LOSS} from none to weak to strong to strongest",
        lambda s: least_step([new_loss(s, arm) for arm in _strengths(kind)]),
        "above 0",
        "new",
    )


def _pays(kind: str) -> Claim:
    return learns(NAMES[kind], "and less than without, when strong enough", f"{kind}-strongest", "plain")


def _strengths(kind: str) -> tuple[str, ...]:
    return "plain", *(f"{kind}-{word}" for word in STRENGTHS)


NAMES = {"l2": "L2 to the start", "ewc": "EWC", "si": "SI"}
SOURCES = {
    "l2": "Kirkpatrick et al., 1612.00796",
    "ewc": "1612.00796",
    "si": "Zenke et al., 1703.04200",
}


def _against_l2(kind: str, says: str) -> Claim:
    return Claim(
        f"{NAMES[kind]}, strong",
        says,
        f"{NEW_LOSS}, less that of L2 at the same {FORGOTTEN}",
        lambda s: _beside_l2(s, f"{kind}-strong"),
        "below 0",
        "new",
    )


def _beside_l2(seed: Seed, arm: str) -> float:
    front = [(forgotten(seed, one), new_loss(seed, one)) for one in _strengths("l2")]
    return beside_front(front, (forgotten(seed, arm), new_loss(seed, arm)))


UPDATE_CLAIMS = [
    Claim(
        "freeze embedding and layer 0",
        "what is frozen stays, bit for bit",
        "1 where a frozen weight differs from the base's (a number)",
        lambda s: 0.0 if s["freeze"].frozen else 1.0,
        "0",
    ),
    Claim(
        "freeze embedding and layer 0",
        "and the loss falls all the same (RedWhale, 2408.11294)",
        "loss on code, less at the start",
        lambda s: new_loss(s, "freeze") - new_loss(s, "base"),
        "below 0",
        "new",
    ),
    forgets("freeze embedding and layer 0", "forgets less", "freeze", "plain"),
    *(claim(kind) for kind in NAMES for claim in (_falls, _rises, _pays)),
    _against_l2("ewc", "beats L2 (1612.00796); for pre-trained vision models the reverse (2203.17269)"),
    _against_l2("si", "beats L2, by little"),
]

SLOW_CLAIMS = [
    Claim(
        "EMA of 0.95, constant rate",
        "the average is better than the last weights (Izmailov et al., 1803.05407)",
        f"{NEW_LOSS} of the average, less that of the last weights",
        lambda s: new_loss(s, "constant-average", of=" (average)") - new_loss(s, "constant-average"),
        "below 0",
        "new",
    ),
    Claim(
        "EMA of 0.95, cosine",
        "no gain at the end of an annealed run",
        f"{NEW_LOSS} of the average, less that of the last weights",
        lambda s: new_loss(s, "plain-average", of=" (average)") - new_loss(s, "plain-average"),
        "within noise",
        "new",
    ),
    forgets(
        "EMA of 0.995, cosine",
        "a long average forgets less (Stojanovski et al., 2211.03186)",
        "long-average",
        "plain",
        of=" (average)",
    ),
    learns("EMA of 0.995, cosine", "and has learned less", "long-average", "plain", of=" (average)"),
    forgets(
        "Reptile beside 5 % replay (MER)",
        "forgets less than as much replay (Riemer et al., 1810.11910)",
        "reptile",
        "replay-5",
    ),
    learns("Reptile beside 5 % replay (MER)", "and the new domain pays", "reptile", "replay-5"),
    forgets(
        "Reptile beside a reservoir of 25 % (MER)",
        "forgets less than as much replay (1810.11910)",
        "reptile-reservoir",
        "replay-reservoir",
    ),
]
