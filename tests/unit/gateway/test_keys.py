"""API keys: how they are kept, who is known by them, and how often they may be used."""

import base64
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from tritonclient.grpc import service_pb2

from imagemesh.v1 import priority_pb2
from imagemesh_gateway.access import keyring as keyring_module
from imagemesh_gateway.access.caller import ANYBODY, Caller, set_current_caller
from imagemesh_gateway.access.door import Door, require_keys
from imagemesh_gateway.access.keyring import Keyring
from imagemesh_gateway.access.keys import Role, add_key, read_keys, revoke_key
from imagemesh_gateway.access.rates import Rates
from imagemesh_gateway.access.rights import GRPC, RIGHTS, Right, right_of_method, right_of_request
from imagemesh_gateway.config import GatewayConfig
from imagemesh_runtime.errors import FailedPrecondition, NotFound, OverLimit, PermissionDenied, Unauthenticated
from imagemesh_runtime.metrics import Metrics
from tests.support.keys import key_file, new_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_file_holds_no_secret_and_is_its_owners_alone(path: Path) -> None:
    tokens = key_file(path, alice={"tenant": "a", "max_jobs": 3}, bob={"tenant": "b"})
    text = path.read_text()
    assert not any(token in text or token.split("_", 2)[2] in text for token in tokens.values())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(key.name, key.tenant, key.max_jobs) for key in read_keys(path).values()] == [
        ("alice", "a", 3),
        ("bob", "b", None),
    ]


def test_the_file_stays_readable_for_whom_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key_file(path, alice={})
    path.chmod(0o640)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _, user, group: given.append((user, group)))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)  # as where root changes the gateway's file
    key_file(path, bob={})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert given == [(path.stat().st_uid, path.stat().st_gid)]


def test_keys_that_are_made_at_the_same_time_are_all_kept(path: Path) -> None:
    keys = [new_key()[0] for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: add_key(path, key), keys))
    assert set(read_keys(path)) == {key.id for key in keys}
    assert {one.name for one in path.parent.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_a_key_stays_revoked_since_when_it_first_was(path: Path) -> None:
    key, _ = new_key(revoked=True)
    add_key(path, key)
    assert revoke_key(path, key.id).revoked == key.revoked
    with pytest.raises(NotFound, match="key 'nobody' not found"):
        revoke_key(path, "nobody")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"role": "god"}, r"keys\.0\.role: "),
        ({"tenant": "A B"}, r"keys\.0\.tenant: "),
        ({"calls_per_minute": 0}, r"keys\.0\.calls_per_minute: "),
        ({"expires": "2026-01-01T00:00:00"}, r"keys\.0\.expires: .*timezone"),
        ({"password": "x"}, r"keys\.0\.password: Extra"),
        ({"sha256": "im_secret"}, r"keys\.0\.sha256: "),
    ],
)
def test_what_is_wrong_with_a_file_is_named_without_its_values(path: Path, change: Any, complaint: str) -> None:
    key_file(path, alice={})
    content = json.loads(path.read_text())
    content["keys"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(FailedPrecondition, match=complaint) as caught:
        read_keys(path)
    assert "im_secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 2}', '{"keys": [1]}'])
def test_another_file_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(FailedPrecondition, match="keys file"):
        read_keys(path)


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"keys file {path} can't be read: No such file"):
        Keyring(path)


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def test_a_key_is_shown_as_bearer_or_as_basic(path: Path) -> None:
    token = key_file(path, alice={"tenant": "a"})["alice"]
    keyring = Keyring(path)
    for header in (f"Bearer {token}", f"bearer  {token} ", basic("anything", token), basic(token, "")):
        assert keyring.authenticate(header).tenant == "a"


