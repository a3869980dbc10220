"""Ctrl-C in a line and with 130, also while a pipeline is being imported: cli imports this before all that is slow."""

import sys
from types import TracebackType

EXIT_CODE = 130


def tell(prog: str) -> None:
    print(f"{prog}: interrupted; the same command takes up where it stopped", file=sys.stderr)


def _told_in_a_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        tell(sys.argv[0])
        sys.exit(EXIT_CODE)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _told_in_a_line
