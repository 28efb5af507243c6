"""Commands that error messages recommend."""


def export_command(stage: str, backend: str, *flags: str) -> str:
    """Return the command that exports a stage, with MODEL as a placeholder: the store only has the model's name."""
    return " ".join(["frostline export MODEL --stages", stage, "--backend", backend, *flags])
