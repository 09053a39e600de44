"""README.md as a package index shows it; everything else stands in pyproject.toml.

An index has neither our pictures nor our other files: a picture is left out there, and a link to a
file becomes its text and the file's name in the source distribution.
"""

import re
from pathlib import Path

from setuptools import setup

CODE = r"```.*?```|`[^`]*`"
PICTURE = r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*"
LINK = r"\[(?P<text>[^]]+)\]\((?!https?:)(?P<file>[^)#]*)[^)]*\)"


def for_an_index(text: str) -> str:
    """Markdown without relative pictures and links."""
    return re.sub(f"{CODE}|{PICTURE}|{LINK}", _replaced, text, flags=re.DOTALL)


def _replaced(found: re.Match[str]) -> str:
    if found["text"]:
        return f"{found['text']} (`{found['file']}`)"
    return "" if found[0].startswith("!") else found[0]


setup(
    long_description=for_an_index(Path(__file__).with_name("README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
