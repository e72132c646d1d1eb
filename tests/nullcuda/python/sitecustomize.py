"""Python itself imports this on the null device (run.sh): it patches modules after their import."""

import importlib.abc
import importlib.machinery
import os
import sys

import nullcuda


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module as Python would, and has its loader call a patch when the module is executed."""

    def __init__(self, patches):
        self.patches = patches

    def find_spec(self, name, path, target=None):
        patch = self.patches.get(name)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("NULLCUDA_LIBRARY"):
    sys.meta_path.insert(0, AfterImport(nullcuda.patches()))
