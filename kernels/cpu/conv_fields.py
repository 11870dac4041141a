"""What a convolution kernel is told of a problem: int64 fields in this order."""

from __future__ import annotations

FIELDS = [
    "images", "channels", "outputs", "groups",  # channels and outputs of one group
    "od", "oh", "ow", "d", "h", "w", "sd", "sh", "sw",  # positions; the input's size; the step between positions in it
    "xn", "xc", "xd", "xh", "xw", "yn", "yo", "yd", "yh", "yw",  # byte strides
    "wg", "wr", "wk",  # byte strides of the weight: groups, rows (outputs), k
    "taps", "tap", "span",  # taps, the address of their (d, h, w), and how many of the filter's taps along w each is
    "parts", "cuts",  # how rows and columns of the product are divided among threads
    "width", "depth", "panels", "direct",  # a block's size; panels of a packed weight; whether pixels are read in place
    "at_runs", "at_outs", "at_meet", "meet", "at_bias", "at_sums", "sums", "at_pack",  # a thread's memory
]

#: The same for Winograd's kernel.
WINOGRAD = [
    "images", "channels", "outputs", "d", "h", "w", "od", "oh", "ow", "pd", "ph", "pw",  # sizes; the padding in front
    "dh", "dw", "taps", "shift",  # the dilation; the filter's planes, positions along a row from where one begins to the next
    "xn", "xc", "xd", "xh", "xw", "yn", "yo", "yd", "yh", "yw",  # byte strides
    "th", "tw", "block", "band",  # tiles; tiles and planes of a task
    "slots", "stretch",  # planes of the input, and of the filter, at once
    "cuts", "panels", "groups",  # the division of the outputs
    "sets", "set",  # the convolution's groups, of which the sizes above are; bytes of one's transformed weight
    "chain",  # the most products that one accumulator sums up
    "x_last", "y_last",  # whether channels are dense
    "width", "place", "m_place", "m_group",  # a thread's memory
    "at_segments", "at_zeros", "at_lines", "at_v", "at_m",
]

#: The same for the transposed convolution as a product and a sum.
SCATTER = [
    "images", "channels", "outputs", "h", "w", "oh", "ow", "kh", "kw", "sh", "sw", "ph", "pw",
    "xn", "xc", "yn", "yo", "yh",  # byte strides
    "bands", "parts", "group", "depth",  # the division of rows and outputs; outputs and channels at once
    "chain",  # the most products that one accumulator sums up
    "line", "at_strip", "at_columns", "at_pack",  # a thread's memory
]

#: The same for padded planes.
DIRECT = [
    "images", "groups", "channels", "outputs", "h", "w", "oh", "ow", "sh", "sw", "ph", "pw",  # channels and outputs of one group
    "uh", "uw",  # residues of the stride that taps meet
    "deep", "wide",  # how far, in positions, a filter reaches beyond its first tap
    "xn", "xc", "xh", "yn", "yo", "yh",  # byte strides
    "taps", "table", "chain",  # of the filter; the offsets of a slice's k; the most products that one accumulator sums up
    "slice", "band", "bands", "seg", "segs", "part", "parts",  # channels at once; the division of rows, columns and outputs
    "copied",  # whether panels are copied out of the planes
    "pitch", "plane", "sums", "at_sums", "at_panel",  # a thread's memory
]

#: The same for depthwise transposed convolutions of stride 2.
BETWEEN = [
    "images", "channels", "h", "w", "oh", "ow", "xn", "xc", "xh", "yn", "yc", "yh", "wc",  # sizes; byte strides
    "sh", "table",  # the stride between rows; the address of the taps
    "low", "more", "left", "band", "pitch",  # the padded plane's first row, rows beyond a band's, margin; rows a band; its pitch
]

#: The same for many short sequences.
BATCHED = [
    "images", "channels", "outputs", "l", "ol", "step", "pad", "gap",  # sizes; stride, padding and dilation
    "xn", "xc", "yn", "yo",  # byte strides
    "taps", "table", "last_table", "chain",  # of the filter; the offsets of a slice's k; the most products of an accumulator
    "slice", "band", "bands", "part", "parts", "block", "blocks",  # channels at once; the division of positions, outputs, images
    "residues",  # of the stride that taps meet
    "deep",  # how far, in positions, a filter reaches beyond its first tap
    "pitch", "plane", "sums", "at_sums", "turned", "at_turned", "at_panel",  # a thread's memory
]

#: The same for depthwise convolutions of planes whose rows keep their length.
FLAT = [
    "images", "channels", "outputs", "xn", "xc", "yn", "yc", "w_step",  # outputs of a channel; byte strides
    "taps", "shifts",  # of a filter; how far each is from a position, in bytes
    "groups", "places", "masks",  # of four vectors; where these lie in a plane; what of them each tap meets
]

#: The same for depthwise convolutions of planes, four rows at once.
ROWS = [
    "images", "channels", "outputs", "h", "oh", "ow", "ph",  # outputs of a channel
    "xn", "xc", "xh", "yn", "yc", "yh",  # byte strides
    "w_step", "w_first", "w_row", "w_tap",  # of the filters, in bytes; backwards in a transposed convolution
    "size", "stride",  # of a filter, along both dimensions
    "blocks", "columns",  # of a vector of outputs; where each begins in a row of the input and of the output
    "masks",  # what there is of each vector that is loaded for them
]

#: The same for depthwise convolutions with channels last.
LAST = [
    "images", "channels", "h", "w", "oh", "ow", "ph", "pw", "xn", "xh", "xw", "yn", "yh", "yw",  # sizes; padding; byte strides
    "size", "stride",  # of a filter, along both dimensions
    "block", "part",  # channels at once, of a task
]
