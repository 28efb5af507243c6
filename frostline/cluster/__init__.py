"""Score and train on a Ray cluster.

Most modules of this package need the extra `ray`. `session` does not: it checks that the extra is installed.
"""
