"""The packages that the Dockerfile takes from the development lock."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_the_image_is_built_with_all_dependencies_of_hatchling() -> None:
    """A new dependency of hatchling fails here, and not only in a build of the image."""
    listed = re.search(r"\^\((hatchling[a-z|-]*)\)==", (ROOT / "Dockerfile").read_text())
    assert listed is not None

    dependencies = {
        requirement.name
        for requirement in map(Requirement, requires("hatchling") or [])
        if requirement.marker is None or requirement.marker.evaluate()
    }

    assert {"hatchling", *dependencies} <= set(listed.group(1).split("|"))
