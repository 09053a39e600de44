"""What the library says where something is wrong, read from its source: for the page of errors.

A message is often put together: by a function that makes the error, by one that writes a part of
it, in a variable. So the functions that raise or warn are found first, and those that write text
for them; then all that they say is listed.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"randlora_jax": "randlora_jax", "interop": "randlora_jax.interop"}
KINDS = ("ConfigError", "TargetError", "AdapterFileError", "RandLoraError", "Misuse")
WARN, PART = "warning", "part of a message"
SAID = {**dict(zip(KINDS, KINDS, strict=True)), "ArgumentTypeError": "Misuse"}
SAID |= {"NotCompared": PART, "warn": WARN, "_warn": WARN}


class Message(NamedTuple):
    """What is said.

    Args:
      kind: the class of an error, or WARN, or PART.
      text: with what is filled in in braces.
      place: the function that says it.
    """

    kind: str
    text: str
    place: str


@dataclass
class Source:
    """A file: what it is about, its functions, its texts, and what it imports from where."""

    about: str
    functions: list[ast.FunctionDef] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Source":
        """Of one file."""
        tree = ast.parse(file.read_text())
        about = (ast.get_docstring(tree) or "").split("\n\n")[0]
        source = cls(" ".join(about.split()))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                source.functions.append(node)
            elif isinstance(node, ast.ImportFrom) and node.module:
                source.imported |= dict.fromkeys((x.name for x in node.names), node.module)
            elif isinstance(node, ast.Assign) and _is_text(node.value):
                source.texts[ast.unparse(node.targets[0])] = _text(node.value)
        return source


Sources = dict[str, Source]


def sources() -> Sources:
    """All of them, by the name of the module."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *inner))] = Source.read(file)
    return found


def messages(read: Sources) -> Iterator[tuple[str, Message]]:
    """What is said, and the module that says it; in their order."""
    speakers = set(_speakers(read))
    for module, source in read.items():
        speaking = [function for function in source.functions if function in speakers]
        found = [message for function in speaking for message in _said(read, module, function)]
        pages = {place for kind, text, place in found if kind == PART and "\n" in text}
        for message in dict.fromkeys(found):
            if message.kind != PART or message.place not in pages:
                yield module, message


def _speakers(read: Sources) -> Iterator[ast.FunctionDef]:
    """Functions that raise or warn, and those that write text for them."""
    waiting = [
        (module, function)
        for module, source in read.items()
        for function in source.functions
        if any(_kind(node) or _maker(read, module, node) for node in _own(function))
    ]
    known = {function for _, function in waiting}
    while waiting:
        module, function = waiting.pop()
        yield function
        for node in _own(function):
            for home, called in _ours(read, module, node):
                if called not in known and "str" in _returns(called):
                    known.add(called)
                    waiting.append((home, called))


