"""elsewhere: masked-image pre-training of vision transformers that are not told exactly where a masked patch is."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["load", "pretrain"]

if TYPE_CHECKING:
    from .launch.load import load
    from .launch.pretrain import pretrain


def __getattr__(name: str):
    # torch takes seconds to import, so the package waits with it until something is used.
    if name == "load":
        from .launch.load import load

        return load
    if name == "pretrain":
        from .launch.pretrain import pretrain

        return pretrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
