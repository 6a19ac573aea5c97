"""The commands that index pictures and search them; in an index a picture is called by its file's whole path."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from imagemesh_cli.console import complain, connected, counted, print_json, print_table, progress_bar
from imagemesh_client import Client, Index, InvalidArgument, MeshError, Progress
from imagemesh_client.images import check_picture_file
from imagemesh_client.vision import MAX_IMAGES

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def index(args: Namespace) -> int:
    """Put a folder's pictures into an index; what is no picture is told and passed over."""
    files = sorted(set(_files(args.folders)))
    if not files:
        raise InvalidArgument("FOLDER", ", ".join(map(str, args.folders)), f"with files that end in {_SUFFIXES}")
    made: Index | None = None
    skipped: list[Path] = []
    with connected(args) as client, progress_bar("indexing") as show:
        for start in range(0, len(files), MAX_IMAGES):
            part = files[start : start + MAX_IMAGES]
            made = _add(client, args, part, skipped) or made
            show(Progress(start + len(part), len(files)))
    for path in skipped:
        complain(f"{path} is no picture that can be read, and is left out")
    if args.json:
        told = None if made is None else asdict(made)
        print_json({"index": told, "added": len(files) - len(skipped), "skipped": list(map(str, skipped))})
    elif made is not None:
        added = counted(len(files) - len(skipped), "picture")
        print(f"{made.name}: {added} added, {made.count:,} in all, by {made.model}")
    return 0 if made is not None else 1


def search(args: Namespace) -> int:
    """Find the pictures of an index that are most like one."""
    with connected(args) as client:
        found = client.indexes.search(args.index, args.file, args.top_k, min_similarity=args.min_similarity)[0]
    if args.json:
        print_json([asdict(one) for one in found])
        return 0
    for one in found:
        print(f"{one.similarity:.4f} {one.id}")
    return 0


def duplicates(args: Namespace) -> int:
    """Find an index's pictures that are nearly the same."""
    with connected(args) as client:
        found = client.indexes.duplicates(args.index, args.min_similarity, args.limit)
    if args.json:
        print_json([asdict(one) for one in found])
        return 0
    for one in found:
        print(f"{one.similarity:.4f} {one.first} {one.second}")
    return 0


def clusters(args: Namespace) -> int:
    """Part an index's pictures into groups that are alike."""
    with connected(args) as client:
        found = client.indexes.clusters(args.index, args.clusters, seed=args.seed)
    if args.json:
        members = [
            {"id": one, "cluster": cluster, "similarity": similarity}
            for one, (cluster, similarity) in sorted(found.members.items(), key=lambda item: (item[1][0], -item[1][1]))
        ]
        print_json({"clusters": [asdict(group) for group in found.groups], "pictures": members})
        return 0
    rows = [
        (str(i), f"{group.count:,}", f"{group.mean_similarity:.4f}", group.example)
        for i, group in enumerate(found.groups)
    ]
    print_table(("CLUSTER", "PICTURES", "LIKENESS", "EXAMPLE"), rows)
    return 0


def vectors(args: Namespace) -> int:
    """Write an index's vectors to a Parquet file."""
    with connected(args) as client:
        count = client.indexes.export(args.index, args.output)
    if args.json:
        print_json({"file": str(args.output), "count": count})
    else:
        print(f"{args.output}: {counted(count, 'picture')}")
    return 0


def indexes(args: Namespace) -> int:
    """List the indexes, or delete one."""
    with connected(args) as client:
        if args.delete is not None:
            client.indexes.delete(args.delete)
        found = client.indexes.list()
    if args.json:
        print_json([asdict(one) for one in found])
        return 0
    rows = [(one.name, f"{one.count:,}", one.model, one.pooling, str(one.width), one.store) for one in found]
    print_table(("INDEX", "PICTURES", "MODEL", "POOLING", "WIDTH", "STORE"), rows)
    return 0


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Absolute, so that the same picture has the same id wherever the command runs."""
    for path in paths:
        if not path.is_dir():
            yield path.absolute()
            continue
        for one in path.rglob("*"):
            if one.suffix.lower() in _SUFFIXES and one.is_file():
                yield one.absolute()


def _add(client: Client, args: Namespace, files: list[Path], skipped: list[Path]) -> Index | None:
    """Add those that can be read; where a call fails for a picture they go one by one, so that it alone is left out."""
    good: list[Path] = []
    for path in files:
        try:
            check_picture_file(path)
            good.append(path)
        except InvalidArgument:
            skipped.append(path)
    if not good:
        return None
    try:
        return _call(client, args, good)
    except MeshError as error:
        if not _about_a_picture(error):
            raise
    made: Index | None = None
    for path in good:
        try:
            made = _call(client, args, [path])
        except MeshError as error:
            if not _about_a_picture(error):
                raise
            skipped.append(path)
    return made


def _call(client: Client, args: Namespace, files: list[Path]) -> Index:
    return client.indexes.add(args.index, files, map(str, files), model=args.model, pooling=args.pooling)


def _about_a_picture(error: MeshError) -> bool:
    return str(error).startswith("images[")
