"""The core idea: a method declares how a weight is laid out, and how to divide it over ranks follows.

- `layout`: each stored component (codes, scales, ...) says how many elements of the logical weight `[out, in]` one of
  its own elements covers. Alignments, slices and sizes follow from that.
- `partition`: where one dim is divided over the ranks of an axis, at multiples of an alignment. `heads` partitions
  attention heads, `mesh` names the axes.
- `shard`: one rank's part of a weight; `row_layout`: the same while rows travel between ranks.
- `tally`: proves that the parts are those of the whole weight, however they are divided.

int4 codes with one scale for each group of 128 inputs, over two ranks:

>>> from distquant.sharding.layout import Component, Layout
>>> from distquant.sharding.partition import even_partition
>>> scales = Component(name="scales", dtype="bfloat16", block_shape=(1, 128))
>>> int4 = Layout((Component(name="", dtype="int32", block_shape=(1, 8)), scales))
>>> int4.alignments((4096, 11008), dim=1)  # no rank may get a part of a group
(128,)
>>> partition = even_partition(11008, 128, ranks=2)  # 86 groups, 43 for each rank
>>> partition.segments(1)
((5504, 11008),)
>>> scales.slice((4096, 11008), 1, 5504, 11008)  # the second rank's scales: columns 43 to 86
(1, 43, 86)
"""
