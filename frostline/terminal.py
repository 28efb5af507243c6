"""The terminal, on which nothing from outside has a say: names and prompts are shown, and never obeyed."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from frostline.escaping import printable


class Terminal(Console):
    """Rich's console, whose own control sequences pass and no others."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
