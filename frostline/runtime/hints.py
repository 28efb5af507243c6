"""Commands that error messages recommend."""


def export_command(stage: str, backend: str, *flags: str) -> str:
    """What builds an engine of a stage. MODEL is the reader's to fill in: a store knows no more than a name for it."""
    return " ".join(["frostline export MODEL --stages", stage, "--backend", backend, *flags])
