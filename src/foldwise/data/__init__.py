"""From the files that a competition hands out to arrays, labels and folds.

Nothing here needs torch, so whatever only asks for ids and folds answers at once.
"""
