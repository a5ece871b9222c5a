#!/usr/bin/env python3
"""papermill, with the notebook's own progress bars in the terminal: same arguments, same executed notebook.

    python tools/run.py nbs/train_uda.ipynb outputs/demo.ipynb -p source demo

papermill alone shows one bar that counts cells, so an hour of training is one motionless line. Here the kernel's stdout and
stderr are passed on as they come, and the executed notebook keeps the last state of each bar instead of every redraw.
"""
import os, shutil, sys

def main(args):
    os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')
    os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
    cols,rows = shutil.get_terminal_size((120,40))
    os.environ |= dict(COLUMNS=str(cols), LINES=str(rows))               # the kernel has no terminal of its own: its bars fit ours
    from jupyter_client.manager import KernelManager
    from papermill.cli import papermill
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    class Merged(NBClientEngine):
        "The usual engine; redraws of a bar are merged when their cell ends"
        @classmethod
        def execute_managed_notebook(cls, *args, **kw): return super().execute_managed_notebook(*args, coalesce_streams=True, **kw)

    papermill_engines.register(None, Merged)
    if os.name=='posix': KernelManager.transport.default_value = 'ipc'   # sockets that only this user can open, no TCP port
    try: papermill([*args, '--no-progress-bar', '--stdout-file', '-', '--stderr-file', '-', '--log-level', 'WARNING'])
    except PapermillExecutionError as e: sys.exit(str(e))                # the cell's traceback is enough, ours says nothing

if __name__=='__main__': main(sys.argv[1:])
