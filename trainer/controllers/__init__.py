"""Dynamic mixtures: who decides, during a run, in what proportion the sources are dealt."""
