"""Keeps what libraries say to themselves off the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile

from soup.errors import Refused


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Sends file descriptor 2 to a scratch file, which is shown where something fails that soup has no words for."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except (Refused, KeyboardInterrupt, BrokenPipeError):
            raise
        except BaseException:
            sys.stderr.flush()
            said.seek(0)
            os.write(terminal, said.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