def _ours(read: Sources, module: str, node: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions of ours that may be called here, each with its module; properties are, too."""
    imported = read[module].imported
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, method = node.func.id, False
        homes = [module, imported.get(name)]
    elif isinstance(node, ast.Attribute):
        owner = _name(node.value)
        inside = f"{imported.get(owner)}.{owner}"
        name, method = node.attr, inside not in read
        homes = list(read) if method else [inside]
    else:
        return
    for home in homes:
        for function in read[home].functions if home in read else ():
            if function.name == name and method == ast.unparse(function.args).startswith("self"):
                yield home, function


def _said(read: Sources, module: str, function: ast.FunctionDef) -> Iterator[Message]:
    """All that a function says, each text once and as a whole."""
    waiting: list[ast.AST] = list(reversed(_body(function)))
    while waiting:
        node = waiting.pop()
        kind, text = _kind(node), None
        if kind and isinstance(node, ast.Call):
            text = _text(node.args[0])
        elif maker := _maker(read, module, node):
            kind, text = _made(maker, node)
        elif _is_text(node):
            kind, text = PART, _text(node)
        if kind and text is not None:
            text = _with_texts(read, module, text)
            if kind != PART or _words(text) >= 3:
                yield Message(kind, text, function.name)
        if text is None or not _is_text(node):
            waiting += reversed(list(_inside(node, skipped=text is not None)))


def _inside(node: ast.AST, *, skipped: bool) -> Iterator[ast.AST]:
    """The parts of a node; without the text of a call that is said, where that is `skipped`."""
    for child in ast.iter_child_nodes(node):
        said = skipped and isinstance(node, ast.Call) and child in node.args and _is_text(child)
        if not said and not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child


def _kind(node: ast.AST) -> str | None:
    """What is said by a call, if it is one that raises, makes an error or warns."""
    called = isinstance(node, ast.Call) and node.args
    return SAID.get(_name(node.func)) if called else None


def _maker(read: Sources, module: str, node: ast.AST) -> ast.FunctionDef | None:
    """The function that makes the error, if a call calls one that does nothing else."""
    if not isinstance(node, ast.Call):
        return None
    called = node if isinstance(node.func, ast.Name) else node.func
    ours = [function for _, function in _ours(read, module, called)]
    return ours[0] if ours and _kind(_returned(ours[0])) else None


def _made(maker: ast.FunctionDef, call: ast.AST) -> tuple[str, str]:
    """The kind and the text of the error that a call has made."""
    error = _returned(maker)
    assert isinstance(error, ast.Call) and isinstance(call, ast.Call)
    names = [x.arg for x in maker.args.args if x.arg != "self"]
    given = dict(zip(names, call.args, strict=False))
    given |= {x.arg: x.value for x in call.keywords if x.arg}
    defaults = maker.args.defaults
    for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True):
        given.setdefault(name, value)
    return _kind(error) or PART, _text(error.args[0], given)


def _returned(function: ast.FunctionDef) -> ast.AST:
    """What its last line returns; itself, where that is nothing."""
    last = function.body[-1]
    return last.value if isinstance(last, ast.Return) and last.value else function


def _returns(function: ast.FunctionDef) -> str:
    return ast.unparse(function.returns) if function.returns else ""


def _body(function: ast.FunctionDef) -> list[ast.stmt]:
    """A function without its docstring."""
    return function.body[1:] if ast.get_docstring(function) else function.body


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What is in a function, but for functions in it."""
    waiting: list[ast.AST] = list(_body(function))
    while waiting:
        node = waiting.pop()
        yield node
        waiting += _inside(node, skipped=False)


def _name(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and _name(node.func) == "rstrip":
        return _is_text(node.func.value)
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _text(node: ast.AST, given: dict[str, ast.expr] | None = None) -> str:
    """A message as its source builds it.

    Args:
      given: what stands for the names of arguments.
    """
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, given)
    if isinstance(node, ast.Name) and given and node.id in given:
        return _text(given[node.id])
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, given) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, given) + _text(node.right, given)
    if _is_text(node) and isinstance(node, ast.Call):
        return _text(node.func.value, given).rstrip()
    return "{" + ast.unparse(node) + "}"


def _with_texts(read: Sources, module: str, text: str) -> str:
    """With the constants that a text names filled in."""
    for name in re.findall(r"{([A-Z_]+)}", text):
        for home in (module, read[module].imported.get(name, "")):
            if home in read and name in read[home].texts:
                text = text.replace("{" + name + "}", read[home].texts[name])
    return text


def _words(text: str) -> int:
    return len(re.findall(r"[A-Za-z_]{2,}", re.sub(r"{[^}]*}", "", text)))


def page() -> str:
    """All of them in Markdown, by file; what a file is about stands above."""
    read, parts, last = sources(), [], ""
    for module, message in messages(read):
        if module != last:
            file = module.replace("randlora_jax.interop", "interop").replace(".", "/") + ".py"
            parts.append(f"## {read[module].about}\n\n`{file}`\n")
            last = module
        kind, text, place = message
        parts.append(f"**{kind}**, in `{place}`\n\n> {_quoted(text)}\n")
    return "\n".join(parts)


def _quoted(text: str) -> str:
    return "`` " + " ".join(text.split()).replace("``", "` `") + " ``"


if __name__ == "__main__":
    print(page())
