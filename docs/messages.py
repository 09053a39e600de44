"""Every error that is raised on purpose, read from the source: for the page of errors."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("ConfigError", "TargetError", "AdapterFileError", "RandLoraError")


class Message(NamedTuple):
    """What an error says.

    Args:
      kind: its class.
      text: with names in braces for what is filled in.
      place: the function that raises it.
    """

    kind: str
    text: str
    place: str


def messages(file: Path) -> Iterator[Message]:
    """Of one file, in its order."""
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.ClassDef):
            continue
        for node in _own(function):
            made = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(made, ast.Call) and _name(made.func) in KINDS and made.args:
                yield Message(_name(made.func), _text(made.args[0]), function.name)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, but for functions in it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            if isinstance(child, ast.Raise | ast.Return):
                yield child.value if isinstance(child, ast.Return) and child.value else child
            yield from _own(child)


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.AST) -> str:
    """A message as its source builds it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return "{" + ast.unparse(inner) + "}"


def page() -> str:
    """All of them in Markdown, by file; what a file is about stands above."""
    parts = []
    for folder in ("randlora_jax", "interop"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found = list(dict.fromkeys(messages(file)))
            if not found:
                continue
            about = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
            parts.append(f"## {' '.join(about.split())}\n\n`{file.relative_to(ROOT)}`\n")
            parts += [
                f"**{kind}**, in `{place}`\n\n> {_quoted(text)}\n" for kind, text, place in found
            ]
    return "\n".join(parts)


def _quoted(text: str) -> str:
    return "`` " + " ".join(text.split()).replace("``", "` `") + " ``"


if __name__ == "__main__":
    print(page())
