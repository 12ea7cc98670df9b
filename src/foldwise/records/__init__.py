"""The records room: kept runs, their blend and the submission made from it.

Text files joined by id; nothing here needs torch or the competition's images.
"""
