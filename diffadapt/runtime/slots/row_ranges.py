"""Ranges of the rows of a slot: which are free, and arithmetic on them."""

from functools import lru_cache
from typing import TypeAlias

Rows: TypeAlias = tuple[range, ...]
"""Stretches of the rows of a slot, ascending and apart from one another."""


# Most layers are alike in what is taken of them, so that most answers are known.
@lru_cache(maxsize=4096)
def first_rows(free: Rows, count: int) -> Rows | None:
    """So many free rows, next to one another where there is such a stretch; `None` if there are fewer."""
    for part in free:
        if len(part) >= count:
            return (part[:count],)
    if sum(map(len, free)) < count:
        return None
    found: list[range] = []
    for part in free:
        found.append(part[:count])
        count -= len(found[-1])
    return tuple(part for part in found if part)


@lru_cache(maxsize=4096)
def without_rows(rows: Rows, gone: Rows) -> Rows:
    if rows == gone:
        return ()
    for hole in gone:
        remnants = ((range(r.start, min(r.stop, hole.start)), range(max(r.start, hole.stop), r.stop)) for r in rows)
        rows = tuple(remnant for pair in remnants for remnant in pair if remnant)
    return rows


@lru_cache(maxsize=4096)
def joined_rows(rows: Rows, others: Rows) -> Rows:
    if not rows:
        return others
    found: list[range] = []
    for part in sorted((*rows, *others), key=lambda part: part.start):
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return tuple(found)
