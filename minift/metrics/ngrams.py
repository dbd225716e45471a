"""N-grams of many texts at once, as sorted whole numbers.

    gram_1[i] = token_i,   gram_n[i] = gram_{n-1}[i] * tokens + token_{i+n-1}

so equal n-grams get equal numbers, and different ones different numbers. Where these would grow past 62 bits
their ranks take their place. Counting is then a matter of sorting, without an object for each n-gram.
"""

import numpy as np

BITS = 62


def ngrams(ids: np.ndarray, lengths: np.ndarray, order: int, spread: int):
    """For n = 1 to order: (gram, bound, text), int64 (n-grams,), int and int64 (n-grams,).

    `ids` (tokens,) are those of all texts, one behind the other, from 0; `lengths` (texts,). 0 <= gram <
    bound, and bound * spread stays within 62 bits, so a gram and a number below `spread` fit into one int64.
    """
    text = np.repeat(np.arange(len(lengths)), lengths)  # (tokens,)
    size = int(ids.max(initial=0)) + 1
    gram, bound = ids, size
    for n in range(1, order + 1):
        if n > 1:
            gram, bound = gram[:-1] * size + ids[n - 1 :], bound * size
        if bound * max(size, spread) >> BITS:
            gram = np.unique(gram, return_inverse=True)[1]
            bound = len(gram) + 1
        inside = text[: len(gram)] == text[n - 1 :]
        yield gram[inside], bound, text[: len(gram)][inside]


def clipped(
    ids: np.ndarray, lengths: np.ndarray, row: np.ndarray, side: np.ndarray, order: int
) -> np.ndarray:
    """For n = 1 to order and each row, the n-grams of its side 0 that another side has too; (order, rows).

    Each counts as often as side 0 has it, but no more often than the side that has it most. `row` and `side`
    (texts,) say whose the texts are.
    """
    rows, sides = int(row.max()) + 1, int(side.max()) + 1
    grams, bounds, texts = zip(*ngrams(ids, lengths, order, order * rows * sides), strict=True)
    line = np.concatenate([n * rows + row[text] for n, text in enumerate(texts)])  # of the result
    bound = max(bounds)
    cell = (line * bound + np.concatenate(grams)) * sides + np.concatenate([side[text] for text in texts])
    cell, count = tally(cell)
    place, side = np.divmod(cell, sides)
    first = starts(place)  # of each gram in each line
    own = np.add.reduceat(np.where(side == 0, count, 0), first)
    most = np.maximum.reduceat(np.where(side == 0, 0, count), first)
    shared = np.bincount(place[first] // bound, np.minimum(own, most), order * rows)
    return shared.astype(np.int64).reshape(order, rows)


def tally(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, sorted, and how often each occurs."""
    values = np.sort(values)
    first = starts(values)
    return values[first], np.diff(np.append(first, len(values)))


def starts(values: np.ndarray) -> np.ndarray:
    """Where in sorted values each new one starts."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)


def numbered(values: list) -> np.ndarray:
    """Equal values as equal numbers, from 0 in order of appearance; int64 (values,)."""
    seen = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return np.fromiter(map(seen.__getitem__, values), np.int64, len(values))


def several(lengths: np.ndarray, order: int) -> np.ndarray:
    """How many n-grams texts of these lengths have, for n = 1 to order; (order, texts)."""
    return np.maximum(lengths - np.arange(order)[:, None], 0)


def blocks(rows: list[list[str]], most: int):
    """Slices of the rows of texts, each of about `most` characters, or of one row."""
    ends = np.cumsum([sum(map(len, texts)) for texts in rows]) // most
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(rows)]
    return map(slice, cuts, cuts[1:])
