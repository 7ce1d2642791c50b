"""Tables of students against each other, each made by one command.

A table (`models.py`) is plain data: rows, their recipes and settings, columns, orderings to check.
A scale (`scales.py`) says on which pictures, with which teacher, and how long. `plan.py` makes jobs
of both, `runner.py` runs them in `folder.py`, `report.py` tells what was found; none of these
knows a table by name.
"""
