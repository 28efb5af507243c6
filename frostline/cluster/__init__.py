"""Scoring and training on a Ray cluster; every module of it but this one and `session` imports Ray (extra `ray`)."""
