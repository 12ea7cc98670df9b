"""Arrays in, a trained unit and its probabilities out: the only room that knows torch, timm and albumentations.

There are two loops over batches in the project, `fit.fit` and `predict.predict`; everything here serves them.
"""
