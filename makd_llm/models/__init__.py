"""Teachers and students: which modules an architecture has, and what a low-rank one looks like."""
