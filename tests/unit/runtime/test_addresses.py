"""What a channel can be opened to, told from what a user may take for it."""

import pytest

from imagemesh_runtime.addresses import is_address
from imagemesh_runtime.client import Peer
from imagemesh_runtime.errors import InvalidArgument


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:50050", "localhost:1", "[::1]:65535", "unix:/run/mesh.sock", "dns:///mesh.default.svc:50050",
     "ipv4:127.0.0.1:50050", "a-b.example:50050"],
)  # fmt: skip
def test_addresses_are_taken(address: str) -> None:
    assert is_address(address)


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "http://localhost:50050", "https://mesh", "grpc://mesh:50050", "localhost:http", "localhost:",
     ":50050", "localhost:0", "localhost:65536", "::1:50050", "a b:50050", "localhost:50050/x", "localhost:٣", "unix:"],
)  # fmt: skip
def test_what_is_no_address_is_told_from_them(address: str) -> None:
    assert not is_address(address)


async def test_a_service_configured_at_a_url_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"address of vae must be host:port .* got 'http://vae:50053'"):
        Peer("vae", "http://vae:50053", max_message_bytes=1 << 20)
