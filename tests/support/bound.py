"""``python -m tests.support.bound PARENT MODULE ARGS...``: a module as main; it is killed when its starter ends."""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Take the signal first, and then look: a starter that ended in between sends none."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent, module, *arguments = sys.argv[1:]
    if os.getppid() != int(parent):
        sys.exit(f"the process {parent} that should have started this is gone")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
