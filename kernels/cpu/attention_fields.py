"""What host and kernels of attention share: int64 fields in this order, and columns of the table that has a row a batch item."""

from __future__ import annotations

FIELDS = [
    "heads", "group", "pairs", "d", "dv",  # queries' heads, those that share keys; (batch item, head of keys) in all
    "qh", "ql", "qd", "kh", "kl", "kd", "vh", "vl", "vd", "oh", "ol", "mh", "mq", "mk", "ah",  # byte strides; a: slopes
    "mask_kind", "plain",  # which numbers the mask holds; whether logits are products times a positive scale
    "row_h", "rows",  # rows of a head and of all in lse and in stats' two parts
    "left", "right", "bottom", "prefix",
    "drop", "drop_h", "drop_l", "key0", "key1",  # dropout's threshold; the step between indices; its keys
    "bq", "bk", "bh", "pos_blocks", "head_blocks", "splits", "direct", "wave", "chunks",
    # bytes: of a pair's packed keys, a column of its values, and both; a thread's scratch; a split's results
    "pack_k", "pack_v", "pack", "own", "part",
    "gh", "gl", "xh", "xl", "yh", "yl", "zh", "zl",  # backward: the gradients of out, query, key, value
    "bias_q", "bias_k", "bias_h", "bias_chain", "parts", "dq_part",
]
TABLE = ["q", "k", "v", "o", "mask", "slope", "row", "lq", "lk", "drop", "g", "dq", "dk", "dv", "bias", "dq_row", "dq_h"]
NO_MASK, BOOLEAN, SAME, COMPUTE = range(4)  # the mask's numbers: none, bool, of the queries' dtype, of the compute type
