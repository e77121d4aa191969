"""Runnable training programs: ``python -m numclip.examples.NAME``."""
