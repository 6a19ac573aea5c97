"""Fixtures of the campaigns."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """What the test measured, by name; it stands in the report."""
    found: dict[str, str] = {}
    yield found
    request.node.user_properties.append(("figures", found))
