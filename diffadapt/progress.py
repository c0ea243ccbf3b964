"""Progress bars for work that takes longer than two seconds, on a terminal only."""

import sys
import threading
from collections.abc import Collection, Iterable
from typing import TypeVar

T = TypeVar("T")
_DELAY = 2.0


def with_progress(items: Collection[T], doing: str, unit: str = "layer") -> Iterable[T]:
    """Return `items`, which show a bar on stderr while they are used, once that has taken two seconds.

    There is no bar if stderr is no terminal, in another thread than the main one, and with `TQDM_DISABLE=1`.

    Args:
        items: what the work consists of.
        doing: what is done, in front of the bar.
        unit: what an item is.
    """
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    if not is_terminal or threading.current_thread() is not threading.main_thread():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=doing, unit=unit, delay=_DELAY, leave=False)
