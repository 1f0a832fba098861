"""Numba's cache on disk, so that it can never end a command: where it can't be used, functions are compiled anew.

As Numba has it, `njit(cache=True)` raises "no locator available" where neither the folder of the source file nor the
user's cache folder can be written to (a read-only checkout in a container whose user has no home), and a damaged file
or a full disk raises at each call. umap and pynndescent decorate nearly two hundred functions that way.

`install` replaces the cache of all functions that are decorated after it, theirs included:

- Where Numba finds no place, a folder in the temporary directory is taken that only this user can read or write: what
  lies in it is executed. Where that can't be had either, nothing is cached.
- A file that can't be read, or whose checksum is wrong, counts as missing, and is replaced after the compilation.
- What can't be written isn't cached.

Progress lines (terminal.py) say when a function is being compiled.
"""

import contextlib
import os

from numba import njit
from numba.core import caching, dispatcher, event
from numba.np.ufunc import ufuncbuilder

import cli

__all__ = ["install", "njit"]  # whoever takes njit from here decorates after the installation


class _UserWideLocator(caching.UserWideCacheLocator):
    """Numba's place in the user's home. Without a home, Numba would make a folder named `~` in the working folder."""

    @classmethod
    def from_function(cls, py_func, py_file):
        if not os.path.isabs(os.path.expanduser("~")):
            return None
        return super().from_function(py_func, py_file)


class _TemporaryLocator(caching.UserWideCacheLocator):
    """The last resort: this user's own folder in the temporary directory."""

    def get_cache_path(self):
        return os.path.join(cli.private_folder(), "numba", os.path.basename(self._cache_path))


class _Impl(caching.CompileResultCacheImpl):
    _locator_classes = [_UserWideLocator if locator is caching.UserWideCacheLocator else locator
                        for locator in caching.CacheImpl._locator_classes] + [_TemporaryLocator]


class _Files(caching.IndexDataCacheFile):
    """Numba's two kinds of files with a checksum behind the data: damaged machine code would be executed.

    Numba alone can still read them: a pickle says itself where it ends.
    """

    def _dump(self, obj):
        return cli.with_checksum(super()._dump(obj))

    def _load_data(self, name):
        with open(self._data_path(name), "rb") as file:
            if cli.without_checksum(file.read()) is None:
                return None
        return super()._load_data(name)


class _Cache(caching.FunctionCache):
    """A function's cache that raises nothing. What can go wrong with a damaged pickle is open-ended."""

    _impl_class = _Impl

    def __init__(self, py_func):
        super().__init__(py_func)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except Exception:
            with contextlib.suppress(Exception):  # once more, with a new index: the old one may be what is damaged
                self.flush()
                super().save_overload(sig, data)


def _cache_or_none(py_func):
    """The cache of a function, or one that holds nothing where there is no place for it."""
    try:
        return _Cache(py_func)
    except (RuntimeError, OSError):
        return caching.NullCache()


class _Tell(event.Listener):
    """Lets progress lines say that a function is being compiled: once per machine where it has a cache."""

    def words(self, compiling):
        cached = not isinstance(getattr(compiling.data["dispatcher"], "_cache", None),
                                (caching.NullCache, type(None)))
        return "compiling kernels, once" if cached else "compiling kernels"

    def on_start(self, compiling):
        cli.DOING.append(self.words(compiling))

    def on_end(self, compiling):
        cli.DOING.remove(self.words(compiling))


def install():
    """Give all functions that are decorated with `njit(cache=True)` or `vectorize(cache=True)` from now on a cache that
    raises nothing."""
    dispatcher.FunctionCache = ufuncbuilder.FunctionCache = _cache_or_none


install()
event.register("numba:compile", _Tell())
