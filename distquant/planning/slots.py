"""Slots of the staging memory: one fact for the planner's sums and for the engine."""

READ_SLOTS, SEND_SLOTS = 4, 4
"""Slots to read into, and slots from which other ranks copy. All have the size of the largest piece."""

PAGE = 4096
"""Bytes that reads past the page cache start and end on."""

SLACK = 2 * PAGE
"""Bytes by which a slot is larger than the piece that it holds."""
