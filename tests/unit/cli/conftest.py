from collections.abc import Iterator

import pytest

from tests.support.recording_gateway import RecordingGateway, recording_gateway


@pytest.fixture
def gateway() -> Iterator[RecordingGateway]:
    with recording_gateway() as running:
        yield running
