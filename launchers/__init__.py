"""Where runs execute. Their import name is `hydra_plugins.soup_launchers` everywhere.

`local.py` and `slurm.py` are Hydra's launchers: they hand all points of a sweep to soup at once. Once those are
checked and on disk, `_local.py` (or `_slurm.py`) runs them: `start(sweep, say, only=None)` returns an exit status,
`cancel(sweep, say)` stops what is under way. Neither sees Hydra or a configuration: what they read lies in the
sweep's folder and in the folders of its runs.
"""
