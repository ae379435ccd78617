"""The `[schedule]` section: the learning rate as a pure function of the step and of an anchor."""

from trainer.schedule.anchor import Anchor
from trainer.schedule.config import EnvelopeConfig, Kind, ScheduleConfig
from trainer.schedule.curves import CURVES
from trainer.schedule.phases import Phase
from trainer.schedule.schedule import Schedule

__all__ = ["CURVES", "Anchor", "EnvelopeConfig", "Kind", "Phase", "Schedule", "ScheduleConfig"]
