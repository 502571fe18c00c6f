"""Many machines: what a run needs there."""
