"""How Sphinx builds the site. `make docs` runs docs/build.py first, which writes the pages."""

project = "ssah_nb"
author = "The ssah_nb authors"
copyright = "2026, the ssah_nb authors"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

html_theme = "furo"
html_title = "ssah_nb"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
