"""The records of the lineages (a folder each) and the `python -m records` command."""
