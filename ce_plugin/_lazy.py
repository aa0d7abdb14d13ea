"""Names that a package imports on first use (PEP 562), and old names that still work for one version."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def lazy_names(
    package: str, names: Mapping[str, str], submodules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: its ``__name__``.
        names: public name -> the module that defines it.
        submodules: submodules that ``package.submodule`` imports on first use.

    Example:
        >>> get, _ = lazy_names(__name__, {"OrderedDict": "collections"})
        >>> get("OrderedDict")
        <class 'collections.OrderedDict'>
    """

    def get(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(names[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *names, *submodules})


def deprecated_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a package some of whose names have changed: the old ones still work, with a warning.

    Args:
        package: its ``__name__``.
        names: old name -> new one, "module.name".

    Warns:
        FutureWarning: an old name is used.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, new = names[name].rpartition(".")
        warn_renamed(f"{package}.{name}", names[name])
        return getattr(importlib.import_module(module), new)

    return get


def renamed_keywords(**names: str) -> Callable[[_Function], _Function]:
    """Decorator of a function some of whose keywords have changed: the old ones still work, with a warning.

    Args:
        names: old keyword = new keyword.

    Example:
        >>> @renamed_keywords(colour="color")
        ... def paint(color):
        ...     return color
        >>> with warnings.catch_warnings(record=True):
        ...     paint(colour="red")
        'red'
    """

    def decorated(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn_renamed(f"Argument `{old}`", f"`{names[old]}`")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller of the calling function that a name has changed.

    Warns:
        FutureWarning: always.
    """
    warnings.warn(
        f"{old} is called {new} now; the old name will be removed in the next version.", FutureWarning, stacklevel=3
    )