def test_every_other_header_is_refused_alike_and_repeats_nothing(path: Path) -> None:
    tokens = key_file(path, alice={}, bob={}, old={"expired": True}, gone={"revoked": True})
    keyring, other = Keyring(path), new_key()[1]
    alice, bob = tokens["alice"], tokens["bob"]
    mixed = f"{alice[:14]}{bob[14:]}"  # alice's id with bob's secret
    wrong = [f"Bearer {one}" for one in (other, mixed, alice[:-1], alice + "x", "", "é", f"{alice} {bob}")]
    for header in (*wrong, basic("alice", other), "Basic %%", "Basic /w==", f"Digest {alice}", alice, None, ""):
        with pytest.raises(Unauthenticated) as caught:
            keyring.authenticate(header)
        assert caught.value.reason in ("API_KEY_INVALID", "CREDENTIALS_MISSING")
        assert not any(part in str(caught.value) for part in (alice[3:13], bob[3:13], alice[14:], other[14:]))
    for name, reason in (("old", "API_KEY_EXPIRED"), ("gone", "API_KEY_REVOKED")):
        with pytest.raises(Unauthenticated) as caught:
            keyring.authenticate(f"Bearer {tokens[name]}")
        assert caught.value.reason == reason
        # Who only knows the id learns nothing of how the key stands.
        with pytest.raises(Unauthenticated) as caught:
            keyring.authenticate(f"Bearer {tokens[name][:14]}{alice[14:]}")
        assert caught.value.reason == "API_KEY_INVALID"


def test_a_changed_file_counts_and_a_broken_one_changes_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = key_file(path, alice={})["alice"]
    keyring = Keyring(path)
    late = key_file(path, bob={})["bob"]
    keyring.refresh()
    assert keyring.authenticate(f"Bearer {late}").key == list(read_keys(path).values())[1]
    revoke_key(path, token[3:13])
    keyring.refresh()
    with pytest.raises(Unauthenticated, match="was revoked"):
        keyring.authenticate(f"Bearer {token}")
    path.write_text("{")
    keyring.refresh()
    os.unlink(path)
    keyring.refresh()
    assert keyring.authenticate(f"Bearer {late}").tenant == "a"
    assert caplog.text.count("the keys that were known before are taken on") == 2


