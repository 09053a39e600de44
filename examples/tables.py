"""How both demonstrations print their figures."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """A line for each figure: what it is, and what was found."""
    table = Table("what", show_header=False)
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
