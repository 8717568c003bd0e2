# SPDX-License-Identifier: Apache-2.0
"""Write docs/api.md from the docstrings of everything public: `make docs`.

griffe reads the sources without importing them, so neither torch nor a built module is needed. What is public is what
the `__all__` of the modules below says.
"""

from __future__ import annotations

import argparse
import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import griffe

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "api.md"

# How the page calls a module's names, and what it says of them.
MODULES = {
    "patchkern": ("pk.", "The door: `import patchkern as pk`."),
    "patchkern.search.recommend": ("", "What a model's `recommend` takes, the model being `self`."),
    "patchkern.search.scoring": ("", "What a model's `score_items` takes, the model being `self`."),
    "patchkern.data": ("data.", "Data sets: `from patchkern import data`. [How to bring your own](data.md)."),
    "patchkern.evaluation": ("evaluation.", "Metrics and yardsticks: `from patchkern import evaluation`."),
    "patchkern.training": ("training.", "Training: `from patchkern import training`. [How it is used](training.md)."),
    "patchkern.serving.stores": (
        "stores.",
        "Stores of users: `from patchkern.serving import stores`. [Which to take](serving.md#users-kept-compressed).",
    ),
    "patchkern.serving.vllm": (
        "vllm.",
        "Items as tokens of vLLM: `from patchkern.serving import vllm`. [How](vllm.md).",
    ),
    "patchkern.models.scratch": ("scratch.", "Small models of random weights: `from patchkern.models import scratch`."),
}

HEAD = """# Reference

Every public name, from its docstring; `make docs` writes this page anew. Shapes are in parentheses: B users, T rows of
a packed batch, N items of all histories together, V tokens of the vocabulary, D the width of the model. Wrong
arguments are a `TypeError` or a `ValueError` that names the argument, what was expected and what came. In signatures,
`HistoriesLike` is `pk.Histories` or one sequence of item ids per user, `AnyPolicy` a `pk.Policy` or a
`pk.FittingPolicy`, `Ranked` a list of item ids with scores.

[README](../README.md) · [all pages](README.md)
"""

WIDTH = 100


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is not current")
    args = parser.parse_args(argv)
    page = render()
    if not args.check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise SystemExit(f"{PAGE.relative_to(REPOSITORY)}: not what the docstrings say; run `make docs`")


def render() -> str:
    """The page."""
    # "Args: one, two: ..." documents two parameters at once, which griffe warns of
    logging.getLogger("griffe").setLevel(logging.ERROR)
    root = griffe.load("patchkern", search_paths=[REPOSITORY], docstring_parser="google")
    sections, contents = [], []
    for path, (prefix, about) in MODULES.items():
        module = root if path == "patchkern" else root[path.removeprefix("patchkern.")]
        names = public_names(module)
        contents.append(f"- [`{path}`](#{anchor(path)}): " + ", ".join(f"[{n}](#{anchor(prefix + n)})" for n in names))
        parts = (part for name in names for part in of_object(prefix + name, resolved(module[name])))
        sections += [f"## `{path}`", about, *parts]
    return "\n\n".join([HEAD.strip(), "\n".join(contents), *sections]) + "\n"


def public_names(module: Any) -> list[str]:
    """Of ``__all__``; without one, of what the module itself defines."""
    if module.exports is not None:
        return sorted((str(name) for name in module.exports), key=str.lower)
    own = (member for member in module.members.values() if is_public(member) and not member.is_alias)
    return sorted(member.name for member in own if member.docstring and not member.is_module)


def is_public(member: Any) -> bool:
    return not member.name.startswith("_") or member.name == "__call__"


def resolved(member: Any) -> Any:
    return member.final_target if member.is_alias else member


# ------------------------------------------------------------------ objects


