"""Units in, a kept run out: which folds run with which seeds, on which weights, followed by whom.

`crossval` trains units and yields them; it stores nothing but each unit's own checkpoint and weights.
"""
