"""Registers the emulator loaders with transformers and diffusers, now or when each of them is imported.

Two things must hold. After `import onelayer.runtime`, plain `AutoModel.from_pretrained(emulator)` works, whichever was
imported first. And `onelayer --help` and `run --dry-run`, whose modules are in this package too, answer in a fraction
of a second, so importing the package must not import torch. So this is a post-import hook (as in PEP 369): the loader
is registered right after a library's own registry of loading methods has been imported, and not before.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Importing a plugin registers the loader in the registry of its library.
PLUGINS = {
    "transformers.quantizers": "onelayer.runtime.modules.transformers_plugin",
    "diffusers.quantizers.auto": "onelayer.runtime.modules.diffusers_plugin",
}


def register_loader() -> None:
    """Register the emulator loaders now for registries that are imported, else right after their import."""
    waiting = {finder.registry for finder in sys.meta_path if isinstance(finder, _RegistryFinder)}
    for registry, plugin in PLUGINS.items():
        if registry in sys.modules:
            importlib.import_module(plugin)
        elif registry not in waiting:
            sys.meta_path.insert(0, _RegistryFinder(registry))


class _RegistryFinder(MetaPathFinder):
    """Finds one module, once, by the other finders, and wraps its loader."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.registry:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PluginLoader(spec.loader, PLUGINS[fullname])
        return spec


class _PluginLoader(Loader):
    """Loads a module with its own loader, then imports the plugin."""

    def __init__(self, loader: Loader, plugin: str) -> None:
        self._loader, self._plugin = loader, plugin

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its ordinary loader, which `inspect` and `pkgutil` ask for its source.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(self._plugin)
