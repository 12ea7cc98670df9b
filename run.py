"""Foldwise from a checkout: `python run.py <command>` is `foldwise <command>`, with or without make."""

from foldwise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
