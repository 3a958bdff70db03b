"""Other ways to compress a KV cache, one file each, measured by the same harness with the same exact tokens.

A peer is a `Storage` that a file of this package registers by name; adding one is adding such a file::

    @register("mine-4")
    def mine(setting: Setting) -> Method:
        return from_storage("mine-4", Mine(), setting)

Importing this package imports every module in it. A peer whose package is not installed still has its name; making it
raises an ImportError that names the package.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
