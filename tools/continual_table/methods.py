"""All runs of a seed, and all claims, in the order of the tables."""

from tools.continual_table.arm import Arm, base
from tools.continual_table.arms_of_chains import metadata_arms, pace_arms
from tools.continual_table.arms_of_data import controller_arms, replay_arms, schedule_arms
from tools.continual_table.arms_of_hooks import loss_arms, slow_arms, update_arms
from tools.continual_table.bed import Bed
from tools.continual_table.claims_of_chains import METADATA_CLAIMS, PACE_CLAIMS
from tools.continual_table.claims_of_data import (
    CONTROLLER_CLAIMS,
    INFINITE_CLAIMS,
    REPLAY_CLAIMS,
    SCHEDULE_CLAIMS,
)
from tools.continual_table.claims_of_hooks import LOSS_CLAIMS, SLOW_CLAIMS, UPDATE_CLAIMS

CLAIMS = [
    *REPLAY_CLAIMS,
    *INFINITE_CLAIMS,
    *SCHEDULE_CLAIMS,
    *PACE_CLAIMS,
    *CONTROLLER_CLAIMS,
    *METADATA_CLAIMS,
    *LOSS_CLAIMS,
    *UPDATE_CLAIMS,
    *SLOW_CLAIMS,
]


def arms(bed: Bed) -> list[Arm]:
    """All runs of a seed, none before what it needs."""
    return [
        base(bed),
        *replay_arms(bed),
        *schedule_arms(bed),
        *controller_arms(bed),
        *pace_arms(bed),
        *metadata_arms(bed),
        *loss_arms(bed),
        *update_arms(bed),
        *slow_arms(bed),
    ]
