"""Score and train on a Ray cluster.

Most modules of this package need the extra `ray`; `session`, which checks that it is installed, does not.
"""
