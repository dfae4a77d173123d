"""What a script does before its slow imports: where it cannot run, it says so in one line; Ctrl-C ends it at once."""

import signal
import sys
from pathlib import Path

main = getattr(sys.modules["__main__"], "__file__", None)
is_script = main is not None and Path(main).resolve().parent == Path(__file__).resolve().parent.parent

if sys.platform == "win32":
    sys.exit(
        "This program runs on Linux and macOS; on Windows, run it in WSL (https://learn.microsoft.com/windows/wsl)"
    )
if is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Without a traceback of the imports; console.errors_in_one_line sets the handler again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
