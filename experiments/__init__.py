"""Experiments: one module per figure, one Hydra entry to run them, one report.

A figure is ``experiments/<paper>/<figure>.py`` plus ``conf/experiment/<paper>/<figure>.yaml``. The module
defines

- ``TITLE``: one line; ``CLAIM``: what the paper says and how far ours is expected to match;
- ``Config``: a frozen, slotted, keyword-only dataclass with the settings; defaults live here and nowhere
  else;
- ``run(cfg, context) -> list[Row]``: computes rows (see ``record.Row``) and never plots;
- ``plot(rows) -> Figure``: draws a DataFrame of those rows with ``experiments.style`` and never computes;
- ``compare(rows) -> list[Comparison]``: the numbers of the claim, the paper's beside ours.

A file whose name starts with an underscore is a helper and no experiment.
"""

from pathlib import Path
from pkgutil import extend_path

# Another directory on sys.path may hold more papers in a package experiments/ of its own; they are found like
# these. Without an __init__.py a directory of that name is something else, for example tests/experiments.
__path__ = [root for root in extend_path(__path__, __name__) if Path(root, "__init__.py").is_file()]
