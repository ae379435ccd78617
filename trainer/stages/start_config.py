"""The `[start]` section: what a run, or a stage of one, keeps of the checkpoint that it starts from."""

from __future__ import annotations

from typing import Literal

from parallel.settings import Settings

Policy = Literal["continue", "rewarm", "weights"]
Keep = Literal["keep", "reset"]
Same = Literal["keep", "change"]
FIELDS = ("moments", "step", "schedule", "data", "random")
"""What is carried over or begins anew."""
SAME_FIELDS = ("vocabulary", "sequence_length", "rope", "layout")
"""What the checkpoint says and the run file says too: the same, or knowingly another."""


class StartConfig(Settings):
    """`[start]`: a policy, and fields that differ from it.

    Weights are always kept: a run without any starts from nothing.

    Attributes:
        policy: "continue" keeps everything; "rewarm" keeps weights and moments and begins its schedule anew
            where it goes on (Ibrahim et al. 2024, arXiv 2403.08763, section 3.1); "weights" keeps nothing
            else. By default "continue", and "weights" where a checkpoint never has more: Hugging Face's.
        moments: of Adam, with its masters and its count of updates.
        step: the number that steps go on from.
        schedule: "keep" goes on where the checkpoint's was; "anchor" begins at this point, from
            `rewarm_from`; "reset" begins at this point as a new run does, from schedule.warmup_init_lr.
        data: how far each source has been read.
        random: the ranks' random streams, on the same layout only.
        vocabulary: "keep" refuses another tokenizer than the checkpoint's; "change" takes one with as many
            ids, knowingly.
        sequence_length, rope, layout: "keep" refuses another one than the checkpoint's.
        rewarm_from: where an anchored schedule's warm-up starts: at the checkpoint's learning rate, at 0, or
            at optimizer.min_lr.
    """

    policy: Policy | None = None
    moments: Keep | None = None
    step: Keep | None = None
    schedule: Literal["keep", "anchor", "reset"] | None = None
    data: Keep | None = None
    random: Keep | None = None
    vocabulary: Same = "keep"
    sequence_length: Same = "change"
    rope: Same = "change"
    layout: Same = "change"
    rewarm_from: Literal["current", "zero", "min_lr"] = "current"
