"""What lies around a run on a cluster: its batch jobs, and what it will need there."""
