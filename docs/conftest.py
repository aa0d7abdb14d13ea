"""Keeps Sphinx's configuration out of the doctests: it imports what only the `docs` extra installs."""

collect_ignore = ["conf.py"]
