"""One self-contained HTML page a run, one a suite of runs: curves, distributions, text, configuration, warnings.

Plots are described once (:mod:`plots`) and drawn twice: as inline SVG for the page, by matplotlib for papers.
"""
