"""All claims, in the order of the table."""

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
    *CONTROLLER_CLAIMS,
    *LOSS_CLAIMS,
    *UPDATE_CLAIMS,
    *SLOW_CLAIMS,
]
