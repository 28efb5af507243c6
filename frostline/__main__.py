"""Entry point of `python -m frostline`, also for `accelerate launch -m frostline`."""

from frostline.cli import main

main()
