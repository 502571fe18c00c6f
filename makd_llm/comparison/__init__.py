"""`makd compare`: rows that differ in what the student learns, and in nothing else.

grid.py (which runs there are) -> checks.py (before hours are spent) -> launching.py (one after
another, each through the launcher) -> running.py (one of them, in its ranks; sharing.py: what it
takes over from others; left.py: whether what it has left is whole) -> results.py (the table as
plain values) -> analysis.py, tables.py.
"""
