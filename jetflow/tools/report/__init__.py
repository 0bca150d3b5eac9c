"""One page of a run or a sweep, in HTML, Markdown or CSV.

`run_page.py` and `sweep_page.py` make plain values of a folder. `templates/run.j2` and `sweep.j2`
say what is on the page, by the blocks (sections, tables, plots) of `html.j2` or `md.j2`.
"""
