"""What most likely made a checkpoint as it is: hazards that trainers are known for, told by their traces."""

from __future__ import annotations

from checkpoint.verification.checks import Difference

MISSING = "the file was not copied, or removed since"
TRUNCATED = "an interrupted copy, upload or save"
EMPTY = "a save or copy that was killed before its data reached the disk, or a full disk"
HASH = "bytes changed after they were saved: a flipped bit of storage or memory, or a copy that went wrong"
NONFINITE = "training diverged before this save (look at the loss), or bytes of something else were read here"
NEGATIVE = "a mean of squares is never negative: bytes of another tensor, or a flipped sign bit"
STEPS = "parameters that were frozen or had no gradient at times, or files of different saves mixed"
GROUPS = "ranks that were started with different settings, or files of different saves mixed"
FROZEN = "frozen parameters, or another optimizer for them"
GAP = "the file of a rank is missing, or the files are not of one save"
OVERLAP = "files of different saves or layouts mixed, or a spec that takes copies for parts"
ABOVE = "the damage that was found in the files' headers"
LAYERS = "a pipeline stage's files are missing, or the spec leaves names out"

_ONE_BIT = "one bit: a flip in storage or memory"
_HALF = 0.5


def rounding_cause(difference: Difference, form: str) -> str:
    """Why a weight is not its rounded master."""
    if difference.shift:
        cause = f"the master is shifted by {difference.shift} elements against the weight"
        if "fully_reshardable" in form:
            return f"{cause}: bucket padding left out when saving, megatron-core before PR 5077"
        return f"{cause}: padding of a flat buffer was counted otherwise when saving than when reading"
    if difference.count == 1:
        return "a flipped bit in the master or the weight, which alone differ"
    if difference.count > _HALF * difference.compared:
        return (
            "masters and weights of different steps or runs, or an order of rows that the spec does not know"
        )
    return "masters that were changed without the weights, or the other way round"


def replica_cause(difference: Difference, shape: tuple[int, ...], name: str) -> str:
    """Why two copies of one tensor differ."""
    if difference.flipped == 1:
        return _ONE_BIT
    if len(shape) <= 1:
        return (
            "ranks that each updated their own copy: under sequence parallelism the gradients of norms and "
            "biases must be summed over the tensor ranks; to take the mean, let the spec say `average`"
        )
    if "embed" in name or "lm_head" in name:
        return "the first and the last stage each updated their own copy of a tied embedding"
    if difference.count > _HALF * difference.compared:
        return "files of different saves mixed, or tensors that are not copies: the spec should not say so"
    return "ranks that each updated their own copy, or a file damaged in part"
