"""UNITE trained fast: one transformer that is both an image tokenizer and a latent flow-matching generator.

from unite_fast import load

model = load("runs/digits")     # images to latents and back, samples by class name: unite_fast.library
"""

__version__ = "0.1.0"
__all__ = ["Model", "load"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unite_fast.library import Model, load


def __getattr__(name: str):
    """What the library offers, imported when it is asked for: it brings torch along."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unite_fast import library

    return getattr(library, name)
