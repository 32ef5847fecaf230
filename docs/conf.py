"""How the documentation is built: sphinx-build -W -n -c docs . build/site.

The source folder is the root of the repository, so that README.md, CONTRIBUTING.md and docs/ link to each other as they
do where the code is hosted.
"""

import re
import runpy
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "iexact_runner"
project_copyright = "the authors of iexact_runner"
extensions = ["myst_nb"]
# Run once for each version of the notebook; what fails in it ends the build.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "docs/tutorial.ipynb"]
root_doc = "docs/index"
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_copy_source = False
smartquotes = False
# The first page lies below docs/.
FIRST_PAGE = '<!doctype html><title>iexact_runner</title><meta http-equiv="refresh" content="0; url=docs/index.html">'


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts the tables of a group of the configuration where a page of the reference marks their place."""
    tables = app.config_reference["page"]
    source[0] = re.sub(r"^<!-- config: (\w+) -->$", lambda mark: tables(mark[1]), source[0], flags=re.MULTILINE)


def write_first_page(app: Sphinx, error: Exception | None) -> None:
    """Leads from the top of the site to its first page."""
    if error is None:
        Path(app.outdir, "index.html").write_text(FIRST_PAGE, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """What the build calls when."""
    app.config_reference = runpy.run_path(str(ROOT / "scripts" / "docs" / "config_reference.py"))
    app.connect("source-read", fill_in)
    app.connect("build-finished", write_first_page)
