from collections.abc import Callable, Iterator

import pytest

from imagemesh_cli.main import main
from tests.support.recording_gateway import RecordingGateway, recording_gateway

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gateway() -> Iterator[RecordingGateway]:
    with recording_gateway() as running:
        yield running


@pytest.fixture
def run(gateway: RecordingGateway, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command against the gateway; answers exit code, stdout and stderr."""
    monkeypatch.setenv("IMAGEMESH_SERVER", gateway.address)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        return code, *capfd.readouterr()

    return call
