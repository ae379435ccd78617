"""Writers of checkpoint formats: each module plans the files of one, `checkpoint.convert` writes them.

A module has `plan(opened, options) -> WritePlan`; see `checkpoint.writers.options`.
"""
