"""Terminal output: one console for standard error, log lines, and tables that fit the width."""

from frostline.terminal.console import Terminal, error_console, print_error

__all__ = ["Terminal", "error_console", "print_error"]
