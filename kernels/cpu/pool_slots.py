"""Where the numbers lie that host and kernels of pooling share: slots of an array of int64."""

from __future__ import annotations

N, C = 0, 1
IN, OUT, SIZE, STRIDE, PAD, DILATION = 2, 5, 8, 11, 14, 17  # three each: depth, height, width
ADAPTIVE = 20  # whether the windows are those of adaptive pooling: SIZE is what they have room in, STRIDE, … mean nothing
X, Y = 21, 26  # strides in bytes: batch, channel, depth, height, width
DIVISOR = 31  # what an average divides by; 0: the elements of its window
INCLUDE_PAD = 32  # whether these are also those in the padding
WHOLE = 33  # whether each window is a whole plane, and that one row
BLOCK = 34  # across: channels that a thread works on at once
OWN = 512  # bytes at the beginning of a thread's scratch memory for two vectors of numbers and of places
ROOM = 35  # bytes of scratch memory a thread
ROWS = 8  # along: rows whose columns are reduced before their windows are: what was just stored is slow to load at other places
ROW_ENTRY = 40  # along: bytes of an entry in the table of a plane's rows
