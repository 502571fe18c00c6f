"""What lies around a run on a cluster: its batch jobs."""
