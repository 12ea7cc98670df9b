"""Foldwise: one YAML in, one submission.csv out.

A competition experiment harness for image classification; `foldwise.cli` is the way in.
"""

__version__ = "0.1.0"
