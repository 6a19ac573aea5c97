"""The commands that show pictures to a gateway: any number of them, a stream for every few hundred."""

import re
from argparse import Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from google.rpc import status_pb2

from imagemesh_cli.client_commands import numbered
from imagemesh_cli.console import connected, print_json, progress_bar
from imagemesh_client import Classification, Embeddings, MeshError, Progress, RemoteError
from imagemesh_client.images import check_picture_file

Answer = TypeVar("Answer")
# A call that answers a list of pictures one by one, what is wrong with a picture in its place.
Call = Callable[[Sequence[Path]], Generator[Answer | MeshError, None, None]]

# Pictures of one stream: the timeout is one stream's, and must not bound how many pictures there may be.
A_STREAM: Final = 256


def classify(args: Namespace) -> int:
    """Name what is in pictures."""
    with connected(args) as client:

        def call(files: Sequence[Path]) -> Generator[Classification | MeshError, None, None]:
            return client.classify_stream(files, args.top_k, threshold=args.threshold, size=args.size, model=args.model)

        answers = _see(call, args.files, "classifying")
    pairs = list(zip(map(str, args.files), answers, strict=True))
    if args.json:
        print_json([{"file": file, **asdict(answer)} for file, answer in pairs])
        return 0
    for file, answer in pairs:
        for prediction in answer.predictions:
            print(f"{file}: {prediction.label} {prediction.probability:.1%}")
        if not answer.predictions:
            print(f"{file}: no label of at least {args.threshold:.1%}")
    return 0


def embed(args: Namespace) -> int:
    """Turn pictures into vectors."""
    with connected(args) as client:

        def call(files: Sequence[Path]) -> Generator[Embeddings | MeshError, None, None]:
            return client.embed_stream(
                files, args.pooling, args.normalize, dtype=args.dtype, size=args.size, model=args.model,
                attention_maps=args.attention is not None,
            )  # fmt: skip

        answers = _see(call, args.files, "embedding")
    if args.output is not None:
        _write(args.output, answers)
    if args.attention is not None:
        for path, answer in zip(numbered(args.attention, len(answers)), answers, strict=True):
            path.write_bytes(answer.attention_maps[0])
    _tell_embeddings(list(zip(map(str, args.files), answers, strict=True)), args.json)
    return 0


def _write(path: Path, answers: Sequence[Embeddings]) -> None:
    """The vectors as an array of numpy; int8 ones go into an archive with their scales."""
    vectors = np.concatenate([answer.vectors for answer in answers])
    scales = [answer.scales for answer in answers if answer.scales is not None]
    with path.open("wb") as file:  # numpy would give a name of another suffix another one
        if scales:
            np.savez(file, vectors=vectors, scales=np.concatenate(scales))
        else:
            np.save(file, vectors)


def _tell_embeddings(pairs: Sequence[tuple[str, Embeddings]], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {"file": file, "model": one.model, "backend": one.backend, "embedding": one.as_float32()[0].tolist()}
                for file, one in pairs
            ]
        )
        return
    for file, one in pairs:
        vector = one.as_float32()[0]
        start = " ".join(f"{value:.4f}" for value in vector[:4])
        print(f"{file}: {len(vector)} numbers, length {np.linalg.norm(vector):.4f}: {start} ...")


def _see(call: Call[Answer], files: Sequence[Path], label: str) -> list[Answer]:
    """The answers for all files, in their order, under a bar.

    Raises:
        InvalidArgument: a file is no picture; the error names it. Files of another kind are told before any is sent.
        MeshError: the mesh can't answer.
    """
    for file in files:
        check_picture_file(file)
    found: list[Answer] = []
    with progress_bar(label) as show:
        for start in range(0, len(files), A_STREAM):
            with closing(call(files[start : start + A_STREAM])) as answers:
                for answer in answers:
                    if isinstance(answer, MeshError):
                        raise _about(files[len(found)], answer)
                    found.append(answer)
                    show(Progress(len(found), len(files)))
    return found


def _about(file: Path, error: MeshError) -> MeshError:
    """The error with the file's name in the place of its field, where it is about the picture: it was sent alone."""
    text = re.sub(r"^images\[0\](\.\w+)*", lambda _: str(file), str(error))
    return RemoteError(status_pb2.Status(code=error.code.value[0], message=text))
