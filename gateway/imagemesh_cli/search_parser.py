"""The options of the commands that index pictures and search them."""

from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from typing import Final

from imagemesh_cli.option_types import file, file_or_folder, file_to_write, number, whole

DEFAULT_INDEX: Final = "pictures"


def _add_index(parser: ArgumentParser) -> None:
    """``imagemesh index``."""
    parser.add_argument(
        "folders",
        type=file_or_folder,
        nargs="+",
        metavar="FOLDER",
        help="of pictures, also in folders below; or a file",
    )
    _index(parser)
    parser.add_argument("--model", default="", metavar="NAME", help="of a new index (default: the mesh's own)")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="auto", help="default: cls where there is one")


def _add_search(parser: ArgumentParser) -> None:
    """``imagemesh search``."""
    parser.add_argument("file", type=file, metavar="FILE", help="a picture: PNG, JPEG or WebP")
    _index(parser)
    parser.add_argument("--top-k", type=whole(1, 1000), default=10, metavar="K", help="most to find (default: 10)")
    parser.add_argument(
        "--min-similarity", type=number, metavar="S", help="leave out what is less alike, -1 to 1 (default: nothing)"
    )


def _add_duplicates(parser: ArgumentParser) -> None:
    """``imagemesh duplicates``."""
    _index(parser)
    parser.add_argument(
        "--min-similarity", type=number, default=0.95, metavar="S", help="of a pair, above 0 to 1 (default: 0.95)"
    )
    parser.add_argument("--limit", type=whole(1, 10_000), default=1000, metavar="N", help="most pairs (default: 1000)")


def _add_clusters(parser: ArgumentParser) -> None:
    """``imagemesh clusters``."""
    _index(parser)
    parser.add_argument("--clusters", type=whole(1, 1000), default=8, metavar="K", help="how many (default: 8)")
    parser.add_argument("--seed", type=whole(0, 2**31 - 1), default=0, metavar="N", help="the same again parts the "
        "same pictures the same (default: 0)")  # fmt: skip


def _add_vectors(parser: ArgumentParser) -> None:
    """``imagemesh vectors``."""
    _index(parser)
    parser.add_argument(
        "-o", "--output", type=file_to_write, required=True, metavar="FILE", help="to write, as Parquet"
    )


def _add_indexes(parser: ArgumentParser) -> None:
    """``imagemesh indexes``."""
    parser.add_argument("--delete", metavar="NAME", help="delete this one, with all that is in it")


def _index(parser: ArgumentParser) -> None:
    parser.add_argument("--index", default=DEFAULT_INDEX, metavar="NAME", help="which index (default: %(default)s)")


# What each command does, and what gives it its options.
SEARCH_COMMANDS: Final[Mapping[str, tuple[str, Callable[[ArgumentParser], None]]]] = {
    "index": ("put a folder's pictures into an index, to search them", _add_index),
    "search": ("find the pictures of an index that are most like one", _add_search),
    "duplicates": ("find an index's pictures that are nearly the same", _add_duplicates),
    "clusters": ("part an index's pictures into groups that are alike", _add_clusters),
    "vectors": ("write an index's vectors to a Parquet file, for other programs", _add_vectors),
    "indexes": ("list the indexes, or delete one", _add_indexes),
}