def of_object(name: str, described: Any, level: int = 3) -> Iterator[str]:
    """Heading, signature and docstring of a name, then those of a class's methods."""
    yield f"{'#' * level} `{name}`"
    if described.is_attribute and "property" not in described.labels:
        line = f"{described.name}{annotated(described.annotation)}"
        value = f" = {described.value}"
        yield fenced(line + value if len(line + value) <= WIDTH else line)
    elif described.is_class and (parameters := constructor(described)):
        yield fenced(signature(described.name, parameters, ""))
    elif described.is_class:
        bases = ", ".join(str(base) for base in described.bases)
        yield fenced(f"class {described.name}" + (f"({bases})" if bases else ""))
    elif described.is_function:
        yield fenced(signature(described.name, described.parameters, annotated(described.returns, " -> ")))
    yield from of_docstring(described)
    if not described.is_class:
        return
    members = [member for member in described.members.values() if is_public(member) and not member.is_alias]
    members += [resolved(member) for member in described.inherited_members.values() if is_public(member)]
    entries = documented(described, "attributes", "parameters")
    listed = {name for entry in entries for name in names_of(entry).split(", ")}
    fields = [member for member in members if member.is_attribute and member.docstring and member.name not in listed]
    if fields:
        yield "\n".join(
            ["**Further attributes**", ""]
            + [item(field.name, str(field.annotation or ""), field.docstring.value) for field in fields]
        )
    for member in members:
        if member.is_function and member.docstring:
            yield from of_object(f"{name}.{member.name}", member, level + 1)


def constructor(described: Any) -> list[Any]:
    """Parameters of a class, those of a dataclass too."""
    own = described.members.get("__init__")
    return list(own.parameters) if own is not None else list(described.parameters)


def documented(described: Any, *kinds: str) -> Iterator[Any]:
    """The entries of a docstring's sections of these kinds."""
    for section in described.docstring.parsed if described.docstring else ():
        if section.kind.value in kinds:
            yield from section.value


# ------------------------------------------------------------------ docstrings

TITLES = {"parameters": "Arguments", "attributes": "Attributes", "returns": "Returns", "yields": "Yields"}


def of_docstring(described: Any) -> Iterator[str]:
    for section in described.docstring.parsed if described.docstring else ():
        kind = section.kind.value
        if kind == "text":
            yield prose(section.value)
        elif kind == "examples":
            yield "**Example**"
            yield from (prose(text) for _, text in section.value)
        elif kind in ("raises", "warns"):
            yield "\n".join(
                [f"**{kind.title()}**", ""] + [item(str(e.annotation), "", e.description) for e in section.value]
            )
        elif kind in ("returns", "yields"):
            yield f"**{TITLES[kind]}** " + " ".join(prose(entry.description) for entry in section.value)
        elif kind in TITLES:
            lines = [item(names_of(entry), "", entry.description) for entry in section.value]
            yield "\n".join([f"**{TITLES[kind]}**", "", *lines])
        elif kind == "admonition":
            yield f"**{section.title}**"
            yield prose(section.value.description)
        else:
            raise ValueError(f"{described.path}: its docstring has a section {kind!r}, which this page cannot show")


def names_of(entry: Any) -> str:
    """Of two attributes that are described together griffe takes the second for the type of the first."""
    together = entry.name.endswith(",")
    return f"{entry.name} {str(entry.annotation).strip('()')}" if together else str(entry.name)


def item(name: str, kind: str, description: str) -> str:
    names = ", ".join(f"`{part.strip()}`" for part in name.strip("()").split(","))
    kind = f" (`{kind}`)" if kind else ""
    return f"- {names}{kind}: " + textwrap.indent(prose(description), "  ").lstrip()


def prose(text: str) -> str:
    """reStructuredText's two marks that docstrings use, as Markdown has them; doctests as code."""
    return "\n\n".join(
        fenced(part, "pycon") if part.lstrip().startswith(">>>") else _marked(part)
        for part in re.split(r"\n\s*\n", text.strip())
    )


def _marked(text: str) -> str:
    return re.sub(r"::$", ":", re.sub(r"``([^`]*)``", r"`\1`", text), flags=re.MULTILINE)


# ------------------------------------------------------------------ signatures


def signature(name: str, parameters: Any, returns: str) -> str:
    shown = [part for part in arguments(parameters) if part not in ("self", "cls")]
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in shown), f"){returns}"])


def arguments(parameters: Any) -> Iterator[str]:
    keyword_only = False
    for parameter in parameters:
        kind = parameter.kind.value
        if kind == "keyword-only" and not keyword_only:
            yield "*"
        keyword_only = kind in ("keyword-only", "variadic positional")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        default = ""
        if parameter.default is not None and not stars:
            default = f" = {parameter.default}" if parameter.annotation else f"={parameter.default}"
        yield f"{stars}{parameter.name}{annotated(parameter.annotation)}{default}"


def annotated(annotation: Any, before: str = ": ") -> str:
    return "" if annotation is None else f"{before}{annotation}"


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{textwrap.dedent(code).strip()}\n```"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading in backticks."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
