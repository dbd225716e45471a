"""Edits that move blocks of words: what TER counts.

    edits(h, r) = shifts + edit distance of the shifted h from r

A shift moves a run of words of h that also stands in r to where r has it. The least number is hard to find;
TER's is that of a greedy search: of all shifts take the one that lowers the edit distance most, until none
does. The limits and the choice among equal shifts are those of Tercom as sacrebleu has them.
Source: Snover et al. 2006, "A Study of Translation Edit Rate with Targeted Human Annotation", section 2.2;
Shapira and Storer 2002, "Edit distance with move operations", on why it is hard.
"""

from math import ceil, floor

from minift.metrics.edit_distance import next_row
from minift.metrics.subsequence import places

MOST_WORDS = 10  # in a shifted run
FARTHEST = 50  # between the run's place in h and in r
MOST_TRIALS = 1000  # over all shifts of a text; the shift during which they are used up is not made
BEAM = 25  # cells on either side of the table's diagonal
NEVER = 1 << 60


def edits(h: list[str], r: list[str]) -> int:
    """Shifts, insertions, deletions and substitutions from h to r by TER's greedy search."""
    if not r:
        return len(h)
    table, shifts, trials = Table(r), 0, 0
    while True:
        distance = table.fill(h)
        gain, shifted, trials = best_shift(h, r, table, distance, trials)
        if gain <= 0 or trials >= MOST_TRIALS:
            return shifts + distance
        h, shifts = shifted, shifts + 1


def best_shift(h: list[str], r: list[str], table: "Table", distance: int, trials: int):
    """(gain, shifted words, trials so far) of the shift that gains most; of equals the longest, the first."""
    at, edited_h, edited_r = align(h, r, table)
    best, words = (0,), h
    for start, place, size in common_runs(h, r):
        end = start + size
        if not any(edited_h[start:end]) or not any(edited_r[place : place + size]):
            continue  # one side is right already
        if start <= at[place] < end:
            continue  # it would move within itself
        before = -1
        for target in (at[k] + 1 if k >= 0 else 0 for k in range(place - 1, place + size)):
            if target != before:
                trials += 1
                shifted = shift(h, start, end, target)
                rank = (distance - table.distance(shifted, min(start, target)), size, -start, -target)
                if rank > best:
                    best, words = rank, shifted
            before = target
        if trials >= MOST_TRIALS:
            break
    return best[0], words, trials


class Table:
    """Edit distances D[i, j] from the first i words of an h to the first j of r, within the beam.

    They are Levenshtein's, computed as in edit_distance.py, where no best path can leave the beam: one with d
    edits is at most (d + |len(h) - len(r)|) / 2 cells from the diagonal. Else a table of cells holds them.
    """

    def __init__(self, r: list[str]):
        self.r, self.places, self.full = r, places(r), (1 << len(r)) - 1

    def fill(self, h: list[str]) -> int:
        """The distance of h; its rows stay, for `cell` and for the distances of words that start alike."""
        self.rows, self.cells = [(self.full, 0)], []
        for word in h:
            self.rows.append(next_row(*self.rows[-1], self.places.get(word, 0), self.full))
        if not self.inside(len(h), *self.rows[-1]):
            self.cells = beam_rows(h, self.r)
        return self.cell(len(h), len(self.r))

    def cell(self, i: int, j: int) -> int:
        if self.cells:
            return self.cells[i][j]
        (up, down), first = self.rows[i], (1 << j) - 1
        return i + (up & first).bit_count() - (down & first).bit_count()

    def distance(self, h: list[str], same: int) -> int:
        """The distance of as many words as those that fill the table, the first `same` of them the same."""
        up, down = self.rows[same]
        for word in h[same:]:
            up, down = next_row(up, down, self.places.get(word, 0), self.full)
        if self.inside(len(h), up, down):
            return len(h) + up.bit_count() - down.bit_count()
        return beam_rows(h, self.r, self.cells[: same + 1])[-1][-1]

    def inside(self, size: int, up: int, down: int) -> bool:
        d = size + up.bit_count() - down.bit_count()
        return (d + abs(size - len(self.r))) / 2 <= BEAM - 2  # the beam ends at -25 and 24, and rounds


def beam_rows(h: list[str], r: list[str], known=()) -> list[list[int]]:
    """The table D, its row i over the first i words of h, near its diagonal only.

    In cells outside of the beam D is NEVER, so that a distance is too large where every best path leaves it.
    `known` are first rows, from another h of the same length that starts alike.
    """
    rows = list(known) or [list(range(len(r) + 1))]
    slope = len(r) / len(h) if h else 1
    width = BEAM if slope / 2 <= BEAM else ceil(slope / 2 + BEAM)  # rows must overlap
    for i, word in enumerate(h[len(rows) - 1 :], len(rows)):
        middle = floor(i * slope)
        low = max(0, middle - width)
        high = min(len(r) + 1, middle + width)
        above, row, least = rows[-1], [NEVER] * (len(r) + 1), NEVER
        if not low:
            row[0] = least = i
        for j in range(max(1, low), high):
            replaced, dropped = above[j - 1] + (word != r[j - 1]), above[j] + 1
            least += 1
            if dropped < least:
                least = dropped
            if replaced < least:
                least = replaced
            row[j] = least
        rows.append(row)
    return rows


def align(h: list[str], r: list[str], table: Table) -> tuple[list[int], list[bool], list[bool]]:
    """Along the best path: the place in h of each word of r; the words of h and of r that are edited.

    A word of r that h lacks stands at the place of the word before it, -1 at the start. Of equal paths, from
    the end: replace or keep a word before dropping one of h before inserting one of r.
    """
    i, j = len(h), len(r)
    at, edited_h, edited_r, d = [-1] * j, [True] * i, [True] * j, table.cell(i, j)
    while i or j:
        differ = not (i and j) or h[i - 1] != r[j - 1]
        if i and j and table.cell(i - 1, j - 1) + differ == d:
            i, j, d = i - 1, j - 1, d - differ
            at[j], edited_h[i], edited_r[j] = i, differ, differ
            continue
        d -= 1
        if i and table.cell(i - 1, j) == d:
            i -= 1
        else:
            j -= 1
            at[j] = i - 1
    return at, edited_h, edited_r


def common_runs(h: list[str], r: list[str]):
    """(start in h, start in r, size) of the runs of words that are in both, ordered by start and size."""
    starts = {}
    for place, word in enumerate(r):
        starts.setdefault(word, []).append(place)
    for start, word in enumerate(h):
        for place in starts.get(word, ()):
            if abs(place - start) > FARTHEST:
                continue
            for size in range(1, min(MOST_WORDS, len(h) - start, len(r) - place) + 1):
                if h[start + size - 1] != r[place + size - 1]:
                    break
                yield start, place, size


def shift(h: list[str], start: int, end: int, target: int) -> list[str]:
    """The run from start to end moved before the word at `target`; if in itself, right by target - start."""
    rest = h[:start] + h[end:]
    to = target - (end - start) if target > end else target
    return rest[:to] + h[start:end] + rest[to:]
