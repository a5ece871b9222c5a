#!/usr/bin/env python3
"""papermill, with the notebook's own progress bars in the terminal: same arguments, same executed notebook.

    python tools/run.py nbs/train_uda.ipynb outputs/demo.ipynb -p source demo

papermill alone shows one bar that counts cells, so an hour of training is one motionless line. Here the kernel's
stdout and stderr are passed on as they come, and the executed notebook keeps the last state of each bar instead of
every redraw.
"""

import os
import shutil
import sys

OPTIONS = '--no-progress-bar --stdout-file - --stderr-file - --log-level WARNING'.split()


def main(args):
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
    os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    # the kernel has no terminal of its own: its bars fit ours
    columns, rows = shutil.get_terminal_size((120, 40))
    os.environ |= dict(COLUMNS=str(columns), LINES=str(rows))
    from jupyter_client.manager import KernelManager
    from papermill.cli import papermill
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    class Merged(NBClientEngine):
        "The usual engine; redraws of a bar are merged when their cell ends"

        @classmethod
        def execute_managed_notebook(cls, *args, **kw):
            return super().execute_managed_notebook(*args, coalesce_streams=True, **kw)

    papermill_engines.register(None, Merged)
    if os.name == 'posix':  # sockets that only this user can open, no TCP port
        KernelManager.transport.default_value = 'ipc'
    try:
        papermill([*args, *OPTIONS])
    except PapermillExecutionError as error:  # the cell's traceback is enough, ours says nothing
        sys.exit(str(error))


if __name__ == '__main__':
    main(sys.argv[1:])
