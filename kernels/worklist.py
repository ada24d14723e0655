"""The work list of the Triton tree attention: its words, its tables, and their columns.

A *tile* is `block_n` keys of a sequence, counted from its first; a *step* is one tile against
`block_m` packed rows (query tokens x heads of a group); a *column* is all steps of the same rows
and key/value head; an *item* is all columns of one node of the prefix tree. Steps are numbered item
by item, column by column; a *worker* takes an interval of them, some columns of an item or a part
of one. A *piece* is what a worker does of a column. Where that is not all there is for its rows, it
leaves a partial result in the slot of its number; pieces are numbered as steps are.

Columns are numbered head by head, so that neighbouring programs read the same keys for several
blocks of rows. Where workers take several columns, they are numbered block by block, all heads of
one before the next: else a worker would read the same keys for one block after the other.

Letters: B requests, R rows, W words of ancestor bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from specdec.kernels.partition import Mode

# Columns of the request table.
ROW0, ROWS, SEQUENCE, PREFIX, KEYS, COMMON = (tl.constexpr(c) for c in range(6))
REQUEST_FIELDS = tl.constexpr(8)

# Columns of the item table.
START = tl.constexpr(0)  # first step
STEPS = tl.constexpr(1)  # of each column
BLOCKS = tl.constexpr(2)  # of block_m packed rows; negative where columns are block by block
FIRST_ROW = tl.constexpr(3)
TOKENS = tl.constexpr(4)  # query tokens
OWNER = tl.constexpr(5)  # the sequence whose page table is read
TILE0 = tl.constexpr(6)  # first dense tile
TILES = tl.constexpr(7)  # dense tiles: every row sees every key
KEY0 = tl.constexpr(8)  # first entry of the key table
LOOSE = tl.constexpr(9)  # entries of the key table, masked one by one
PARENT = tl.constexpr(10)  # the item of the enclosing node, -1 for none
ALONE = tl.constexpr(11)  # no other item has these rows
SLOT0 = tl.constexpr(12)  # first piece
WORKER0 = tl.constexpr(13)  # first worker
PIECES = tl.constexpr(14)  # of each column
TAKES = tl.constexpr(15)  # columns of a worker, where they are not cut
ITEM_FIELDS = tl.constexpr(16)

# Columns of the worker table: its item, copied, so that one load finds all; then
STEP = tl.constexpr(16)  # first step
STOP = tl.constexpr(17)  # end of the interval
FIRST_PAGE = tl.constexpr(18)  # where its first tile begins, and the pages behind it
MAX_PARTS = 8  # pages of a tile
SETTLED = tl.constexpr(26)  # end of its owner's tiles whose keys are older than the work list
WORKER_FIELDS = tl.constexpr(32)

# Entries of the header.
WORKERS = tl.constexpr(0)
PARTIALS = tl.constexpr(1)  # pieces that leave a partial result

# Modes, as the kernels know them: their places in `partition.MODES`.
SEQUENCE_MODE, NODE, NODE_CHUNK, FLATTEN, TWO_PHASE, AUTO = (tl.constexpr(c) for c in range(6))

UNLIMITED = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class Tiling:
    """The shape of the kernel: what is fixed when it is compiled or launched."""

    block_m: int  # packed rows of a step
    block_n: int  # keys of a step
    warps: int
    stages: int  # of the pipeline that loads keys and values
    ctas: int  # programs for each multiprocessor
    loose_n: int = 32  # loose keys of a turn
    loose_stages: int = 1
    loose_steps: int = 2  # a tile of loose keys is as much work as so many dense ones
    start_steps: int = 4  # so is beginning a column
    bulk: bool = False  # tiles are copied by the copy engine of Hopper and later (TMA)
    roles: bool = False  # warps share the work by role, see kernels/hopper.py
    bring: bool = False  # a program asks for what it needs first before it may read any of it
    merges: int = 16  # programs of the merge for each multiprocessor, at most: each costs a start


@dataclass(eq=False)
class Schedule:
    """The work list, as device tensors; see the columns above."""

    mode: Mode
    tiling: Tiling
    window: int | None
    causal: bool
    programs: int
    requests: int
    header: Tensor  # [16] int32
    items: Tensor  # [2B, 16] int32
    workers: Tensor  # [workers, 32] int32
    key_slots: Tensor  # [keys] int32, -1 for none
    rows: Tensor  # [R, 16] int32, the innermost item of each row, copied
    row_roots: Tensor  # [R] int32, the entry of the key table where the row's tree begins
    row_tails: Tensor  # [R] int32, how many entries before that one the row sees
    row_depths: Tensor  # [R] int32
    row_positions: Tensor  # [R] int32, prefix + depth
    words: Tensor | None  # [R, W] int32, ancestors within the window; None for chains
    page_table: Tensor  # [S, pages]
    prefix_lens: Tensor  # [S]
    page_size: int
    slots: int  # room for partial results
    used: bool = False  # by a launch of attention, or one that was captured
