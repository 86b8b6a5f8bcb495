"""The pages lead to each other, and say what the code says."""

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
    """Returns a page's text without its blocks of code, in which `#` is a comment."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(page: str) -> list[list[str]]:
    """Returns the cells of a page's table rows, without heads and rules."""
    lines = re.findall(r"^\| (.+) \|$", Path(page).read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in re.split(r" ?\| ?", line)] for line in lines if line.startswith("`")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    """A relative link names a file, and its anchor a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    """Details have pages of their own."""
    assert len(Path("README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_table_of_settings_is_complete() -> None:
    """Each variable is listed once, with the processes that read it and its default."""
    read: dict[str, tuple[set[str], object]] = {}
    for process, settings in SETTINGS.items():
        for field in settings.model_fields.values():
            default = "required" if field.is_required() else field.default
            read.setdefault(str(field.validation_alias), (set(), default))[0].add(process)
    rows = table("docs/settings.md")
    names = [row[0].strip("`") for row in rows]
    assert sorted(names) == sorted(read)
    for name, row in zip(names, rows, strict=True):
        processes, default = read[name]
        readers = set(row[1].replace("all", "service, relay, worker").split(", "))
        assert readers & set(SETTINGS) == processes, name
        if default is None or default == ():
            assert not row[2].startswith("`"), name
        else:
            assert row[2] == documented(default), name


def documented(default: object) -> str:
    """Returns a default as the table has it."""
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
def nodes() -> list[ast.AST]:
    """Returns the code of the three processes and of what they share, without that of `outbox up`."""
    paths = [path for package in ("outbox", "service", "relay", "worker") for path in Path(package).rglob("*.py")]
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in paths if Path("outbox/devstack") not in path.parents
    ]
    return [node for tree in trees for node in ast.walk(tree)]


def logged() -> set[str]:
    """Returns the events that stand in a call that logs them, as regular expressions: `{name}` may be anything."""
    found: set[str] = set()
    for node in nodes():
        match node:
            case ast.Call(
                func=ast.Attribute(
                    value=ast.Call(func=ast.Attribute(attr="get")) | ast.Name(id="log"),
                    attr="info" | "warning" | "error",
                ),
                args=[ast.Constant(value=str(text)), *_],
            ):
                found.add(re.escape(text))
            case ast.Call(
                func=ast.Attribute(attr="info" | "warning" | "error"), args=[ast.JoinedStr(values=parts), *_]
            ):
                texts = (re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".+" for part in parts)
                found.add("".join(texts))
            case _:
                pass
    return found


def test_the_table_of_log_events_is_complete() -> None:
    """Each event that a process logs is listed, and each that is listed is in the code."""
    listed = {event for row in table("docs/logs.md") for event in re.findall("`([^`]+)`", row[0])}
    events = logged()
    assert len(events) > 50
    assert {event for event in events if not any(re.fullmatch(event, name) for name in listed)} == set()
    texts = {node.value for node in nodes() if isinstance(node, ast.Constant)}
    assert {name for name in listed - texts if not any(re.fullmatch(event, name) for event in events)} == set()


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yields a command and those below it, with their full names."""
    if isinstance(command, click.Group):
        for below, found in command.commands.items():
            yield from commands(found, f"{name} {below}")
    else:
        yield name, command


@pytest.mark.parametrize(
    ("name", "command"), [pytest.param(*found, id=found[0]) for found in commands(outbox, "outbox")]
)
def test_every_command_is_described(name: str, command: click.Command) -> None:
    """Some page names each command and each of its options."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert f"`{name}" in pages
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert any(option in pages for option in parameter.opts), parameter.opts


def test_every_recipe_is_described() -> None:
    """Some page says what each recipe of the justfile is for."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    recipes = re.findall(
        r"^([a-z][a-z-]*)(?: \*\w+)?:(?!=)", Path("justfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    public = set(recipes) - {"default", "setup", "setup-bench"}
    assert len(public) > 10
    assert {recipe for recipe in public if f"just {recipe}" not in pages} == set()
