"""``python -m srpo_kernels.verify --report DIR``: everything that a device can say of the library, section by section.

Sections run in a process of their own, one after the other, and each is in ``DIR/report.json`` as soon as it is done:
a section that fails, crashes or hangs loses none of the others, and the same command goes on where the last one ended.
``DIR/report.md`` is the same in tables.
"""
