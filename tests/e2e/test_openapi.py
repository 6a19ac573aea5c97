"""Whatever is sent to what the OpenAPI document lists: no answer is a failure of ours, and none is undocumented."""

from collections.abc import Iterator
from traceback import format_exception
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.keys import key_file
from tests.support.mesh import running_mesh

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = settings(
    max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
KINDS = {"valid": schemathesis.GenerationMode.POSITIVE, "invalid": schemathesis.GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The document of a mesh, where a key bounds what is drawn: hypothesis would ask for large pictures."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    token = key_file(keys, admin={"role": "admin", "pixel_steps_per_day": 64 * 64 * 100, "max_jobs": 4})["admin"]
    with running_mesh({"keys_file": str(keys), "drain_grace_seconds": "1"}, backend="fake") as host:
        base = f"http://{host.http_address}"
        headers = {"Authorization": f"Bearer {token}"}
        document = httpx.get(f"{base}/openapi.json", headers=headers).json()
        loaded = schemathesis.openapi.from_dict(document)
        loaded.config.update(base_url=base)
        yield loaded, headers


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # schemathesis does, within its strategies
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_documented_and_none_is_a_failure(schema: Any, kind: str) -> None:
    loaded, headers = schema
    found: dict[str, str] = {}
    for result in loaded.get_all_operations():
        operation = result.ok()
        if kind == "invalid" and not (operation.body or operation.query):
            continue  # any text may stand in a path

        @EXAMPLES
        @given(case=operation.as_strategy(generation_mode=KINDS[kind]))
        def run(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)

        try:
            run()
        except Unsatisfiable:
            continue  # there is nothing that this operation does not take
        except Exception as error:
            found[operation.label] = "".join(format_exception(error))
    assert found == {}
