"""Pickles of others, read without running what they hold: only classes on a list are made, nothing is imported."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch


class ForeignClass(pickle.UnpicklingError):
    """A pickle holds a class or function that is not on the list; `name` is its module and name."""

    def __init__(self, name: str):
        super().__init__(f"it holds {name}, which is not loaded because it could run code")
        self.name = name


class Inert:
    """Stands where an object of a class stood that is not needed: takes any arguments and state, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """What a pickle does with a list."""

    def extend(self, _: Any) -> None:
        """What a pickle does with a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a pickle does with a dictionary."""


def _member(kind: Any, name: Any) -> Any:
    """A member of an enumeration, as Python 3.11.0 to 3.11.3 (Debian 12's) write one: `getattr(kind, name)`."""
    if kind is Inert:
        return Inert()
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise ForeignClass("builtins.getattr")


def restricted(allowed: Mapping[str, Any], inert: tuple[str, ...] = ()) -> type:
    """What `torch.load` takes as `pickle_module`, and its `load(file)`: a pickle may name only `allowed`.

    `allowed` maps `module.name` to what is to be called for it; of the packages in `inert`, anything may be named and
    becomes `Inert`. Loading raises ForeignClass for all else, and pickle.UnpicklingError for what is no pickle.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            name = f"{module_name}.{global_name}"
            if name in allowed:
                return allowed[name]
            if name == "builtins.getattr":
                return _member
            if module_name.split(".", 1)[0] in inert:
                return Inert
            raise ForeignClass(name)

    def load(file: IO[bytes], **options: Any) -> Any:
        try:
            return Unpickler(file, **options).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # chance bytes call anything on anything
            raise pickle.UnpicklingError(f"it is no pickle ({type(error).__name__}: {error})") from error

    return type("pickle", (), {"Unpickler": Unpickler, "load": staticmethod(load)})


def load_file(path: Path, pickle_module: type) -> Any:
    """The content of a file by `torch.save`, its tensors mapped from the file instead of read; see `restricted`.

    Raises pickle.UnpicklingError that says what is wrong, and OSError.
    """
    try:
        # torch itself does not compare the checksums, and maps a file that is one zip archive with one pickle only.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise pickle.UnpicklingError(f"it is damaged (the checksum of {damaged} is wrong)")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickle_module)
    except (pickle.UnpicklingError, OSError):
        raise
    except zipfile.BadZipFile as error:
        raise pickle.UnpicklingError("it is damaged (no whole archive by torch.save)") from error
    except Exception as error:  # chance bytes call anything on anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise pickle.UnpicklingError(f"it is damaged ({reason})") from error
