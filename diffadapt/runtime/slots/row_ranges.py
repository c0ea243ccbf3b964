"""Arithmetic on ranges of the rows of a slot: which rows are free, and which an adapter takes."""

from functools import lru_cache
from typing import TypeAlias

Rows: TypeAlias = tuple[range, ...]
"""Rows of a slot as ranges, ascending and with gaps between them."""


# Cached, because the same rows are free and taken on most layers of a model.
@lru_cache(maxsize=4096)
def first_rows(free: Rows, count: int) -> Rows | None:
    """Return `count` of the free rows, in one range if possible, or `None` if there are fewer."""
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
def without_rows(rows: Rows, removed: Rows) -> Rows:
    """Return the rows in `rows` that are not in `removed`."""
    if rows == removed:
        return ()
    for hole in removed:
        remnants = ((range(r.start, min(r.stop, hole.start)), range(max(r.start, hole.stop), r.stop)) for r in rows)
        rows = tuple(remnant for pair in remnants for remnant in pair if remnant)
    return rows


@lru_cache(maxsize=4096)
def joined_rows(rows: Rows, others: Rows) -> Rows:
    """Return the rows in `rows` or in `others`, which have none in common; adjacent ranges become one."""
    if not rows:
        return others
    found: list[range] = []
    for part in sorted((*rows, *others), key=lambda part: part.start):
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return tuple(found)
