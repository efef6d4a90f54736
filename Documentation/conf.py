# SPDX-License-Identifier: GPL-2.0
#
# Sphinx's configuration for "make htmldocs". Its source directory is the repository, since the pages at
# the top of the tree belong to the documentation, too.

import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
top = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

with open(os.path.join(top, "Makefile"), encoding="utf-8") as makefile:
    release = version = re.search(r"^VERSION := (\S+)$", makefile.read(), re.M)[1]

project = "rnbd"
copyright = "the rnbd authors"
root_doc = "Documentation/index"
include_patterns = ["*.md", "Documentation/*.rst"]
exclude_patterns = [".git", "build", "kapi", "tests", "tools"]

extensions = ["myst_parser", "checks"]
# Links between files, as a git host understands them, are for checks.py to resolve.
myst_all_links_external = True

highlight_language = "none"
smartquotes = False

html_theme = "alabaster"
html_theme_options = {
    "description": f"A network block device client for Linux, in Rust. Version {release}",
    "page_width": "1180px",
    "body_max_width": "none",
    "font_family": "sans-serif",
    "head_font_family": "sans-serif",
    "font_size": "15px",
}
html_static_path = ["htmldocs.css"]
html_css_files = ["htmldocs.css"]
html_copy_source = False
html_show_sphinx = False
