"""Detectors that others have published, in one form, to be compared with in one harness."""
