"""Configuration of the ViT service."""

from dataclasses import dataclass, field
from typing import ClassVar

from imagemesh_runtime.config import ModelServerConfig


@dataclass(frozen=True)
class VitConfig(ModelServerConfig):
    """See ``ModelServerConfig``; ``max_batch`` counts pictures."""

    SERVICE: ClassVar[str] = "vit"
    listen: str = "127.0.0.1:50055"
    max_batch: int = 32
    # Pictures being decoded and preprocessed at a time: a small file may hold 67 million pixels.
    max_decoding: int = 2
    # Load weights also from PyTorch pickles, with torch's weights-only loader.
    unsafe_pickles: bool = False
    # Where search keeps its indexes; empty: in a folder of the user's state.
    index_root: str = ""
    # A name in search's STORES, or "auto": the first one whose library is here.
    index_store: str = "auto"
    # Where a store that is a database of its own listens, and what lets us in.
    index_url: str = ""
    index_token: str = field(default="", repr=False)
    # Look at every vector, and miss none; else by the database's graph, which is faster among millions.
    index_exact: bool = True
    max_indexes: int = 64
    # Pictures of one index: as float32 of width 768 a million take 3 GB of memory, and as much of the disk.
    max_index_entries: int = 1_000_000
