"""The Proxy-Anchor loss, exact Recall@K, and the embeddings of trained networks; docs/api.md describes them.

In a checkout, the modules of this package are in code/, because `code` itself is a standard-library module.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy_anchor.api import Search as Search
    from proxy_anchor.api import load as load
    from proxy_anchor.losses import ProxyAnchor as ProxyAnchor
    from proxy_anchor.retrieval import best_positive_rank as best_positive_rank
    from proxy_anchor.retrieval import map_at_r as map_at_r
    from proxy_anchor.retrieval import recall_at_k as recall_at_k

__version__ = "1.1.0"
PUBLIC = {  # name: its module
    "ProxyAnchor": "losses",
    "recall_at_k": "retrieval",
    "map_at_r": "retrieval",
    "best_positive_rank": "retrieval",
    "load": "api",
    "Search": "api",
}
__all__ = [*PUBLIC, "__version__"]
IN_CHECKOUT = "__path__" not in globals()  # which an installed package has
if IN_CHECKOUT:
    __path__ = [str(Path(__file__).with_name("code"))]


def __getattr__(name: str):
    """A public name, or net and dataset, which lie beside this file in a checkout; imported when first used.

    Raises ImportError if another module of their name comes first.
    """
    if name in PUBLIC:
        return getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    if IN_CHECKOUT and name in ("net", "dataset"):
        module = import_module(name)
        if Path(str(module.__file__)).parent.resolve() != Path(__file__).resolve().with_name(name):
            raise ImportError(f"{module.__file__} hides {name}/ of {__file__}: rename it, or install this package")
        return module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
