"""The spec room: what an experiment file may say, and how it is read, checked and written back.

No heavy import is reachable from here, so that `check` answers in a second.
"""
