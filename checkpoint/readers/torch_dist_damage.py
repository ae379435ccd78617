"""Damage that megatron-core did when it saved `fully_reshardable`: masters and moments of other parameters.

Up to 0.19 it packs an optimizer's buckets without the padding at their ends, and cuts parameters out as if it
was there (`get_parameter_state_dp_zero` and `sharded_param_state_fully_reshardable` in
`optimizer/distrib_optimizer.py`): everything behind a padded bucket is shifted. The weights are not, so that
they tell which masters are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from checkpoint.bits import rounded
from checkpoint.boxes import Box
from checkpoint.panels import Files
from checkpoint.readers.torch_dist_shards import Shard, ShardRun, Whole

CAUSE = "bucket padding shifted: megatron-core before PR 5077"
_COMPARED = 1024  # elements of each chunk: a shift moves all of them


def find_contradictions(weights: Mapping[str, Whole], masters: Mapping[str, Whole]) -> dict[str, list[Box]]:
    """Name -> chunks whose weights are not the rounded masters, as far as compared."""
    found: dict[str, list[Box]] = {}
    with Files(Path()) as files:
        for name, master in masters.items():
            weight = weights.get(name)
            if weight is None or weight.shape != master.shape:
                continue
            boxes = [piece.box for piece in weight.pieces]
            wrong = [box for box in boxes if _differs(weight, master, box, files)]
            if wrong:
                found[name] = wrong
    return found


def _differs(weight: Whole, master: Whole, box: Box, files: Files) -> bool:
    count = min(_COMPARED, box.numel)
    start = (box.numel - count) // 2
    held, exact = (
        ShardRun(files, Shard(whole.name, ((whole, box),))).read(start, count) for whole in (weight, master)
    )
    expected = rounded(exact, master.dtype, weight.dtype)
    return expected is not None and bool(np.any(expected != held))
