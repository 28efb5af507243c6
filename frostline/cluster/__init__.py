"""Score and train on a Ray cluster.

All modules of this package except this one and `session` need the extra `ray`.
"""
