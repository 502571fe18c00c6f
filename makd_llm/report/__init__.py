"""What a run shows: tables."""
