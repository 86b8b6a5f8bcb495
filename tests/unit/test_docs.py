"""The pages agree with the code, and their links resolve."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from outbox.cli.commands import outbox
from outbox.runtime.settings import RelaySettings, ServiceSettings, WorkerSettings

PAGES = sorted([*Path().glob("*.md"), *Path("docs").rglob("*.md")])
SETTINGS: dict[str, type[ServiceSettings] | type[RelaySettings] | type[WorkerSettings]] = {
    "service": ServiceSettings,
    "relay": RelaySettings,
    "worker": WorkerSettings,
}


@cache
def prose(page: Path) -> str:
    """Returns a page's text without its code blocks, in which `#` begins a comment."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(page: str) -> list[list[str]]:
    """Returns the cells of the table rows whose first cell is code."""
    lines = re.findall(r"^\| (.+) \|$", Path(page).read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in re.split(r" ?\| ?", line)] for line in lines if line.startswith("`")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_resolves(page: Path) -> None:
    """A relative link names a file that exists, and its anchor is a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    """It has at most 200 lines: details are on other pages."""
    assert len(Path("README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_table_of_settings_is_complete() -> None:
    """Each variable is listed once, with the processes that read it and its default."""
    readers_and_default: dict[str, tuple[set[str], object]] = {}
    for process, settings in SETTINGS.items():
        for field in settings.model_fields.values():
            default = "required" if field.is_required() else field.default
            readers_and_default.setdefault(str(field.validation_alias), (set(), default))[0].add(process)
    rows = table_rows("docs/settings.md")
    names = [row[0].strip("`") for row in rows]
    assert sorted(names) == sorted(readers_and_default)
    for name, row in zip(names, rows, strict=True):
        processes, default = readers_and_default[name]
        listed = set(row[1].replace("all", "service, relay, worker").split(", "))
        assert listed & set(SETTINGS) == processes, name
        if default is None or default == ():
            assert not row[2].startswith("`"), name
        else:
            assert row[2] == formatted_default(default), name


def formatted_default(default: object) -> str:
    """Returns a default as the table shows it."""
    match default:
        case "required":
            return "required"
        case bool():
            return f"`{str(default).lower()}`"
        case dict():
            return f"`{','.join(f'{name}={weight}' for name, weight in default.items())}`"
        case _:
            return f"`{default}`"


@cache
def syntax_nodes() -> list[ast.AST]:
    """Returns the syntax nodes of the three processes and the package outbox, without its devstack."""
    paths = [path for package in ("outbox", "service", "relay", "worker") for path in Path(package).rglob("*.py")]
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in paths if Path("outbox/devstack") not in path.parents
    ]
    return [node for tree in trees for node in ast.walk(tree)]


def logged_events() -> set[str]:
    """Returns the events in logging calls, as regular expressions: the fields of an f-string match any text."""
    events: set[str] = set()
    for node in syntax_nodes():
        match node:
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Call(func=ast.Attribute(attr="get")) | ast.Name(id="log"),
                    attr="info" | "warning" | "error",
                ),
                args=[ast.Constant(value=str(text)), *_],
            ):
                events.add(re.escape(text))
            case ast.Call(
                func=ast.Attribute(attr="info" | "warning" | "error"), args=[ast.JoinedStr(values=parts), *_]
            ):
                texts = (re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts)
                events.add("".join(texts))
            case _:
                pass
    return events


def test_the_table_of_log_events_is_complete() -> None:
    """Each event that a process logs is listed, and each listed event is in the code."""
    listed = {event for row in table_rows("docs/logs.md") for event in re.findall("`([^`]+)`", row[0])}
    events = logged_events()
    assert len(events) > 50
    assert {event for event in events if not any(re.fullmatch(event, name) for name in listed)} == set()
    texts = {node.value for node in syntax_nodes() if isinstance(node, ast.Constant)}
    assert {name for name in listed - texts if not any(re.fullmatch(event, name) for event in events)} == set()


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yields a command, or the commands of a group, with their full names."""
    if isinstance(command, click.Group):
        for subname, subcommand in command.commands.items():
            yield from commands(subcommand, f"{name} {subname}")
    else:
        yield name, command


@pytest.mark.parametrize(
    ("name", "command"), [pytest.param(*named, id=named[0]) for named in commands(outbox, "outbox")]
)
def test_every_command_is_described(name: str, command: click.Command) -> None:
    """A page names each command and each of its options."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"`{name}" in pages
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert any(option in pages for option in parameter.opts), parameter.opts


def test_every_recipe_is_described() -> None:
    """A page names each recipe of the justfile."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    recipes = re.findall(
        r"^([a-z][a-z-]*)(?: \*\w+)?:(?!=)", Path("justfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    public = set(recipes) - {"default", "setup", "setup-bench"}
    assert len(public) > 10
    assert {recipe for recipe in public if f"just {recipe}" not in pages} == set()
