"""Adapters in weight form in the place of what they were.

merge_sums.py  `u·W + s·(u·A)·B` as `u·W'`
merge_maps.py  a map's region as `u·W' + b'`
rounding.py    the one place where W' is rounded
"""

from peft_fx.passes.editor import REBUILD as REBUILD  # these four until the last module has moved
from peft_fx.passes.editor import SAVE as SAVE
from peft_fx.passes.editor import Editor as Editor
from peft_fx.passes.editor import erase_unused as erase_unused

Builder = Editor
