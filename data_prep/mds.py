"""The door to MosaicML Streaming: its MDS reader, writer and downloads, without the rest of it.

The package imports transformers and torchvision for datasets that are not used here, two seconds in
every process that starts. Its parts do not need that: they are loaded here with the package's own
beginnings left out, and whoever imports `streaming` itself gets all of it, the same parts included.
"""

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def _beginnings_left_out() -> Iterator[None]:
    found = importlib.util.find_spec("streaming")
    assert found
    assert found.origin
    root, made = Path(found.origin).parent, {}
    for name, folder in (("streaming", root), ("streaming.base", root / "base")):
        if name not in sys.modules:
            made[name] = sys.modules[name] = types.ModuleType(name)
            made[name].__path__ = [str(folder)]
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


with _beginnings_left_out():
    from streaming.base.format.mds.writer import MDSWriter
    from streaming.base.spanner import Spanner
    from streaming.base.storage.download import CloudDownloader
    from streaming.base.stream import Stream
    from streaming.base.world import World

__all__ = ["CloudDownloader", "MDSWriter", "Spanner", "Stream", "World"]
