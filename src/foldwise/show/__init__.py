"""Runs made visible: the live view and the log of one under way, pictures and pages of kept ones.

Everything here only looks; nothing of a run's result depends on it.
"""
