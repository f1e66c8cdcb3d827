"""Progress of a load and of the work around it, for people: bars on a terminal or in a notebook, lines elsewhere.

A process has one display at a time. `working` and `showing` open it, `status` says what is being done now.
"""

from distquant.progress.display import Viewer, alone, first_rank, give_back, handed_over, showing, status, working

__all__ = ["Viewer", "alone", "first_rank", "give_back", "handed_over", "showing", "status", "working"]
