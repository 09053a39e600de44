"""The site: `make docs` builds it into build/site, `make docs-open` serves it."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import messages  # noqa: E402

from randlora_jax import __version__  # noqa: E402

(ROOT / "build").mkdir(exist_ok=True)
(ROOT / "build" / "errors.md").write_text(messages.page())

project = "randlora-jax"
author = "The randlora-jax authors"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
nitpicky = False
default_role = "py:obj"  # `name` in a docstring is a link, where the site has that name

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 600  # of one cell, on a machine that has much else to do
nb_execution_raise_on_error = True
nb_merge_streams = True  # what a cell prints is one box
nb_execution_in_temp = True  # what they write is gone afterwards
os.environ["MATPLOTLIBRC"] = str(ROOT / "docs")  # which is read by default where a program runs
os.environ["HF_HUB_OFFLINE"] = "1"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "randlora-jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
