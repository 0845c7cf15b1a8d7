"""ayllu: the open Llama 4 system. `docs/architecture.md` says which room holds what."""

__version__ = "0.1.0"
