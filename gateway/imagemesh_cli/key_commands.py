"""The commands about API keys."""

from argparse import Namespace
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from imagemesh_cli.console import print_json, print_table
from imagemesh_gateway.access.keys import Key, Role, add_key, digest_of, new_token, read_keys
from imagemesh_gateway.access.keys import revoke_key as revoke
from imagemesh_runtime.errors import InvalidArgument


def create_key(args: Namespace) -> int:
    """Make a key; tell it."""
    made, token = new_token()
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        key = Key(
            id=made,
            sha256=digest_of(token),
            name=args.name,
            tenant=args.tenant,
            role=Role(args.role),
            created=now,
            expires=None if args.expires is None else now + timedelta(seconds=args.expires),
            models=tuple(args.model),
            max_priority=args.max_priority,
            calls_per_minute=args.calls_per_minute,
            burst=args.burst,
            pixel_steps_per_day=args.pixel_steps_per_day,
            max_jobs=args.max_jobs,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidArgument(f"--{str(first['loc'][0]).replace('_', '-')}", first["input"], first["msg"]) from None
    add_key(args.file, key)
    if args.json:
        print_json(_json(key) | {"key": token})
    else:
        print(token)
    return 0


def list_keys(args: Namespace) -> int:
    """List the keys, the newest last."""
    keys = sorted(read_keys(args.file).values(), key=lambda key: key.created)
    if args.json:
        print_json({"keys": [_json(key) for key in keys]})
        return 0
    rows = [
        (key.id, key.state, key.tenant, key.role, _local(key.created), _local(key.expires), key.name) for key in keys
    ]
    print_table(("ID", "STATE", "TENANT", "ROLE", "CREATED", "EXPIRES", "NAME"), rows)
    return 0


def revoke_key(args: Namespace) -> int:
    """Revoke a key."""
    key = revoke(args.file, args.key)
    if args.json:
        print_json(_json(key))
    else:
        print(f"{key.id}: {key.state}")
    return 0


def _json(key: Key) -> dict[str, object]:
    """All of it but its hash."""
    return {**key.model_dump(mode="json", exclude={"sha256"}), "state": key.state}


def _local(time: datetime | None) -> str:
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
