"""The packages of this repository under a name that no other project has, for hubconf.py.

As in the installed package, net and dataset are subpackages: `proxy_anchor_hub.net` is net/, `proxy_anchor_hub.losses`
is code/losses.py. Their imports from proxy_anchor lead here too. What torch.hub returned can be pickled, as its classes
stay importable, and nobody's own `net`, `dataset` or `proxy_anchor` is touched.
"""

import importlib.machinery
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
__path__ = [str(REPOSITORY / "code"), str(REPOSITORY)]
IMPORT = re.compile(r"^( *from )proxy_anchor\b", re.MULTILINE)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = IMPORT.sub(rf"\1{__name__}", self.get_source(fullname))
        return compile(source, self.path, "exec", dont_inherit=True)  # not cached: the same files are imported as usual


class _Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.startswith(f"{__name__}.") else None
        if spec and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)
