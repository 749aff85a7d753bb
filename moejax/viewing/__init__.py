"""One HTML page that shows where each token goes; opened from disk, it asks no network.

`gathering` runs the model and makes a `Panel` of each checkpoint; `packing` turns panels into
JSON of typed arrays; `page` puts that, the style sheet and the scripts of template/ in one file.
"""

from moejax.viewing.packing import pack
from moejax.viewing.page import page
from moejax.viewing.panel import History, Panel, Sizes

__all__ = ["History", "Panel", "Sizes", "pack", "page"]
