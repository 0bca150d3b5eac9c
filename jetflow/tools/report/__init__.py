"""Pages of a run or a sweep for a person: what they say, and how it is set in HTML, Markdown, CSV.

`run.py` and `sweep.py`, with `axes.py` and `found.py`, read a folder and say what is on its page,
in the parts of `content.py`; `html.py`, with the plots of `svg.py`, and `text.py` set them.
"""
