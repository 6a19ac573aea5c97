"""API keys for tests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from imagemesh_gateway.access.keys import Key, add_key, digest_of, new_token

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def new_key(tenant: str = "a", **fields: Any) -> tuple[Key, str]:
    """A key and its token; ``expired`` and ``revoked`` say whether it is."""
    made, token = new_token()
    if fields.pop("expired", False):
        fields["expires"] = NOW + timedelta(days=1)
    if fields.pop("revoked", False):
        fields["revoked"] = NOW
    return Key(id=made, sha256=digest_of(token), tenant=tenant, created=NOW, **fields), token


def key_file(path: Path, **keys: dict[str, Any]) -> dict[str, str]:
    """Write a file of keys; the answer is their tokens by the names that they are given."""
    tokens = {}
    for name, fields in keys.items():
        key, tokens[name] = new_key(**{"name": name, **fields})
        add_key(path, key)
    return tokens
