"""What the Dockerfile takes from the development lock."""

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_the_image_is_built_with_all_that_hatchling_needs() -> None:
    """A newer hatchling with one more dependency fails here, not first in somebody's build of the image."""
    listed = re.search(r"\^\((hatchling[a-z|-]*)\)==", (ROOT / "Dockerfile").read_text())
    assert listed is not None

    needed = {
        wanted.name
        for wanted in map(Requirement, requires("hatchling") or [])
        if wanted.marker is None or wanted.marker.evaluate()
    }

    assert {"hatchling", *needed} <= set(listed.group(1).split("|"))