def test_a_file_that_could_not_be_read_for_a_while_is_read_later(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = key_file(path, alice={})["alice"]
    keyring = Keyring(path)
    revoke_key(path, token[3:13])

    def broken(_: Path) -> Any:
        raise FailedPrecondition("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(keyring_module, "read_keys", broken)
        for _ in range(2):
            keyring.refresh()
    assert keyring.authenticate(f"Bearer {token}").tenant == "a"
    keyring.refresh()
    with pytest.raises(Unauthenticated, match="was revoked"):
        keyring.authenticate(f"Bearer {token}")
    assert caplog.text.count("the keys that were known before are taken on") == 1


def test_a_bucket_lets_a_burst_through_and_then_what_comes_in() -> None:
    now = [100.0]
    rates, caller = Rates(lambda: now[0]), Caller(new_key(calls_per_minute=6, burst=2)[0])
    other = Caller(new_key(calls_per_minute=6, burst=1)[0])
    for _ in range(2):
        rates.take(caller)
    with pytest.raises(OverLimit, match=r"6 calls a minute, 2 of them at once; retry after 10\.0 s") as caught:
        rates.take(caller)
    rates.take(other)
    now[0] += caught.value.seconds
    rates.take(caller)
    with pytest.raises(OverLimit):
        rates.take(caller)
    now[0] += 3600
    for _ in range(2):
        rates.take(caller)
    with pytest.raises(OverLimit):
        rates.take(caller)


def test_a_message_that_is_refused_is_counted_as_a_call_is(path: Path) -> None:
    token = key_file(path, alice={"calls_per_minute": 1})["alice"]
    metrics = Metrics("gateway")
    door = Door(GatewayConfig(keys_file=str(path)), metrics)
    try:
        door.enter(f"Bearer {token}", Right.LOOK)
        with pytest.raises(OverLimit):
            door.count_message()
    finally:
        set_current_caller(ANYBODY)
    refused = metrics.registry.get_sample_value("imagemesh_refused_calls_total", {"code": "RESOURCE_EXHAUSTED"})
    assert refused == 1


def test_without_a_rate_nothing_is_counted() -> None:
    rates = Rates()
    for _ in range(1000):
        rates.take(Caller(new_key()[0]))
        rates.take(Caller())


@pytest.mark.parametrize(
    ("ceiling", "asked", "got"),
    [
        ("interactive", "INTERACTIVE", "INTERACTIVE"),
        ("normal", "INTERACTIVE", "NORMAL"),
        ("normal", "UNSPECIFIED", "UNSPECIFIED"),
        ("batch", "UNSPECIFIED", "BATCH"),
        ("batch", "NORMAL", "BATCH"),
        ("normal", "BATCH", "BATCH"),
    ],
)
def test_a_priority_is_capped(ceiling: str, asked: str, got: str) -> None:
    caller = Caller(new_key(max_priority=ceiling)[0])
    assert caller.capped(priority_pb2.Priority.Value(f"PRIORITY_{asked}")) == priority_pb2.Priority.Value(
        f"PRIORITY_{got}"
    )


def test_models_are_named_with_wildcards() -> None:
    caller = Caller(new_key(models=("emoji-*", "sd15"))[0])
    assert caller.usable(["emoji-sd", "sd15", "sd15-inpaint", "EMOJI-x"]) == ["emoji-sd", "sd15"]
    with pytest.raises(PermissionDenied, match="is not for model 'sdxl'"):
        caller.require_model("sdxl")


@pytest.mark.parametrize("role", Role)
def test_a_role_has_the_rights_up_to_its_own(role: Role) -> None:
    caller = Caller(new_key(role=role)[0])
    for right in Right:
        if right <= RIGHTS[role]:
            caller.require(right)
        else:
            with pytest.raises(PermissionDenied, match=f"has the role {role}, and this takes (user|admin)"):
                caller.require(right)


def test_every_right_is_of_a_method_that_is_there() -> None:
    methods = {f"{service.full_name}/{one.name}" for service in _services() for one in service.methods}
    assert {name for name in GRPC if "/" in name} <= methods


def _services() -> Any:
    from imagemesh.v1 import gateway_service_pb2, job_service_pb2, preprocess_service_pb2, search_service_pb2

    files = (gateway_service_pb2, job_service_pb2, preprocess_service_pb2, search_service_pb2, service_pb2, health_pb2)
    return [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]


def test_what_is_not_listed_takes_an_admin() -> None:
    assert right_of_method("imagemesh.v1.NewService", "Do") is Right.MANAGE
    assert right_of_method("imagemesh.v1.SearchService", "DeleteIndex") is Right.MANAGE
    assert right_of_method("inference.GRPCInferenceService", "RepositoryModelUnload") is Right.MANAGE
    assert right_of_method("imagemesh.v1.JobService", "CancelJob") is Right.MAKE


def test_health_is_open_to_probes_and_not_to_who_watches_for_ever() -> None:
    assert right_of_method("grpc.health.v1.Health", "Check") is Right.OPEN
    assert right_of_method("grpc.health.v1.Health", "Watch") is Right.LOOK


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        ("GET", "/healthz", Right.OPEN),
        ("POST", "/healthz", Right.MAKE),
        ("GET", "/healthz/x", Right.LOOK),
        ("GET", "/metrics", Right.LOOK),
        ("GET", "/docs", Right.LOOK),
        ("POST", "/v1/jobs", Right.MAKE),
        ("DELETE", "/v1/index/pictures", Right.MANAGE),
        ("POST", "/v1/index", Right.MANAGE),
        ("POST", "/v1/search", Right.MAKE),
    ],
)
def test_requests_have_their_rights(method: str, path: str, right: Right) -> None:
    assert right_of_request(method, path) is right


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "localhost:1", "unix:/run/a.sock"])
def test_this_machine_alone_needs_no_keys(address: str) -> None:
    require_keys(GatewayConfig(listen=address))


@pytest.mark.parametrize("face", ["listen", "http_listen"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.7:1", "mesh.example:1", "localhost.evil:1", ":1"])
def test_other_addresses_do_unless_it_is_said_that_they_dont(face: str, address: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"keys_file.*allow_anyone"):
        require_keys(GatewayConfig(**{face: address}))  # type: ignore[arg-type]
    require_keys(GatewayConfig(**{face: address, "allow_anyone": True}))  # type: ignore[arg-type]
    require_keys(GatewayConfig(**{face: address, "keys_file": "keys.json"}))  # type: ignore[arg-type]
