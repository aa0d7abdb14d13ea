"""The examples in these pages are tests; how Sphinx builds them is not, and needs the extra [docs]."""

collect_ignore = ["conf.py"]
